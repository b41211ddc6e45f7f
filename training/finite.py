"""A step whose loss or gradient is not a number ends its run, in one sentence.

Knows: what a person can try then. Refuses to know: how a step is made, how a run is saved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from training.gradients import LOSSES, Seen
from training.settings import TrainSettings


def check_finite(seen: Sequence[Seen], norm: float, step: int, settings: TrainSettings, out: Path) -> None:
    """seen: of the step's batches; norm: of the gradient; step: from 1. To be asked before the step changes a weight, so
    that neither the weights nor what is in `out` hold anything of it. Raises ValueError."""
    values = {f"loss ({name})": sum(x.losses[i] for x in seen) for i, name in enumerate(LOSSES)}
    values["gradient's norm"] = norm
    bad = next((name for name, value in values.items() if not math.isfinite(value)), None)
    if bad is None:
        return
    kept = f"{out / 'latest'} is the last save" if (out / "state.pt").exists() else "nothing was saved before"
    raise ValueError(
        f"step {step}: the {bad} is {values[bad]}, so the run ends ({kept}); try a lower --lr than {settings.lr:g}"
        f"{' or --fp32' * settings.bf16}, in a new --out."
    )
