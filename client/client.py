"""gRPC streaming: one connection a stream, a queue between tritonclient's thread and the reader.

Knows: tensor names and dtypes, deadlines, how a stream ends. Refuses to know: the command line.
"""

from __future__ import annotations

import json
import queue
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tritonclient.grpc as grpc
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

Prompt = str | Sequence[dict] | Sequence[int]

# parameter -> Triton dtype, numpy dtype
PARAMETERS = {
    "raw": ("BOOL", np.bool_),
    "stop_words": ("BYTES", np.object_),
    "max_tokens": ("INT32", np.int32),
    "min_tokens": ("INT32", np.int32),
    "temperature": ("FP32", np.float32),
    "top_k": ("INT32", np.int32),
    "top_p": ("FP32", np.float32),
    "min_p": ("FP32", np.float32),
    "repetition_penalty": ("FP32", np.float32),
    "presence_penalty": ("FP32", np.float32),
    "frequency_penalty": ("FP32", np.float32),
    "bad_words": ("BYTES", np.object_),
    "logit_bias": ("BYTES", np.object_),  # a dict {token id: bias}; JSON on the wire
    "seed": ("UINT64", np.uint64),
    "ignore_eos": ("BOOL", np.bool_),
    "return_log_probs": ("BOOL", np.bool_),
    "speculative": ("BOOL", np.bool_),
    "accept": ("BYTES", np.object_),
    "threshold": ("FP32", np.float32),
}


KINDS = {"stop_words": "a list of texts", "bad_words": "a list of texts", "logit_bias": "a dict {token id: bias}"}
FORMATS = {"INT32": "i", "FP32": "f"}
VECTORS = ("output_ids", "accepted_per_position", "output_log_probs")


class ClientError(RuntimeError):
    """The server refused the request, did not answer in time, or cannot be reached: one sentence."""


@dataclass(frozen=True)
class Chunk:
    """What one response holds: new text and ids; the totals run from the request's start.

    finish_reason is "" until the last chunk: stop, length or cancelled. accepted_per_position[k]: verify rounds in
    which draft token k was accepted; total_draft_tokens: draft tokens that the target verified. With return_log_probs,
    output_log_probs holds one for each of output_ids and cum_log_probs their sum over the whole answer so far: of the
    target's own distribution, before temperature, penalties and filters.
    """

    text: str
    output_ids: tuple[int, ...]
    finish_reason: str
    index: int
    num_input_tokens: int
    num_output_tokens: int
    num_rounds: int
    total_draft_tokens: int
    total_accepted_draft_tokens: int
    acceptance_rate: float
    accepted_per_position: tuple[int, ...]
    output_log_probs: tuple[float, ...] = ()
    cum_log_probs: float = 0.0

    @classmethod
    def read(cls, response: service_pb2.ModelInferResponse) -> "Chunk":
        """One pass over the response's raw tensors; as_numpy() would search its outputs once for each name."""
        values = {}
        for output, raw in zip(response.outputs, response.raw_output_contents):
            if output.datatype == "BYTES":
                values[output.name] = raw[4:].decode()  # one element: its length, then its bytes
            else:
                numbers = tuple(memoryview(raw).cast(FORMATS[output.datatype]))
                values[output.name] = numbers if output.name in VECTORS else numbers[0]
        values["text"] = values.pop("text_output")
        return cls(**values)


class _Connection:
    """A gRPC stream, and the queue that its answers go to. One request at a time."""

    def __init__(self, url: str, timeout: float | None):
        self.answers = answers = queue.Queue()  # not self: the callback must not keep a forgotten stream alive
        self.grpc = grpc.InferenceServerClient(url)
        self.grpc.start_stream(lambda result, error: answers.put((result, error)), stream_timeout=timeout)

    @property
    def fresh(self) -> bool:
        """Nothing has come since its last request ended: it did not break."""
        return self.answers.empty()

    def close(self, *, cancel: bool = False) -> None:
        stream = self.grpc._stream
        self.grpc.stop_stream(cancel_requests=cancel)
        if cancel and stream is not None:  # tritonclient would leave the thread that waits for requests behind
            stream._request_queue.put(None)
        self.grpc.close()


class Client:
    """Requests to one server. Streams are independent: any number may run at once, from any threads.

    `with Client(url) as client:` keeps the connections of streams that ended for the next ones (4 ms of CPU time
    a request) until the block's end; without it every stream has its own.

    timeout: seconds that a whole request may take (None = no bound); stall: seconds without any response, queueing and
    prefill included, after which the server counts as dead. A dead model leaves callers waiting, so keep one of them.
    """

    def __init__(self, url: str = "127.0.0.1:8001", *, timeout: float | None = 600.0, stall: float | None = 120.0):
        self.url, self.timeout, self.stall = url, timeout, stall
        self._kept: list[_Connection] | None = None  # list.append and list.pop are atomic

    def __enter__(self) -> "Client":
        self._kept = []
        return self

    def __exit__(self, *_: object) -> None:
        kept, self._kept = self._kept, None
        for connection in kept:
            connection.close()

    def _connect(self) -> _Connection:
        while self._kept:
            try:
                connection = self._kept.pop()
            except IndexError:
                break
            if connection.fresh:
                return connection
            connection.close(cancel=True)
        # A kept connection outlives its first request's deadline, which is then watched here alone.
        return _Connection(self.url, self.timeout if self._kept is None else None)

    def _give_back(self, connection: _Connection) -> None:
        kept = self._kept
        if kept is None:
            connection.close()
        else:
            kept.append(connection)

    def stream(self, prompt: Prompt, **parameters: Any) -> "Stream":
        """Sends a request; iterate for its chunks. prompt: text (the chat template is applied, unless raw=True), a list
        of {"role", "content"} messages, or a list of token ids. parameters: those of PARAMETERS."""
        return Stream(self, _inputs(prompt, parameters, stream=True))

    def generate(self, prompt: Prompt, **parameters: Any) -> Chunk:
        """The whole answer in one chunk. Raises ClientError."""
        with Stream(self, _inputs(prompt, parameters, stream=False)) as stream:
            chunk = next(stream)
            if self._kept is not None:  # its end may be a response of its own: with it the connection can be kept
                for _ in stream:
                    pass
            return chunk


class Stream(Iterator[Chunk]):
    """The chunks of one request, in order. Raises ClientError. Closing it early cancels the request on the server."""

    def __init__(self, client: Client, inputs: list[grpc.InferInput]):
        self._client, self._over = client, False
        self._deadline = None if client.timeout is None else time.monotonic() + client.timeout
        self._connection = client._connect()
        self._answers = self._connection.answers
        try:
            self._connection.grpc.async_stream_infer("ensemble", inputs, enable_empty_final_response=True)
        except InferenceServerException as failure:  # the stream broke already; why, comes through the callback
            try:
                error = self._answers.get(timeout=1.0)[1] or failure
            except queue.Empty:
                error = failure
            self.close()
            raise ClientError(self._sentence(error)) from None

    def __next__(self) -> Chunk:
        while not self._over:
            result, error = self._take()
            if error is not None:
                self.close()
                raise ClientError(self._sentence(error))
            response = result.get_response()
            # The final flag sits on the last data response or on an empty one after it.
            final = response.parameters["triton_final_response"].bool_param
            chunk = Chunk.read(response) if response.outputs else None
            if final:
                self._finish()
            if chunk is not None:
                return chunk
        raise StopIteration

    def close(self) -> None:
        """Cancels what still runs. May be called at any time, more than once."""
        if not self._over:
            self._over = True
            self._connection.close(cancel=True)

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_connection", None) is not None:
            self.close()

    def _finish(self) -> None:
        self._over = True
        self._client._give_back(self._connection)

    def _take(self) -> tuple[grpc.InferResult | None, InferenceServerException | None]:
        left = None if self._deadline is None else max(self._deadline - time.monotonic(), 0.0)
        bounds = [s for s in (left, self._client.stall) if s is not None]
        try:
            return self._answers.get(timeout=min(bounds) if bounds else None)
        except queue.Empty:
            self.close()
            stalled = min(bounds) != left
            what = f"{self._client.stall:g} s without a response" if stalled else f"{self._client.timeout:g} s"
            raise ClientError(f"The server at {self._client.url} did not finish: gave up after {what}.") from None

    def _sentence(self, error: InferenceServerException) -> str:
        status, message = str(error.status() or ""), error.message().strip()
        if "UNAVAILABLE" in status:
            return f"The server at {self._client.url} cannot be reached: {message}"
        if "DEADLINE" in status:
            return f"The server at {self._client.url} did not finish: gave up after {self._client.timeout:g} s."
        return message.removeprefix("in ensemble 'ensemble', ")


def _inputs(prompt: Prompt, parameters: dict[str, Any], *, stream: bool) -> list[grpc.InferInput]:
    """Raises ClientError for an unknown parameter or a value that does not fit its dtype."""
    inputs = [_prompt(prompt), _tensor("stream", "BOOL", np.array([stream]))]
    for name, value in parameters.items():
        if name not in PARAMETERS:
            raise ClientError(f"{name} is not a parameter; the parameters are {', '.join(PARAMETERS)}.")
        if value is None:
            continue
        triton, dtype = PARAMETERS[name]
        if name == "logit_bias" and isinstance(value, Mapping):
            value = json.dumps({str(token): bias for token, bias in value.items()})
        values = [value] if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) else list(value)
        if triton == "BYTES":
            if not all(isinstance(v, (str, bytes)) for v in values):
                raise ClientError(f"{name} is {value!r}; it must be {KINDS.get(name, 'text')}.")
            array = _bytes(values)
        else:
            try:
                array = np.array(values, dtype)
                fits = len(values) == 1 and (triton == "FP32" or array[0] == value)
            except (OverflowError, ValueError, TypeError):
                fits = False
            if not fits:
                raise ClientError(f"{name} is {value!r}; it must be one {triton} value.")
        inputs.append(_tensor(name, triton, array))
    return inputs


def _prompt(prompt: Prompt) -> grpc.InferInput:
    if isinstance(prompt, (str, bytes)):
        return _tensor("text_input", "BYTES", _bytes([prompt]))
    prompt = list(prompt)
    if prompt and isinstance(prompt[0], dict):
        return _tensor("messages", "BYTES", _bytes([json.dumps(prompt, ensure_ascii=False)]))
    return _tensor("input_ids", "INT32", np.array(prompt, np.int32))


def _bytes(values: Sequence[str | bytes]) -> np.ndarray:
    encoded = [value.encode() if isinstance(value, str) else value for value in values]
    return np.array(encoded, np.object_)


def _tensor(name: str, triton: str, array: np.ndarray) -> grpc.InferInput:
    tensor = grpc.InferInput(name, array.shape, triton)
    tensor.set_data_from_numpy(array)
    return tensor
