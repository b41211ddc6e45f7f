"""The same load through Triton: timed requests over gRPC streams, one connection a user.

Knows: the ensemble's tensors as a client sees them. Refuses to know: engines, decoding.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import tritonclient.grpc as grpc

from .common import Acceptance, Item
from .inprocess import Run, Timing

MODEL = "ensemble"
TIMEOUT = 300.0  # seconds without any response: a dead stub lets callers wait for ever


@dataclass(frozen=True)
class Answer:
    """One finished request as the client saw it: text, timing with token ids, and the server's totals."""

    text: str
    timing: Timing
    num_input_tokens: int
    num_rounds: int
    drafted: int
    accepted_per_position: tuple[int, ...]

    @property
    def tok_s(self) -> float:
        """Output tokens a second of the whole request, from sending it to its last token."""
        return len(self.timing.tokens) / (self.timing.arrivals[-1][0] - self.timing.submitted)

    @property
    def acceptance_length(self) -> float:
        """Tokens per target pass after the prefill, the bonus token included."""
        return 1 + sum(self.accepted_per_position) / self.num_rounds if self.num_rounds else 1.0

    @property
    def per_position(self) -> list[float]:
        """Share of the rounds in which draft position k was accepted."""
        return [n / self.num_rounds for n in self.accepted_per_position] if self.drafted else []


class Remote:
    """One connection with one stream; one request at a time. Use as a context manager."""

    def __init__(self, url: str):
        self._client, self._answers = grpc.InferenceServerClient(url), queue.Queue()

    def __enter__(self) -> "Remote":
        self._client.start_stream(lambda result, error: self._answers.put((result, error)))
        return self

    def __exit__(self, *_: object) -> None:
        self._client.stop_stream(cancel_requests=True)
        self._client.close()

    def ask(self, messages: Sequence[dict], *, max_tokens: int, speculative: bool = True, temperature: float = 0.0,
            seed: int = 0, on_text: Callable[[str], None] = lambda text: None) -> Answer:
        """Sends one conversation and reads its stream to the end.

        Raises RuntimeError with the server's sentence when it refuses, or when nothing comes for TIMEOUT seconds.
        """
        inputs = [
            tensor("messages", np.array([json.dumps(list(messages)).encode()], object), "BYTES"),
            tensor("max_tokens", np.array([max_tokens], np.int32), "INT32"),
            tensor("temperature", np.array([temperature], np.float32), "FP32"),
            tensor("seed", np.array([seed], np.uint64), "UINT64"),
            tensor("speculative", np.array([speculative]), "BOOL"),
            tensor("stream", np.array([True]), "BOOL"),
        ]
        timing, text = Timing(time.perf_counter()), ""
        self._client.async_stream_infer(MODEL, inputs)
        while not timing.finish_reason:
            try:
                result, error = self._answers.get(timeout=TIMEOUT)
            except queue.Empty:
                raise RuntimeError(f"The server sent nothing for {TIMEOUT:g} s.") from None
            if error is not None:
                raise RuntimeError(error.message())
            now = time.perf_counter()
            timing.add(now, result.as_numpy("output_ids"))
            piece = result.as_numpy("text_output")[0].decode()
            text += piece
            on_text(piece)
            timing.finish_reason = result.as_numpy("finish_reason")[0].decode()
        return Answer(
            text, timing,
            num_input_tokens=int(result.as_numpy("num_input_tokens")[0]),
            num_rounds=int(result.as_numpy("num_rounds")[0]),
            drafted=int(result.as_numpy("total_draft_tokens")[0]),
            accepted_per_position=tuple(int(n) for n in result.as_numpy("accepted_per_position")),
        )


def tensor(name: str, values: np.ndarray, dtype: str) -> grpc.InferInput:
    """values [n] as an input of a Triton dtype."""
    made = grpc.InferInput(name, list(values.shape), dtype)
    made.set_data_from_numpy(values)
    return made


def load(url: str, items: Sequence[Item], *, concurrency: int, max_tokens: int, speculative: bool) -> Run:
    """Answers all items, greedy, `concurrency` users each with a stream of its own. Raises what a user's thread raised."""
    todo: queue.SimpleQueue = queue.SimpleQueue()
    for i in range(len(items)):
        todo.put(i)
    answers: list[Answer | None] = [None] * len(items)
    failures: list[Exception] = []
    ready = threading.Barrier(concurrency + 1)

    def user() -> None:
        try:
            with Remote(url) as remote:
                ready.wait()
                while not failures:
                    i = todo.get_nowait()
                    answers[i] = remote.ask(items[i].messages, max_tokens=max_tokens, speculative=speculative)
        except queue.Empty:
            pass
        except Exception as error:
            failures.append(error)
            ready.abort()

    threads = [threading.Thread(target=user, daemon=True) for _ in range(concurrency)]
    for thread in threads:
        thread.start()
    try:
        ready.wait()
    except threading.BrokenBarrierError:
        pass
    started = time.perf_counter()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    seconds = time.perf_counter() - started
    acceptance = Acceptance()
    for answer in answers:
        acceptance.rounds += answer.num_rounds
        acceptance.verified += answer.drafted
        acceptance.accepted += sum(answer.accepted_per_position)
    return Run(seconds, [a.timing for a in answers], acceptance)
