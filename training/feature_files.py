"""Features of batches kept in files: the bounded disk cache of one run, and what the cached recipe would write instead.

Knows: files, sizes, checksums. Refuses to know: models, what the tensors mean, when they are asked for.

The cached recipe is the reference's: DeepSpec writes the features of all data to disk first, then trains from the files
(scripts/data/prepare_target_cache.py and deepspec/data/target_cache_dataset.py of github.com/deepseek-ai/DeepSpec,
whose scripts/data/README.md gives about 38 TB for its Qwen3-4B setting).
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

TOKEN_BYTES = 4  # a token id in a shard
CACHED_MASKS = 2  # attention and loss mask, a byte each
CACHED_INDEX = 56  # a sample's record in samples.idx: an int64, two int32, five int64


def cached_recipe_bytes(lengths: Iterable[int], hidden_size: int, layers: int) -> int:
    """What the cached recipe writes for sequences of these lengths: for a token its id, two masks, and `layers` + 1
    hidden states in bf16 (the feature layers, and the one after the final norm); for a sequence an index record."""
    lengths = list(lengths)
    per_token = TOKEN_BYTES + CACHED_MASKS + 2 * hidden_size * (layers + 1)
    return sum(lengths) * per_token + len(lengths) * CACHED_INDEX


class FeatureFiles:
    """At most `limit` bytes of files in `folder`; `used` now, `peak` at most so far.

    The files are of one run: those that a killed run left are removed at the start, `remove` is called at the end. What
    was not written here, or reads as something else, is not there. What is full stays as it is: batches come round in
    turn, so nothing that could be evicted is needed later than what would replace it. A disk that is full ends the
    writing, not the run.
    """

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = Path(folder), limit
        self.used = self.peak = 0
        self.sums: dict[int, tuple[int, int]] = {}  # key: (bytes, checksum)
        self.lock = threading.Lock()
        for file in self.folder.glob("features-*.safetensors"):
            file.unlink()

    def file(self, key: int) -> Path:
        return self.folder / f"features-{key}.safetensors"

    def get(self, key: int) -> dict[str, Tensor] | None:
        """What was put under the key, or None."""
        if key not in self.sums:
            return None
        try:
            data = self.file(key).read_bytes()
            if (len(data), zlib.crc32(data)) == self.sums[key]:
                return load(data)
        except (OSError, SafetensorError):
            pass
        self.forget(lambda other: other == key)
        return None

    def put(self, key: int, tensors: dict[str, Tensor]) -> bool:
        """Keeps the tensors where there is room. False: there is none."""
        data = save({name: t.contiguous() for name, t in tensors.items()})
        with self.lock:
            if self.used + len(data) > self.limit:
                return False
            self.used += len(data)
            self.peak = max(self.peak, self.used)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.file(key).write_bytes(data)
        except OSError:
            self._unlink(key)
            with self.lock:
                self.used -= len(data)
                self.limit = self.used
            return False
        self.sums[key] = (len(data), zlib.crc32(data))
        return True

    def forget(self, which: Callable[[int], bool] = lambda key: True) -> None:
        """Removes the files of the keys that are meant."""
        for key in [key for key in self.sums if which(key)]:
            size, _ = self.sums.pop(key)
            self._unlink(key)
            with self.lock:
                self.used -= size

    def _unlink(self, key: int) -> None:
        try:
            self.file(key).unlink()
        except OSError:
            pass

    def remove(self) -> None:
        """Removes all files, and the folder where it is empty then."""
        self.forget()
        try:
            self.folder.rmdir()
        except OSError:
            pass
