"""Arrays at the border: reading a request's tensors, and the arrays of each response.

Knows: numpy and the tensor names of description.py. Refuses to know: what a value means; Triton (pb_utils comes in).
"""

from __future__ import annotations

import numpy as np
from decoding.request import RequestError, SamplingParams

from .service import Round


PARAMS = ("max_tokens", "temperature", "seed", "ignore_eos", "speculative")
DEFAULT_MAX_TOKENS = 256


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


def round_arrays(r: Round) -> dict[str, np.ndarray]:
    """One round of one request, as dspark's outputs."""
    return {
        "output_ids": r.output_ids,
        "finish_reason": one(r.finish_reason, np.object_),
        "index": one(r.index, np.int32),
        "num_input_tokens": one(r.num_input_tokens, np.int32),
        "num_output_tokens": one(r.num_output_tokens, np.int32),
        "num_rounds": one(r.num_rounds, np.int32),
        "total_draft_tokens": one(r.total_draft_tokens, np.int32),
        "total_accepted_draft_tokens": one(r.total_accepted_draft_tokens, np.int32),
        "accepted_per_position": r.accepted_per_position,
        "uid": one(r.uid, np.uint64),
        "settings": one(r.settings, np.object_),
    }


def stop_arrays(uid: int) -> dict[str, np.ndarray]:
    return {"stop": one(True, np.bool_), "uid": one(uid, np.uint64)}


def engine_request(arrays: dict[str, np.ndarray]) -> tuple[tuple[int, ...], SamplingParams]:
    """dspark's request: the prompt's token ids and how to decode. Raises RequestError when there is no input_ids."""
    if "input_ids" not in arrays:
        raise RequestError("input_ids is missing; dspark takes token ids (text goes to the ensemble).")
    scalars = {name: arrays[name].reshape(-1)[0].item() for name in PARAMS if name in arrays}
    scalars.setdefault("max_tokens", DEFAULT_MAX_TOKENS)
    return tuple(arrays["input_ids"].reshape(-1).tolist()), SamplingParams(**scalars)
