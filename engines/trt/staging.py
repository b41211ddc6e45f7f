"""The inputs of one engine on their way to the GPU: gathered in pinned memory, sent in one copy.

Knows: where each input of a call lies in one block, in host and in device memory alike. Refuses to know: what an input
means.

The block grows when a call needs more (then `generation` changes, and addresses with it); a call of sizes that were
there before allocates nothing.
"""

from __future__ import annotations

import numpy as np
from numpy import ndarray

from ..arrays import Rows
from .array import DeviceArray
from .cuda import Cuda, aligned


class Staging:
    """`what` names it in messages; `size`: bytes to begin with."""

    def __init__(self, cuda: Cuda, what: str, size: int):
        self.cuda, self.what, self.generation = cuda, what, 0
        self.sent = cuda.event()
        self.size = self.address = 0
        self._grow(size)

    def _grow(self, size: int) -> None:
        """Memory for `size` bytes; raises DeviceMemoryError and is then empty."""
        if self.size:
            self.cuda.synchronize()
            address, pinned, self.size, self.generation = self.address, self.pinned, 0, self.generation + 1
            self.cuda.free(address)
            self.cuda.free_pinned(pinned)
        size = aligned(max(size, 1))
        pinned = self.cuda.allocate_pinned(size, self.what)
        try:
            self.address = self.cuda.allocate(size, self.what)
        except Exception:
            self.cuda.synchronize()
            self.cuda.free_pinned(pinned)
            raise
        self.pinned, self.size = pinned, size

    def send(self, host: dict[str, ndarray], device: dict[str, Rows]) -> dict[str, int]:
        """{input: its address on the GPU}. host: numpy arrays, device: rows of arrays on the GPU (or of numpy's); the
        copies are queued. Waits until the last call's have left."""
        places, offset = {}, 0
        for name, array in (*host.items(), *device.items()):
            places[name] = offset
            offset = aligned(offset + int(np.prod(array.shape)) * array.dtype.itemsize)
        if offset > self.size:
            self._grow(1 << (offset - 1).bit_length())
        self.cuda.wait(self.sent, self.what)
        ends = [places[name] + array.nbytes for name, array in host.items()]
        for (name, array), end in zip(host.items(), ends):
            self.pinned[places[name] : end].view(array.dtype).reshape(array.shape)[...] = array
        upload = max(ends, default=0)
        for name, rows in device.items():
            upload = max(upload, self._write(places[name], rows))
        if upload:
            self.cuda.upload(self.address, self.pinned, upload)
        for name, rows in device.items():
            self._gather(self.address + places[name], rows)
        self.cuda.record(self.sent)
        return {name: self.address + place for name, place in places.items()}

    def _write(self, at: int, rows: Rows) -> int:
        """numpy's pieces into pinned memory; one past the last of their bytes, 0 without any."""
        last = 0
        for piece in rows.pieces:
            end = at + piece.nbytes
            if isinstance(piece, ndarray) and piece.size:
                self.pinned[at:end].view(piece.dtype).reshape(piece.shape)[...] = piece
                last = end
            at = end
        return last

    def _gather(self, at: int, rows: Rows) -> None:
        """Copies the pieces on the GPU next to each other; neighbours in memory in one go."""
        source = length = 0
        for piece in rows.pieces:
            address = piece.address if isinstance(piece, DeviceArray) else 0
            if length and address != source + length:
                self.cuda.copy(at, source, length)
                at, length = at + length, 0
            if not address:
                at += piece.nbytes
                continue
            if not length:
                source = address
            length += piece.nbytes
        if length:
            self.cuda.copy(at, source, length)
