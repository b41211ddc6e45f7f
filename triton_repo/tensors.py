"""Arrays and JSON at the borders: reading a request's tensors, and what our own models say to each other.

Knows: numpy and the tensor names of description.py. Refuses to know: what a value means; Triton (pb_utils comes in).
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields

import numpy as np
from decoding.request import RequestError, SamplingParams

from .responses import Round

DEFAULT_MAX_TOKENS = 256
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
    return one(json.dumps({name: value for name, value in asdict(params).items() if value is not None}), np.object_)


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

