"""JSONL as people have it: one record a line, and a bad line is named and left out while the others are kept.

Knows: bytes, lines, JSON. Refuses to know: what a record means (its reader says so by raising ValueError).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
log = logging.getLogger(__name__)


def records(path: str | Path, parse: Callable[[object], T], nothing: str) -> Iterator[T]:
    """parse(record) of each line. A line that is empty, not UTF-8, not JSON or refused by `parse` (ValueError) is left
    out with one warning that names the file and the line; a last warning counts them.

    Raises FileNotFoundError without the file, and ValueError, which ends in `nothing`, when no line is usable.
    """
    good = bad = 0
    with open(path, "rb") as handle:
        for number, raw in enumerate(handle, 1):
            try:
                found = parse(decode(raw))
            except ValueError as error:
                bad += 1
                log.warning("%s:%d left out: %s.", path, number, str(error).removesuffix("."))
                continue
            good += 1
            yield found
    if bad:
        log.warning("%s: %d of %d lines left out.", path, bad, good + bad)
    if not good:
        raise ValueError(f"{path} holds {nothing}")


def decode(raw: bytes) -> object:
    """The record of one line. Raises ValueError in a few words."""
    if not raw.strip():
        raise ValueError("the line is empty")
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 (byte {error.start + 1} of the line)") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise ValueError("it is not JSON (nested too deeply)") from None
