"""Requests in, responses out: the engine thread decodes, the sender thread answers, in bursts.

Knows: the decoding loop's interface (only the engine thread touches it) and the bookkeeping of a response. Refuses to
know: Triton (a Sink sends), text (postprocessing), what a round does (decoding).

Why two threads: sending blocks 0.3-0.4 ms a response, time that belongs to the next round.
"""

from __future__ import annotations

import itertools
import logging
import queue
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from decoding.request import Request, RequestError, SamplingParams

from .ledger import INSTANCES

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 0.25
WINDOW = 4  # rounds of one request on their way to postprocessing; what comes meanwhile goes out as one
SHORT_WAIT, LONG_WAIT = 0.005, 0.1  # seconds between two looks of the sender: with something held back, with nothing


@dataclass(frozen=True)
class Round:
    """One response. output_ids: the new tokens, with log_probs one for each (none where they were not asked); the
    totals run from the request's start; finish_reason is "" until the last response (stop | length | cancelled).
    An empty one with finish_reason "" is a heartbeat. settings: in the first response only."""

    uid: int
    index: int
    output_ids: list[int]
    finish_reason: str
    num_input_tokens: int
    num_output_tokens: int
    num_rounds: int
    total_draft_tokens: int
    accepted_per_position: list[int]  # [G]: rounds that accepted more than k draft tokens
    log_probs: list[float]
    settings: str


class Sink(Protocol):
    """Where the responses of one request go."""

    def send(self, response: Round, *, final: bool) -> None: ...

    def fail(self, message: str) -> None: ...


@dataclass(frozen=True)
class Step:
    """One step of the loop as the engine thread saw it. at: its end, perf_counter seconds; traces:
    decoding.trace.RoundTrace (none of a step that only prefilled); probes: how many of it were one."""

    outputs: list
    at: float
    seconds: float
    active: int
    waiting: int
    kv_tokens: int
    kv_bytes: int
    probes: int
    traces: list


class Observer(Protocol):
    """Called by the sender thread only (metrics.py)."""

    def step(self, step: Step) -> None: ...

    def tokens(self, stats, count: int) -> None: ...

    def first_token(self, seconds: float, prompt_tokens: int) -> None: ...

    def next_tokens(self, seconds: float, count: int) -> None: ...

    def ended(self, reason: str) -> None: ...


class Traces(list):
    """An observer of the loop that keeps what it is shown until the end of the step."""

    wants_confidence = False

    def round(self, trace) -> None:
        self.append(trace)


class Progress(Protocol):
    """Rounds of a request that postprocessing has handled; the instances of dspark in one server (ledger.py)."""

    instance: int  # this one's number, 0 .. INSTANCES - 1
    draining: bool

    def begin(self, uid: int) -> None: ...

    def read(self, uid: int) -> int: ...

    def owns(self, uid: int) -> bool: ...

    def stop(self, uid: int) -> None: ...

    def stopped(self, uid: int) -> bool: ...

    def drain(self, on: bool) -> None: ...

    def tell(self, active: int, waiting: int) -> None: ...

    def counts(self) -> tuple[int, int]: ...


@dataclass
class _Tally:
    """The sender thread's account of one request."""

    sink: Sink
    settings: str
    prompt_tokens: int
    submitted: float
    accepted: list[int]
    index: int = 0
    tokens: int = 0
    rounds: int = 0
    drafted: int = 0
    heard: float = field(default_factory=time.monotonic)
    last_token: float | None = None
    begun: bool = False  # its first tokens are out
    held: list[int] = field(default_factory=list)  # tokens that wait for postprocessing to catch up, or for their time
    held_log_probs: list[float] = field(default_factory=list)
    held_reason: str | None = None  # None: nothing is held

    @property
    def urgent(self) -> bool:
        """Holds the first or the last tokens."""
        return bool(self.held_reason or (self.held and not self.begun))


class Service:
    """Runs a loop until closed. Threads start at once. A request without settings is answered round by round.

    make_loop(observer) -> decoding Loop that shows its rounds to `observer` as well; called again after a round failed,
    since the failed loop's state is unknown.
    block_size: G of the draft. progress: for requests that go on to postprocessing (those with settings); they keep at
    most WINDOW rounds under way; and what is to be known of other instances: `stop`, `drain` and `counts` are then of
    all of them. Responses go out in bursts, one for every request that has new tokens; its first and
    its last tokens never wait. interval: least seconds between two bursts with up to `cores` requests that are being
    answered; with more it grows in proportion. A response costs four processes 2 to 3 ms of CPU in all, which the rounds
    want too: so never more than 1 / interval of them a second and core.
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
        self._make_loop, self._block_size, self._observer = make_loop, block_size, observer
        self._progress, self._on_close, self._interval, self._cores = progress, on_close, interval, cores
        self._due = float("-inf")  # when the next burst may go out, monotonic seconds
        self._traces, self._probes = Traces(), 0
        self._loop = make_loop(self._traces)
        self._commands: queue.SimpleQueue = queue.SimpleQueue()
        self._outbox: deque[tuple] = deque()  # from the engine thread to the sender, which sleeps until it is woken
        self._wake = threading.Event()
        # Of this process: a restarted engine never repeats one. The lowest bits name the instance.
        instance = 0 if progress is None else progress.instance
        self._uids = itertools.count(secrets.randbits(48) << 8 | instance, INSTANCES)
        self._lock = threading.Lock()
        self._in_flight: set[int] = set()
        self._waiting, self._draining = 0, False
        self._threads = [
            threading.Thread(target=self._decode, name="dspark-engine", daemon=True),
            threading.Thread(target=self._send, name="dspark-sender", daemon=True),
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
                self._tell("failed", tuple(live), f"The decoding round failed: {type(error).__name__}: {error}")
                live.clear()
                self._traces.clear()
                self._probes, self._loop = 0, self._make_loop(self._traces)
                continue
            live.difference_update(o.request_id for o in outputs if o.finish_reason)
            # The tokens of a round that nobody waits for now are left for the next burst.
            urgent = any(o.finish_reason or o.stats is None for o in outputs)
            self._tell("step", self._report(outputs, started), wake=urgent or time.monotonic() >= self._due)
        self._tell("failed", tuple(live), "The model is being unloaded.")
        self._tell("close")

    def _tell(self, *news, wake: bool = True) -> None:
        self._outbox.append(news)
        if wake:
            self._wake.set()

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
            self._tell("admitted", uid, sink, settings, len(prompt_ids), submitted)
            try:
                self._loop.add(Request(uid, prompt_ids, params))
                live.add(uid)
            except RequestError as error:
                self._tell("failed", (uid,), str(error), "refused")
            except Exception as error:
                log.exception("A request could not be added")
                self._tell("failed", (uid,), f"The request could not be added: {type(error).__name__}: {error}")

    def _cancel(self, uid: int, live: set[int]) -> None:
        if uid in live:
            self._loop.cancel(uid)

    # The sender thread.

    def _send(self) -> None:
        tallies: dict[int, _Tally] = {}
        while True:
            for kind, *rest in self._news(self._patience(tallies)):
                if kind == "close":
                    return
                self._note(tallies, kind, *rest)
            self._catch_up(tallies)
            self._heartbeat(tallies)

    def _patience(self, tallies: dict[int, _Tally]) -> float | None:
        """Seconds to wait for news: for ever with nobody to answer, else until a burst is due (then the engine thread
        wakes the sender); with something held back even so, until postprocessing may have caught up."""
        if not tallies:
            return None
        left = self._due - time.monotonic()
        if any(t.urgent or (left <= 0 and t.held_reason is not None) for t in tallies.values()):
            return SHORT_WAIT
        return LONG_WAIT if left <= 0 else min(left, LONG_WAIT)

    def _news(self, wait: float | None) -> list[tuple]:
        """All that the engine thread has said, after waiting for it up to `wait` seconds."""
        self._wake.wait(wait)
        self._wake.clear()  # before the outbox is emptied: what comes meanwhile wakes again
        return [self._outbox.popleft() for _ in range(len(self._outbox))]

    def _note(self, tallies: dict[int, _Tally], kind: str, *rest) -> None:
        if kind == "admitted":
            uid, sink, settings, prompt_tokens, submitted = rest
            tallies[uid] = _Tally(sink, settings, prompt_tokens, submitted, [0] * self._block_size)
        elif kind == "failed":
            uids, message, *reason = rest
            for uid in uids:
                self._fail(tallies.pop(uid, None), uid, message, *reason)
        else:
            (step,) = rest
            for output in step.outputs:
                self._answer(tallies, output, step.at)
            self._observe("step", step)

    def _answer(self, tallies: dict[int, _Tally], output, at: float) -> None:
        tally = tallies.get(output.request_id)
        if tally is None:
            return
        if output.finish_reason == "error":
            del tallies[output.request_id]
            self._fail(tally, output.request_id, f"The decoding round failed: {output.error}")
            return
        count = len(output.token_ids)
        tally.tokens += count
        if output.stats is not None:
            tally.rounds += 1
            tally.drafted += output.stats.verified
            for k in range(output.stats.accepted):
                tally.accepted[k] += 1
        tally.held += output.token_ids
        tally.held_log_probs += output.log_probs or ()
        tally.held_reason = output.finish_reason or ""
        self._observe("tokens", output.stats, count)
        if count:
            if tally.last_token is None:
                self._observe("first_token", at - tally.submitted, tally.prompt_tokens)
            else:
                self._observe("next_tokens", at - tally.last_token, count)
            tally.last_token = at
        if output.finish_reason:
            self._observe("ended", output.finish_reason)

    def _catch_up(self, tallies: dict[int, _Tally]) -> None:
        """Sends what is held for the requests whose earlier rounds have been handled, and whose time has come."""
        now = time.monotonic()
        due, sent = now >= self._due, False
        for uid, tally in list(tallies.items()):
            if self._progress is not None and self._progress.stopped(uid):
                self._commands.put(("cancel", uid))
            if tally.held_reason is None or self._under_way(uid, tally) >= WINDOW:
                continue
            if not (due or tally.urgent):
                continue
            reason, sent = tally.held_reason, True
            self._respond(uid, tally, reason)
            if reason:
                del tallies[uid]
        if due and sent:
            self._due = now + self._pace(sum(t.begun for t in tallies.values()))

    def _pace(self, requests: int) -> float:
        return self._interval * max(1.0, requests / self._cores)

    def _under_way(self, uid: int, tally: _Tally) -> int:
        return tally.index - self._progress.read(uid) if self._progress is not None and tally.settings else 0

    def _respond(self, uid: int, tally: _Tally, finish_reason: str) -> None:
        """Sends what is held; with nothing held, a heartbeat."""
        response = Round(
            uid=uid,
            index=tally.index,
            output_ids=tally.held,
            finish_reason=finish_reason,
            num_input_tokens=tally.prompt_tokens,
            num_output_tokens=tally.tokens,
            num_rounds=tally.rounds,
            total_draft_tokens=tally.drafted,
            accepted_per_position=tally.accepted[:],
            log_probs=tally.held_log_probs,
            settings=tally.settings if tally.index == 0 else "",
        )
        tally.heard = time.monotonic()
        tally.begun |= bool(tally.held)
        tally.held, tally.held_log_probs, tally.held_reason = [], [], None
        tally.index += 1
        self._guard(tally.sink.send, response, final=bool(finish_reason))
        if finish_reason:
            self._forget(uid)

    def _heartbeat(self, tallies: dict[int, _Tally]) -> None:
        """An empty response to requests that wait or prefill: who left is only noticed on a response's way out."""
        now = time.monotonic()
        pause = max(HEARTBEAT_SECONDS * max(1, len(tallies) / 16), self._pace(len(tallies)))
        for uid, tally in tallies.items():
            if now - tally.heard >= pause and not self._under_way(uid, tally):
                self._respond(uid, tally, "")

    def _fail(self, tally: _Tally | None, uid: int, message: str, reason: str = "error") -> None:
        if tally is not None:
            self._guard(tally.sink.fail, message)
            self._observe("ended", reason)
        self._forget(uid)

    def _forget(self, uid: int) -> None:
        with self._lock:
            self._in_flight.discard(uid)
            self._tell_siblings()

    def _observe(self, what: str, *news) -> None:
        if self._observer is not None:
            self._guard(getattr(self._observer, what), *news)

    @staticmethod
    def _guard(call: Callable, *args, **kwargs) -> None:
        """A client that is gone must not end the sender."""
        try:
            call(*args, **kwargs)
        except Exception:
            log.exception("A response could not be sent, or a round not be counted")
