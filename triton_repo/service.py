"""Requests in: the engine thread decodes, the sender thread (sender.py) answers.

Knows: the decoding loop's interface (only the engine thread touches it). Refuses to know: Triton, how a response comes
about, what a round does (decoding).

Why two threads: sending blocks 0.3-0.4 ms a response, time that belongs to the next round.
"""

from __future__ import annotations

import itertools
import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable

from decoding.request import Request, RequestError, SamplingParams

from .ledger import INSTANCES
from .responses import Observer, Progress, Sink, Step
from .sender import Sender

log = logging.getLogger(__name__)


class Traces(list):
    """An observer of the loop that keeps what it is shown until the end of the step."""

    wants_confidence = False

    def round(self, trace) -> None:
        self.append(trace)


class Service:
    """Runs a loop until closed. Threads start at once. A request without settings is answered round by round.

    make_loop(observer) -> decoding Loop that shows its rounds to `observer` as well; called again after a round failed,
    since the failed loop's state is unknown.
    block_size, observer, interval, cores: the sender's (sender.py). progress: for requests that go on to postprocessing
    (those with settings), and what is to be known of other instances: `stop`, `drain` and `counts` are then of all of
    them.
    on_close: called by close() when both threads have ended.
    """

    def __init__(
        self,
        make_loop: Callable[[Traces], object],
        *,
        block_size: int,
        observer: Observer | None = None,
        progress: Progress | None = None,
        interval: float = 0.0,
        cores: int = 1,
        on_close: Callable[[], None] = lambda: None,
    ):
        self._make_loop, self._progress, self._on_close = make_loop, progress, on_close
        self._traces, self._probes = Traces(), 0
        self._loop = make_loop(self._traces)
        self._commands: queue.SimpleQueue = queue.SimpleQueue()
        self._sender = Sender(
            block_size=block_size,
            observer=observer,
            progress=progress,
            interval=interval,
            cores=cores,
            forget=self._forget,
            cancel=lambda uid: self._commands.put(("cancel", uid)),
        )
        # Of this process: a restarted engine never repeats one. The lowest bits name the instance.
        instance = 0 if progress is None else progress.instance
        self._uids = itertools.count(secrets.randbits(48) << 8 | instance, INSTANCES)
        self._lock = threading.Lock()
        self._in_flight: set[int] = set()
        self._waiting, self._draining = 0, False
        self._threads = [
            threading.Thread(target=self._decode, name="dspark-engine", daemon=True),
            threading.Thread(target=self._sender.run, name="dspark-sender", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    # Called by any thread.

    def submit(self, prompt_ids: tuple[int, ...], params: SamplingParams, sink: Sink, settings: str = "") -> int:
        """Queues a request; its answers (or its refusal) go to the sink. Returns the uid that `stop` takes.

        Raises RequestError when the server is draining or its engine thread is gone.
        """
        if not self._threads[0].is_alive():
            raise RequestError("The engine thread has stopped; the model must be loaded again.")
        uid = next(self._uids)
        with self._lock:
            if self._draining if self._progress is None else self._progress.draining:
                raise RequestError("The server is draining and takes no new requests.")
            self._in_flight.add(uid)
            if self._progress is not None:
                self._progress.begin(uid)
            self._tell_siblings()
        self._commands.put(("add", uid, prompt_ids, params, sink, settings, time.perf_counter()))
        return uid

    def stop(self, uid: int) -> None:
        """Cancels a request before its next round, another instance's a moment later; an unknown or finished uid is
        ignored."""
        if self._progress is None or self._progress.owns(uid):
            self._commands.put(("cancel", uid))
        else:
            self._progress.stop(uid)

    def drain(self, on: bool = True) -> None:
        """Refuses new requests from now on (or takes them again)."""
        with self._lock:
            if self._progress is None:
                self._draining = on
            else:
                self._progress.drain(on)

    def counts(self) -> tuple[int, int]:
        """(requests whose last response is not sent yet, those of them that wait for a slot)."""
        with self._lock:
            if self._progress is None:
                return len(self._in_flight), self._waiting
            self._tell_siblings()
            return self._progress.counts()

    def _tell_siblings(self) -> None:
        if self._progress is not None:
            self._progress.tell(len(self._in_flight), self._waiting)

    def close(self) -> None:
        """Ends both threads after the round under way; whoever is left is told that the model is being unloaded."""
        self._commands.put(("close",))
        for thread in self._threads:
            thread.join(timeout=30)
        self._on_close()

    # The engine thread.

    def _decode(self) -> None:
        live: set[int] = set()
        while True:
            if not self._obey(live):
                break
            started = time.perf_counter()
            try:
                outputs = self._loop.step()
            except Exception as error:  # one bad round must not end the service
                log.exception("A decoding round failed")
                self._sender.tell("failed", tuple(live), f"The decoding round failed: {type(error).__name__}: {error}")
                live.clear()
                self._traces.clear()
                self._probes, self._loop = 0, self._make_loop(self._traces)
                continue
            live.difference_update(o.request_id for o in outputs if o.finish_reason)
            # The tokens of a round that nobody waits for now are left for the next burst.
            urgent = any(o.finish_reason or o.stats is None for o in outputs)
            self._sender.tell("step", self._report(outputs, started), wake=urgent or time.monotonic() >= self._sender.due)
        self._sender.tell("failed", tuple(live), "The model is being unloaded.")
        self._sender.tell("close")

    def _report(self, outputs: list, started: float) -> Step:
        loop, now = self._loop, time.perf_counter()
        traces, probes = self._traces[:], loop.metrics.probes - self._probes
        self._traces.clear()
        self._probes += probes
        self._waiting = loop.waiting
        counts = (loop.active, loop.waiting, loop.cached_tokens, loop.engines.cache_bytes)
        return Step(outputs, now, now - started, *counts, probes, traces)

    def _obey(self, live: set[int]) -> bool:
        """Takes the commands that wait (and, with nothing to decode, waits for one); False = close."""
        while True:
            try:
                command = self._commands.get(block=not self._loop.has_work)
            except queue.Empty:
                return True
            if command[0] == "close":
                return False
            if command[0] == "cancel":
                self._cancel(command[1], live)
                continue
            _, uid, prompt_ids, params, sink, settings, submitted = command
            self._sender.tell("admitted", uid, sink, settings, len(prompt_ids), submitted)
            try:
                self._loop.add(Request(uid, prompt_ids, params))
                live.add(uid)
            except RequestError as error:
                self._sender.tell("failed", (uid,), str(error), "refused")
            except Exception as error:
                log.exception("A request could not be added")
                self._sender.tell("failed", (uid,), f"The request could not be added: {type(error).__name__}: {error}")

    def _cancel(self, uid: int, live: set[int]) -> None:
        if uid in live:
            self._loop.cancel(uid)

    def _forget(self, uid: int) -> None:
        with self._lock:
            self._in_flight.discard(uid)
            self._tell_siblings()
