"""Random generators by (seed, purpose, number), so that a run is a function of its seed and nothing random is saved.

Knows: mixing of integers. Refuses to know: what is drawn.
"""

from __future__ import annotations

import torch


def generator_for(seed: int, purpose: str, number: int) -> torch.Generator:
    """A generator for one purpose and step."""
    mixed = hash_words(seed, number, *purpose.encode())
    return torch.Generator().manual_seed(mixed)


def hash_words(*words: int) -> int:
    """63-bit mixing (splitmix64) of a few integers; unlike hash(), the same in every process."""
    state = 0
    for word in words:
        state = (state + word + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1
