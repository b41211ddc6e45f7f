"""What an engine is called with, checked against what its graph declares.

Knows: names, dtypes and shapes with symbols. Refuses to know: runtimes, where an array lies.
"""

from __future__ import annotations

import numpy as np

Declared = tuple[str, np.dtype, tuple[int | str, ...]]


def sizes_of(engine: str, inputs: list[Declared], feeds: dict) -> dict[str, int]:
    """{symbol: its size in this call}. `feeds` may hold more than the inputs.

    Raises ValueError, one sentence, for another dtype or shape, or a symbol with two sizes."""
    sizes: dict[str, int] = {}
    for name, dtype, shape in inputs:
        array = feeds[name]
        if array.dtype != dtype or array.ndim != len(shape):
            raise ValueError(f"{engine}: {name} is {array.dtype} {list(array.shape)}, expected {dtype} {list(shape)}.")
        for dim, size in zip(shape, array.shape):
            if (sizes.setdefault(dim, size) if isinstance(dim, str) else dim) != size:
                raise ValueError(f"{engine}: {name} is {list(array.shape)}, expected {list(shape)} with {sizes}.")
    return sizes


def check_rows(engine: str, first_row: int, sizes: dict[str, int], rows: int, capacity: int) -> None:
    """Raises ValueError when a call's requests (R of `sizes`, from first_row on) or its C do not fit the caches."""
    R, C = sizes["R"], sizes["C"]
    if first_row < 0 or first_row + R > rows or C != capacity:
        raise ValueError(
            f"{engine}: rows {first_row}..{first_row + R - 1} with C = {C} do not fit the caches ({rows} rows, "
            f"capacity {capacity})."
        )
