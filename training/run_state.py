"""state.pt of a run: written so that what was there survives a full disk, read with one sentence when it is damaged.

Knows: files, what a write can run into. Refuses to know: what the state holds.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError


class NotSaved(OSError):
    """The run could not be saved; what was saved before is as it was."""


def write_run(out: Path, state: dict, write_drafts: Callable[[], None]) -> None:
    """OUT/state.pt, then whatever write_drafts writes (each file beside, then renamed). The largest comes first: a disk
    that it fits on has room for the rest. Raises NotSaved."""
    part = out / "state.pt.part"
    try:
        with part.open("wb") as file:
            torch.save(state, file)
        write_drafts()
        os.replace(part, out / "state.pt")
    except (OSError, RuntimeError, SafetensorError) as error:
        for left in (part, *out.glob("*/*.part")):
            left.unlink(missing_ok=True)
        raise NotSaved(f"{out} could not be saved ({reason_of(error)}); what was saved before is whole.") from None


def reason_of(error: BaseException) -> str:
    """What the system said, where PyTorch's writer put an error of its own over it."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, OSError) and inner.strerror:
            return inner.strerror
        inner = inner.__context__
    return str(error).splitlines()[0]


def read_run(out: Path) -> dict:
    """Raises ValueError when the file is not what write_run wrote."""
    file = out / "state.pt"
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not {"draft", "optimizer", "progress", "settings"} <= state.keys():
            raise ValueError("it holds something else")
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0][:120].rstrip(".") if str(error) else type(error).__name__
        raise ValueError(
            f"{file} is corrupt ({reason}); remove it and begin a new run from {out.name}/latest with --init."
        ) from None
    return state


def filled(known: dict, defaults: dict) -> dict:
    """`known` with the defaults of what it lacks, inside its dicts too."""
    both = [k for k, v in defaults.items() if isinstance(v, dict) and isinstance(known.get(k), dict)]
    return {**defaults, **known, **{k: filled(known[k], defaults[k]) for k in both}}
