"""Tensors of a folder's *.safetensors files: read at once or one by one, written, and loaded exactly into a module.

Knows: names, shapes, files. Refuses to know: which model they are of, where a folder comes from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a *.safetensors file. kind: as the file says ("BF16", "F32", "I64", ...). Its values are read by
    `load`, and the file is closed again, so that its pages do not stay in memory."""

    file: Path
    name: str
    shape: tuple[int, ...]
    kind: str

    @property
    def whole_numbers(self) -> bool:
        return self.kind.startswith(("I", "U"))

    def load(self) -> Tensor:
        with safe_open(self.file, framework="pt") as handle:
            return handle.get_tensor(self.name)

    def numbers(self) -> Tensor:
        """float32, or as they are where they are whole numbers."""
        tensor = self.load()
        return tensor if self.whole_numbers else tensor.float()


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder's *.safetensors files, unread. Raises FileNotFoundError when there is none, ValueError
    when one is damaged."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no *.safetensors file.")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():
                    part = handle.get_slice(name)
                    tensors[name] = StoredTensor(file, name, tuple(part.get_shape()), part.get_dtype())
        except SafetensorError as error:
            raise ValueError(f"{file} is corrupt ({error}).") from None
    return tensors


def read_safetensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder's *.safetensors files. Raises FileNotFoundError when there is none."""
    return {name: stored.load() for name, stored in stored_tensors(folder).items()}


def check_fit(want: Mapping[str, Tensor], have: Mapping[str, Tensor | StoredTensor], source: str) -> None:
    """Raises ValueError that names, in one sentence, what is missing, unused or misshapen."""
    problems = [f"missing {n}" for n in want if n not in have] + [f"unused {n}" for n in have if n not in want]
    problems += [
        f"{n} is {list(have[n].shape)}, expected {list(want[n].shape)}"
        for n in want
        if n in have and tuple(have[n].shape) != tuple(want[n].shape)
    ]
    if problems:
        raise ValueError(f"{source} does not fit: {'; '.join(problems[:6])}{' ...' if len(problems) > 6 else ''}.")


def load_exactly(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """load_state_dict(assign=True) after check_fit."""
    check_fit(module.state_dict(), state, source)
    module.load_state_dict(state, assign=True)


def write_checkpoint(folder: Path, raw: dict, state: Mapping[str, Tensor], max_file_bytes: int | None = None) -> None:
    """Writes config.json (`raw`) and the weights as they are.

    Every file is written beside and renamed, config.json first, so that with one weight file a reader sees the old or
    the new checkpoint, never half of one. max_file_bytes splits the weights into model-0000i-of-0000n.safetensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    groups: list[dict[str, Tensor]] = [{}]
    for name, t in state.items():
        used = sum(x.nbytes for x in groups[-1].values())
        if max_file_bytes and groups[-1] and used + t.nbytes > max_file_bytes:
            groups.append({})
        groups[-1][name] = t
    n = len(groups)
    files = ["model.safetensors"] if n == 1 else [f"model-{i + 1:05}-of-{n:05}.safetensors" for i in range(n)]
    config = folder / "config.json"
    config.with_suffix(".part").write_text(json.dumps(raw, indent=2) + "\n")
    os.replace(config.with_suffix(".part"), config)
    for file, group in zip(files, groups):
        part = folder / (file + ".part")
        save_file(group, part, metadata={"format": "pt"})
        os.replace(part, folder / file)
    for stale in set(folder.glob("*.safetensors")) - {folder / f for f in files}:
        stale.unlink()
