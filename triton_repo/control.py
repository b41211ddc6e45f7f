"""What the launcher says to a running server over gRPC: drain, count, probe; and its metrics page.

Knows: dspark's control tensors and the ensemble's shortest request. Refuses to know: processes (server.py).
"""

from __future__ import annotations

import queue
import urllib.request

import numpy as np
import tritonclient.grpc as grpc
from tritonclient.utils import InferenceServerException

from .description import DSPARK, ENSEMBLE
from .runtime import ServerError

TRITON_TYPES = {"bool": "BOOL", "int32": "INT32", "uint64": "UINT64", "float32": "FP32"}


class Silence(ServerError):
    """No answer at all within the time given."""


def call(url: str, model: str, arrays: dict[str, np.ndarray], timeout: float) -> dict[str, np.ndarray]:
    """The first response of `model` to one request on a stream of its own.

    Raises ServerError when it answers with an error, Silence when it does not within `timeout` seconds (a dead stub
    lets callers hang).
    """
    inputs = []
    for name, array in arrays.items():
        inputs.append(grpc.InferInput(name, array.shape, TRITON_TYPES[array.dtype.name]))
        inputs[-1].set_data_from_numpy(array)
    answers: queue.Queue = queue.Queue()
    client = grpc.InferenceServerClient(url)
    try:
        client.start_stream(callback=lambda result, error: answers.put((result, error)))
        client.async_stream_infer(model, inputs)
        result, error = answers.get(timeout=timeout)
    except queue.Empty:
        raise Silence(f"{model} at {url} did not answer within {timeout:g} s.") from None
    except InferenceServerException as failure:
        raise ServerError(f"{model} at {url} cannot be asked: {failure.message()}") from None
    finally:
        client.stop_stream(cancel_requests=True)
        client.close()
    if error is not None:
        raise ServerError(f"{model} at {url} answered: {error.message()}")
    return {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}


def drain(url: str, on: bool = True, timeout: float = 5.0) -> int:
    """dspark refuses new requests (or, with on=False, takes them again); the number whose last response is not sent."""
    return int(call(url, DSPARK, {"drain": np.array([on])}, timeout)["active_requests"][0])


def counts(url: str, timeout: float = 5.0) -> tuple[int, int]:
    """(requests in flight, those of them that wait for a slot), asked of dspark: no lag, unlike the metrics page."""
    answer = call(url, DSPARK, {"stop": np.array([False])}, timeout)
    return int(answer["active_requests"][0]), int(answer["waiting_requests"][0])


def probe(url: str, timeout: float = 30.0) -> None:
    """One token through preprocessing, dspark and postprocessing: the only sign that all stubs live (the ready
    endpoints say 200 when one is dead). Raises ServerError."""
    request = {
        "input_ids": np.zeros(1, np.int32),
        "max_tokens": np.ones(1, np.int32),
        "ignore_eos": np.array([True]),
        "stream": np.array([False]),
    }
    if len(call(url, ENSEMBLE, request, timeout)["output_ids"]) != 1:
        raise ServerError(f"{ENSEMBLE} at {url} answered the probe without its one token.")


def metrics(url: str, timeout: float = 5.0) -> dict[str, float]:
    """The samples of the metrics page, by name with labels. Raises OSError when it cannot be read."""
    with urllib.request.urlopen(f"http://{url}/metrics", timeout=timeout) as page:
        lines = page.read().decode().splitlines()
    samples = (line.rsplit(" ", 1) for line in lines if line and line[0] != "#")
    return {name: float(value) for name, value in samples}
