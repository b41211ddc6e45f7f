"""The sender thread: what the engine thread says becomes responses, in bursts.

Knows: the bookkeeping of a request's responses, when one may go out. Refuses to know: Triton (a Sink sends), text
(postprocessing), the decoding loop (its news come in).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from .responses import Observer, Progress, Round, Sink

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 0.25
WINDOW = 4  # rounds of one request on their way to postprocessing; what comes meanwhile goes out as one
SHORT_WAIT, LONG_WAIT = 0.005, 0.1  # seconds between two looks of the sender: with something held back, with nothing


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
    newest: float | None = None  # when its newest token was decoded, perf_counter seconds
    told: float | None = None  # and the newest of those that are out
    begun: bool = False  # its first tokens are out
    held: list[int] = field(default_factory=list)  # tokens that wait for postprocessing to catch up, or for their time
    held_log_probs: list[float] = field(default_factory=list)
    held_reason: str | None = None  # None: nothing is held

    @property
    def urgent(self) -> bool:
        """Holds the first or the last tokens."""
        return bool(self.held_reason or (self.held and not self.begun))


class Sender:
    """`run` is the thread; `tell` gives it news: ("admitted", uid, sink, settings, prompt tokens, submitted), ("step",
    Step), ("failed", uids, message[, reason]), ("close",).

    Responses go out in bursts, one for every request that has new tokens; its first and its last tokens never wait.
    interval: least seconds between two bursts with up to `cores` requests that are being answered; with more it grows
    in proportion. A response costs four processes 2 to 3 ms of CPU in all, which the rounds want too: so never more
    than 1 / interval of them a second and core. progress: of requests with settings, which keep at most WINDOW rounds
    under way; forget(uid): its last response is out; cancel(uid): somebody asked for its end.
    """

    def __init__(
        self,
        *,
        block_size: int,
        observer: Observer | None,
        progress: Progress | None,
        interval: float,
        cores: int,
        forget: Callable[[int], None],
        cancel: Callable[[int], None],
    ):
        self._block_size, self._observer, self._progress = block_size, observer, progress
        self._interval, self._cores, self._forget, self._cancel = interval, cores, forget, cancel
        self.due = float("-inf")  # when the next burst may go out, monotonic seconds
        self._outbox: deque[tuple] = deque()  # from the engine thread; the sender sleeps until it is woken
        self._wake = threading.Event()

    def tell(self, *news, wake: bool = True) -> None:
        self._outbox.append(news)
        if wake:
            self._wake.set()

    def run(self) -> None:
        """The thread: until it is told to close."""
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
        left = self.due - time.monotonic()
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
            if tally.newest is None:
                self._observe("first_token", at - tally.submitted, tally.prompt_tokens)
            tally.newest = at
        if output.finish_reason:
            self._observe("ended", output.finish_reason)

    def _catch_up(self, tallies: dict[int, _Tally]) -> None:
        """Sends what is held for the requests whose earlier rounds have been handled, and whose time has come."""
        now = time.monotonic()
        due, sent = now >= self.due, False
        for uid, tally in list(tallies.items()):
            if self._progress is not None and self._progress.stopped(uid):
                self._cancel(uid)
            if tally.held_reason is None or self._under_way(uid, tally) >= WINDOW:
                continue
            if not (due or tally.urgent):
                continue
            reason, sent = tally.held_reason, True
            self._respond(uid, tally, reason)
            if reason:
                del tallies[uid]
        if due and sent:
            self.due = now + self.pace(sum(t.begun for t in tallies.values()))

    def pace(self, requests: int) -> float:
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
        if tally.held:
            if tally.begun:  # of a response, not of a round: each sample is a message to the server and back
                self._observe("next_tokens", tally.newest - tally.told, len(tally.held))
            tally.begun, tally.told = True, tally.newest
        tally.held, tally.held_log_probs, tally.held_reason = [], [], None
        tally.index += 1
        self._guard(tally.sink.send, response, final=bool(finish_reason))
        if finish_reason:
            self._forget(uid)

    def _heartbeat(self, tallies: dict[int, _Tally]) -> None:
        """An empty response to requests that wait or prefill: who left is only noticed on a response's way out."""
        now = time.monotonic()
        pause = max(HEARTBEAT_SECONDS * max(1, len(tallies) / 16), self.pace(len(tallies)))
        for uid, tally in tallies.items():
            if now - tally.heard >= pause and not self._under_way(uid, tally):
                self._respond(uid, tally, "")

    def _fail(self, tally: _Tally | None, uid: int, message: str, reason: str = "error") -> None:
        if tally is not None:
            self._guard(tally.sink.fail, message)
            self._observe("ended", reason)
        self._forget(uid)

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
