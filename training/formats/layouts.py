"""Every layout by name: which one a folder has, what it says in this project's own terms, and writing it in another.

Knows: the order in which layouts are recognised, what a conversion has to add or may leave out. Refuses to know: any
layout's keys (its own file does), modules, training.

The terms of the project are a DraftConfig and tensors under the names of training/draft.py, or an ArConfig and those of
training/autoregressive.py. A conversion copies tensors as they are stored: no value changes, in any direction.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from training.autoregressive import ArConfig
from training.draft import DraftConfig
from training.formats import deepspec, eagle3, modelopt, mtp, specforge, speculators
from training.weights import StoredTensor, read_safetensors, stored_tensors, write_checkpoint

LAYOUTS = {x.NAME: x for x in (speculators, eagle3, mtp, specforge, modelopt, deepspec)}  # recognised in this order
OWN = {"parallel": deepspec, "eagle3": eagle3, "mtp": mtp}  # a kind of draft: the layout that it is saved in
WITH_T2D = ("speculators", "eagle3")  # where a trimmed vocabulary is stored in both directions
BORROWED = ("embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class StoredDraft:
    """A draft as a folder holds it: its layout's name, config, tensors (unread, by our names), config.json as it is."""

    layout: str
    config: DraftConfig | ArConfig
    tensors: dict[str, StoredTensor]
    raw: dict


def open_draft(folder: str | Path, target_folder: str | Path | None = None) -> StoredDraft:
    """The one way to read a draft's folder, whatever its layout. target_folder: asked for its number of layers where
    the draft does not say it. Raises FileNotFoundError without config.json or weights, ValueError with one sentence."""
    folder = Path(folder)
    raw, source = read_json(folder / "config.json"), str(folder / "config.json")
    stored = stored_tensors(folder)
    layout = LAYOUTS[detect(raw, stored, source)]
    if "quantization_config" in raw:
        raise ValueError(
            f"{source}: the checkpoint is quantised (quantization_config); convert from the one before it."
        )
    config = layout.read_config(raw, source, None if target_folder is None else layers_of(target_folder))
    tensors = {ours: stored[theirs] for theirs, ours in layout.read_names(stored).items()}
    whole = config.draft_vocab_size is None and "d2t" in tensors and tensors["d2t"].shape == (config.vocab_out,)
    if whole and bool(tensors.pop("d2t").load().any()):  # a map of all tokens says nothing
        raise ValueError(f"{source}: draft_vocab_size is the whole vocabulary, but d2t is not 0 everywhere.")
    return StoredDraft(layout.NAME, config, tensors, raw)


def read_json(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} holds no {path.name}.")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}.") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} is no JSON object.")
    return raw


def layers_of(target_folder: str | Path) -> int | None:
    raw = read_json(Path(target_folder) / "config.json")
    layers = (raw.get("text_config") or raw).get("num_hidden_layers")
    return None if layers is None else int(layers)


def detect(raw: dict, names: dict[str, StoredTensor], source: str) -> str:
    """The layout's name. Raises ValueError for a folder that holds no draft of a layout known here."""
    architectures = " ".join(raw.get("architectures") or [])
    if raw.get("speculators_model_type") == "eagle3":
        raise ValueError(
            f"{source}: an EAGLE-3 draft in the speculators layout; this version reads SpecForge's eagle3."
        )
    if "eagle" in architectures.lower() and not eagle3.matches(raw, names):
        raise ValueError(f"{source}: an EAGLE draft ({architectures}) of an older version; this version reads EAGLE-3.")
    if any(name.startswith("mtp.") for name in names):
        raise ValueError(
            f"{source}: the draft lies in a target's own checkpoint (mtp.*); this version reads drafts apart."
        )
    for name, layout in LAYOUTS.items():
        if layout.matches(raw, names):
            return name
    raise ValueError(
        f"{source} is no draft of a known layout: it has none of block_size, target_layer_ids, dflash_config and "
        "speculators_model_type."
    )


def convert(
    source: str | Path, out: str | Path, to: str, *, target: str | Path | None = None, verifier: str | None = None
) -> list[str]:
    """Writes the draft of `source` in layout `to`; gives what a reader of the result should know, a sentence each.

    target: the target's folder; its embedding and lm_head are left out where the layout borrows them and the draft's
    are the same, and lent where the layout needs them. verifier: the target's name in a speculators config (its
    folder's). Raises ValueError, one sentence, where the layout cannot say what the draft is.
    """
    if to not in LAYOUTS:
        raise ValueError(f"the layout is {to!r}; it must be one of {', '.join(sorted(LAYOUTS))}.")
    if Path(out).exists() and any(Path(out).iterdir()):
        raise ValueError(f"{out} exists and is not empty; name another folder.")
    draft = open_draft(source, target)
    layout, config = LAYOUTS[to], draft.config
    if kind_of(to) != config.kind:
        fits = ", ".join(sorted(name for name in LAYOUTS if kind_of(name) == config.kind))
        raise ValueError(f"a draft of kind {config.kind!r} cannot be written in the layout {to!r}; it must be {fits}.")
    if config.decoder.gemma4 and to != deepspec.NAME:
        raise ValueError(f"the draft has Gemma4's layers, which the {to} layout does not say; keep it in deepspec.")
    raw = layout.write_config(config, verifier or (None if target is None else str(target)))
    state = {name: stored.load() for name, stored in draft.tensors.items()}
    notes = borrow_or_lend(state, to, target)
    if config.kind != "parallel":
        notes += layout.notes(config)
    elif not config.decoder.qk_norm and to != "deepspec":
        notes.append(f"this draft has no norms of queries and keys, which {to}'s own loader expects (Qwen3 layers).")
    write_checkpoint(Path(out), raw, named(state, to, config))
    return notes


def kind_of(layout: str) -> str:
    """The kind of draft that a layout holds."""
    return layout if layout in OWN else "parallel"


def named(state: dict[str, Tensor], layout: str, config: DraftConfig | ArConfig) -> dict[str, Tensor]:
    """A draft's tensors (by our names) under a layout's, with t2d [V] bool beside d2t where the layout has it."""
    if layout in WITH_T2D and "d2t" in state:
        t2d = torch.zeros(config.decoder.vocab_size, dtype=torch.bool)
        t2d[torch.arange(config.vocab_out) + state["d2t"].flatten()] = True
        state = {**state, "t2d": t2d}
    theirs = LAYOUTS[layout].write_names(list(state), config)
    return {theirs.get(name, name): tensor for name, tensor in state.items()}


def config_json(config: DraftConfig | ArConfig) -> dict:
    """config.json of a draft in the layout that it is saved in."""
    return OWN[config.kind].write_config(config, None)


def borrow_or_lend(state: dict[str, Tensor], to: str, target: str | Path | None) -> list[str]:
    """Leaves out or adds what a layout takes from the target; `state` is changed. Gives notes."""
    theirs = {} if target is None else read_safetensors(Path(target))
    theirs = {name.removeprefix("model."): tensor for name, tensor in theirs.items()}
    theirs.setdefault("lm_head.weight", theirs.get("embed_tokens.weight"))
    if to == "speculators" and "lm_head.weight" not in state:
        if theirs["lm_head.weight"] is None:
            raise ValueError(
                "the speculators layout stores an lm_head and the draft has none; name the target's folder."
            )
        state["lm_head.weight"] = theirs["lm_head.weight"].clone()
        return ["lm_head.weight is the target's."]
    notes = []
    borrowed = {"specforge": BORROWED, "modelopt": BORROWED, "eagle3": BORROWED[:1], "mtp": BORROWED[:1]}
    for name in borrowed.get(to, ()):
        if name in state and theirs.get(name) is not None and same_values(state[name], theirs[name]):
            del state[name]
            notes.append(f"{name} is left out: it is the target's.")
        elif name in state:
            notes.append(
                f"{name} is kept, and {to}'s own loader takes the target's instead: a draft with another one loses."
            )
    return notes


def same_values(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and torch.equal(ours, theirs.to(ours.dtype))
