"""What a run says while it goes on: log.jsonl, and TensorBoard's events beside it where they are asked for.

Knows: files, which numbers of a line become curves. Refuses to know: what the numbers mean.
"""

from __future__ import annotations

import json
from pathlib import Path


class RunLog:
    """Lines go to OUT/log.jsonl, their numbers to OUT/tensorboard under `step`. out None (another rank) writes nothing.

    A disk that is full does not end the run: lines wait, and are written when there is room again.
    Raises ValueError when TensorBoard is asked for and not installed.
    """

    def __init__(self, out: Path | None, tensorboard: bool = False, step: int = 0):
        self.file = None if out is None else (out / "log.jsonl").open("ab", buffering=0)
        self.waiting = b""
        self.board = board_of(out / "tensorboard", step) if tensorboard and out is not None else None

    def write(self, line: dict) -> None:
        if self.file is None:
            return
        self.waiting += json.dumps(line).encode() + b"\n"
        try:
            while self.waiting:
                self.waiting = self.waiting[self.file.write(self.waiting) :]
            if self.board is not None:
                for name, value in scalars(line):
                    self.board.add_scalar(name, value, line["step"])
        except OSError:
            pass

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        if self.board is not None:
            try:
                self.board.close()
            except OSError:
                pass


def scalars(line: dict, under: str = "") -> list[tuple[str, float]]:
    """The numbers of a line as (name, value); those of a list and of a line inside are named name/0, name/..."""
    found: list[tuple[str, float]] = []
    for name, value in line.items():
        if isinstance(value, list):
            value = {str(i): v for i, v in enumerate(value)}
        if isinstance(value, dict):
            found += scalars(value, f"{under}{name}/")
        elif value is not None and name != "step":
            found.append((under + name, float(value)))
    return found


def board_of(folder: Path, step: int):
    """A SummaryWriter that forgets what an earlier run wrote past `step`."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        sentence = "tensorboard is asked for and not installed: pip install 'dspark-triton[tensorboard]'."
        raise ValueError(sentence) from None
    return SummaryWriter(str(folder), purge_step=step + 1)
