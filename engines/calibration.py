"""`calibrate`: what `python -m training calibrate` fitted, written into a bundle's manifest.

Knows: the keys of manifest.calibration. Refuses to know: how they were fitted.
"""

from __future__ import annotations

import json
from pathlib import Path

from .bundle import Bundle, BundleError, check_calibration, update_manifest

KEYS = ("date", "command", "draft_hash", "target_hash", "rounds", "sampled", "greedy", "ece_before", "ece_after")
OPTIONAL = ("bias",)


def store(folder: Path, file: Path) -> dict:
    """Checks `file` (JSON) against the bundle in `folder` and writes it into the manifest. Returns what was written.

    Raises BundleError, before anything is written, for a file of another draft or target, of a wrong length, or no such
    file.
    """
    bundle = Bundle.load(folder)
    try:
        raw = json.loads(Path(file).read_text())
    except (OSError, ValueError) as error:
        raise BundleError(
            f"{file} is not a readable calibration ({error}); make one with python -m training calibrate."
        ) from None
    missing = [key for key in KEYS if not isinstance(raw, dict) or key not in raw]
    if missing:
        raise BundleError(f"{file} lacks the key {missing[0]!r}; make one with python -m training calibrate.")
    for key in ("sampled", "greedy"):
        check_calibration(raw, bundle, str(file), key)
    calibration = {key: raw[key] for key in (*KEYS, *OPTIONAL) if key in raw}
    update_manifest(folder, calibration=calibration)
    return calibration
