"""The same load through Triton: timed requests over gRPC streams.

Knows: client.Client, the server's metrics page. Refuses to know: engines, decoding.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from client import Client, ClientError
from triton_repo import control

from .common import Item
from .steady import Plan, Window
from .timing import Timing


SETTLE_SECONDS = 10.0


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


def ask(
    client: Client,
    messages: Sequence[dict],
    *,
    max_tokens: int,
    speculative: bool = True,
    on_text: Callable[[str], None] = lambda text: None,
) -> Answer:
    """Sends one conversation, greedy, and reads its stream to the end. Raises ClientError, one sentence."""
    timing, texts = Timing(time.perf_counter()), []
    with client.stream(list(messages), max_tokens=max_tokens, speculative=speculative, temperature=0.0) as chunks:
        for chunk in chunks:
            timing.add(time.perf_counter(), chunk.output_ids)
            texts.append(chunk.text)
            on_text(chunk.text)
    timing.finish_reason = chunk.finish_reason
    return Answer(
        "".join(texts),
        timing,
        num_input_tokens=chunk.num_input_tokens,
        num_rounds=chunk.num_rounds,
        drafted=chunk.total_draft_tokens,
        accepted_per_position=chunk.accepted_per_position,
    )


def steady(url: str, items: Sequence[Item], plan: Plan, *, speculative: bool = True) -> dict:
    """One window of the load (benchmarks/steady.py): a thread a user, a stream a request, on connections that are kept.

    Returns Window.summary() with `even_rate` as total_tok_s. Raises the ClientError of the first request that failed.
    """
    window, failures = Window(plan), []

    def user(client: Client) -> None:
        try:
            while window.closed is None and not failures:
                answer(client, items, window, plan, speculative)
        except ClientError as error:
            failures.append(error)

    with Client(url) as client:
        users = [threading.Thread(target=user, args=(client,), daemon=True) for _ in range(plan.concurrency)]
        for thread in users:
            thread.start()
        for thread in users:
            thread.join()
    if failures:
        raise failures[0]
    return window.summary() | {"total_tok_s": even_rate(window.arrivals, window.opened, window.closed)}


def even_rate(requests: Sequence[Sequence[tuple[float, int]]], opened: float, closed: float) -> float:
    """Tokens a second between two moments, from each request's arrivals (time, tokens), those after `closed` included.

    A response holds the tokens of the time since the one before it, evenly. Counted at their arrival they would come up
    to a whole response too late: the window opens with first tokens, which never wait, and would lose what is held at
    its end.
    """
    tokens = 0.0
    for arrivals in requests:
        tokens += sum(n for t, n in arrivals[:1] if opened < t <= closed)
        for (a, _), (b, n) in zip(arrivals, arrivals[1:]):
            tokens += n * max(0.0, min(b, closed) - max(a, opened)) / max(b - a, 1e-9)
    return tokens / (closed - opened)


def answer(
    client: Client,
    items: Sequence[Item],
    window: Window,
    plan: Plan,
    speculative: bool,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """One request to its end, or until the window has closed."""
    i = window.submit(clock())
    sampling = {"temperature": plan.temperature, "seed": plan.seed + i, "ignore_eos": plan.ignore_eos}
    messages, totals = list(items[plan.prompt(i, len(items))].messages), (0, 0, 0)
    with client.stream(messages, max_tokens=plan.length(i), speculative=speculative, **sampling) as chunks:
        for chunk in chunks:
            inside = window.heard(i, clock(), len(chunk.output_ids))
            now = (chunk.num_rounds, chunk.total_draft_tokens, chunk.total_accepted_draft_tokens)
            if inside:
                window.rounds(*(b - a for a, b in zip(totals, now)))
            totals = now
            if window.closed is not None:
                return


def settle(url: str) -> None:
    """Waits until the server has let go of what a window cut off."""
    until = time.monotonic() + SETTLE_SECONDS
    while control.counts(url)[0] and time.monotonic() < until:
        time.sleep(0.02)


def phases(metrics_url: str, after: dict[str, float] | None = None) -> dict[str, float]:
    """Seconds of the server's rounds so far by phase: draft, schedule, target, verify, host.

    after: an earlier reading. The page lags behind the rounds (0.1 s, more on a busy machine): with it, read until the
    counters have moved on from there and stand still, for at most SETTLE_SECONDS.
    """
    found, until = _phases(metrics_url), time.monotonic() + SETTLE_SECONDS
    while after is not None and time.monotonic() < until:
        time.sleep(0.15)
        last, found = found, _phases(metrics_url)
        if last == found and found != after:
            break
    return found


def _phases(metrics_url: str) -> dict[str, float]:
    page = control.metrics(metrics_url)
    found = ((re.search(r'^dspark_phase_seconds_total{.*phase="(\w+)"', name), s) for name, s in page.items())
    return {match[1]: seconds for match, seconds in found if match}


def host_share(before: dict[str, float], after: dict[str, float]) -> float | None:
    """Share of the rounds' time between two readings that was outside the engines; None when nothing was counted."""
    spent = {name: seconds - before.get(name, 0.0) for name, seconds in after.items()}
    total = sum(spent.values())
    return (spent.get("host", 0.0) + spent.get("schedule", 0.0)) / total if total > 0 else None
