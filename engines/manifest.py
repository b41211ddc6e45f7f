"""manifest.json: read as JSON of the version that this code knows, its keys taken with their types, changed atomically.

Knows: the file, its format_version, and how a key that does not fit is refused.
Refuses to know: what the keys mean (specs.py, bundle.py) and the files that they name.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

FORMAT_VERSION = 2
REMAKE = "export the bundle again (python -m export)"
_TYPES = {int: "an integer", str: "a string", bool: "true or false", tuple: "a list", dict: "an object"}


class BundleError(ValueError):
    """A bundle that does not fit; the message is one sentence that names what, and what to run."""


def read(file: Path) -> dict[str, Any]:
    """The JSON object in `file`. Raises BundleError for no such file, other content or another format_version."""
    if not file.is_file():
        raise BundleError(f"{file.parent} holds no manifest.json; it is not a bundle: make one with python -m export.")
    try:
        raw = json.loads(file.read_text())
    except (ValueError, OSError) as error:
        raise BundleError(f"{file} is not readable JSON ({error}); {REMAKE}.") from None
    if not isinstance(raw, dict):
        raise BundleError(f"{file} is not a JSON object; {REMAKE}.")
    if (version := raw.get("format_version")) != FORMAT_VERSION:
        raise BundleError(f"{file}: format_version is {version!r}, this version reads {FORMAT_VERSION}; {REMAKE}.")
    return raw


def get(raw: dict, key: str, kind: type, where: object, of: tuple[type, ...] = ()) -> Any:
    """raw[key], checked to be a `kind` (a JSON list becomes a tuple, its elements one of `of` each). `where` begins the
    sentence of the BundleError."""
    if key not in raw:
        raise BundleError(f"{where} lacks the key {key!r}; {REMAKE}.")
    value = tuple(raw[key]) if kind is tuple and isinstance(raw[key], list) else raw[key]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise BundleError(f"{where}: {key} is {raw[key]!r}, it must be {_TYPES[kind]}; {REMAKE}.")
    for element in value if of else ():
        if not isinstance(element, of) or isinstance(element, bool):
            kinds = " or ".join(_TYPES[kind] for kind in of)
            raise BundleError(f"{where}: {key} holds {element!r}, each must be {kinds}; {REMAKE}.")
    return value


def update_manifest(folder: str | Path, **keys: Any) -> None:
    """Sets top-level keys of `folder`/manifest.json; a reader sees the old file or the new one, never a part."""
    file = Path(folder) / "manifest.json"
    raw = {**json.loads(file.read_text()), **keys}
    temporary = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        temporary.write_text(json.dumps(raw, indent=1) + "\n")
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
