"""Arrays and JSON at the borders: reading a request's tensors, and what our own models say to each other.

Knows: numpy and the tensor names of description.py. Refuses to know: what a value means; Triton (pb_utils comes in).
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import fields

import numpy as np
from decoding.request import RequestError, SamplingParams

from .responses import Round

DEFAULT_MAX_TOKENS = 256
NUMPY = {"STRING": np.object_, "INT32": np.int32, "FP32": np.float32}
KEPT = 1024  # tensors of a Writer
FIELDS = {field.name for field in fields(SamplingParams)}


def read(pb_utils, request, names: list[str]) -> dict[str, np.ndarray]:
    """The tensors that the request has, by name. Raises RequestError for bytes that are no Triton string tensor."""
    arrays = {}
    for name in names:
        tensor = pb_utils.get_input_tensor_by_name(request, name)
        if tensor is None:
            continue
        try:
            arrays[name] = tensor.as_numpy()
        except Exception as error:
            raise RequestError(f"{name} cannot be read: {error}.") from None
    return arrays


def write(pb_utils, arrays: dict[str, np.ndarray]) -> list:
    return [pb_utils.Tensor(name, array) for name, array in arrays.items()]


class Writer:
    """Values to Triton tensors: a scalar to [1], a list to [n]. A tensor costs some 10 us between two target passes, and most
    of a response's are small numbers that come again: those are made once. No response's tensor is ever written to.

    outputs: description.Tensor of each name. rare: names whose values seldom come again (but "" and 0 do).
    """

    def __init__(self, pb_utils, outputs, rare: Collection[str] = ()):
        self._make = pb_utils.Tensor
        self._kinds = {t.name: (NUMPY[t.dtype], t.name not in rare) for t in outputs}
        self._made: dict[tuple, object] = {}

    def __call__(self, values: dict[str, object]) -> list:
        return [self._tensor(name, value) for name, value in values.items()]

    def _tensor(self, name: str, value):
        dtype, comes_again = self._kinds[name]
        if isinstance(value, list):
            if value:
                return self._make(name, np.array(value, dtype))
            value = ()
        if value and not comes_again:
            return self._make(name, one(value, dtype))
        if (made := self._made.get((name, value))) is None:
            if len(self._made) >= KEPT:
                self._made.clear()
            made = self._make(name, np.zeros(0, dtype) if value == () else one(value, dtype))
            self._made[name, value] = made
        return made


def sentence(error: Exception | str) -> str:
    """One line that Triton can carry: valid Unicode, no line breaks, at most 400 characters."""
    return " ".join(str(error).encode("utf-8", "replace").decode().split())[:400]


def one(value, dtype) -> np.ndarray:
    """A [1] array. Strings are BYTES: np.object_."""
    if dtype is np.object_:
        return np.array([value.encode() if isinstance(value, str) else value], np.object_)
    return np.array([value], dtype)


def pack_round(r: Round) -> np.ndarray:
    """One round of one request as dspark's output: the fields of Round in their order, a JSON list, [bytes] uint8."""
    return np.frombuffer(json.dumps(list(vars(r).values()), separators=(",", ":")).encode(), np.uint8)


def unpack_round(array: np.ndarray) -> Round:
    return Round(*json.loads(array.tobytes()))


def stop_arrays(uid: int) -> dict[str, np.ndarray]:
    return {"stop": one(True, np.bool_), "uid": one(uid, np.uint64)}


def pack_params(params: SamplingParams) -> np.ndarray:
    """SamplingParams as dspark's input: a JSON object of its fields."""
    return one(json.dumps({name: value for name, value in vars(params).items() if value is not None}), np.object_)


def engine_request(arrays: dict[str, np.ndarray]) -> tuple[tuple[int, ...], SamplingParams]:
    """dspark's request: the prompt's token ids and how to decode. Raises RequestError when there is no input_ids,
    or for params that are not a JSON object of SamplingParams' fields (their values are checked when the request
    is added)."""
    if "input_ids" not in arrays:
        raise RequestError("input_ids is missing; dspark takes token ids (text goes to the ensemble).")
    try:
        given = json.loads(arrays["params"].reshape(-1)[0]) if "params" in arrays else {}
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        raise RequestError("params is not a JSON object.")
    for name in given:
        if name not in FIELDS:
            raise RequestError(f"params holds {name!r}; its fields are {', '.join(sorted(FIELDS))}.")
    given.setdefault("max_tokens", DEFAULT_MAX_TOKENS)
    return tuple(arrays["input_ids"].reshape(-1).tolist()), SamplingParams(**given)

