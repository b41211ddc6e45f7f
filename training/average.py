"""A running mean of the trained weights (EMA): kept beside them, lent to an evaluation, saved with them.

Knows: the arithmetic. Refuses to know: when it is updated, which files it goes to.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Average:
    """values: float32, as the parameters are. After a step: value = decay * value + (1 - decay) * parameter."""

    def __init__(self, parameters: list[Tensor], decay: float):
        self.parameters, self.decay = parameters, decay
        self.values = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self) -> None:
        for value, parameter in zip(self.values, self.parameters):
            value.lerp_(parameter, 1 - self.decay)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Inside, the parameters hold the mean."""
        kept = [p.detach().clone() for p in self.parameters]
        self._set(self.values)
        try:
            yield
        finally:
            self._set(kept)

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values):
            parameter.copy_(value)
