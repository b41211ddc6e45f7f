"""Tensors of a folder's *.safetensors files, and their exact loading into a module.

Knows: names and shapes. Refuses to know: which model they are of, where a folder comes from.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from torch import Tensor, nn


def read_safetensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder's *.safetensors files. Raises FileNotFoundError when there is none."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no *.safetensors file.")
    tensors: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as handle:
            tensors.update({name: handle.get_tensor(name) for name in handle.keys()})
    return tensors


def load_exactly(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """load_state_dict(assign=True) that names, in one sentence, what is missing, unused or misshapen."""
    want = module.state_dict()
    problems = [f"missing {n}" for n in want if n not in state] + [f"unused {n}" for n in state if n not in want]
    problems += [
        f"{n} is {list(state[n].shape)}, expected {list(want[n].shape)}"
        for n in want
        if n in state and state[n].shape != want[n].shape
    ]
    if problems:
        raise ValueError(f"{source} does not fit: {'; '.join(problems[:6])}{' ...' if len(problems) > 6 else ''}.")
    module.load_state_dict(state, assign=True)
