"""The same load through Triton: timed requests over gRPC streams.

Knows: client.Client. Refuses to know: engines, decoding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from client import Client

from .common import Acceptance, Item
from .timing import Run, Timing


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


def load(url: str, items: Sequence[Item], *, concurrency: int, max_tokens: int, speculative: bool) -> Run:
    """Answers all items, `concurrency` users at a time. Raises the ClientError of a request that failed."""

    def answer(item: Item) -> Answer:
        return ask(client, item.messages, max_tokens=max_tokens, speculative=speculative)

    client, started = Client(url), time.perf_counter()
    with ThreadPoolExecutor(concurrency) as users:
        answers = list(users.map(answer, items))
    seconds, acceptance = time.perf_counter() - started, Acceptance()
    for a in answers:
        acceptance.rounds += a.num_rounds
        acceptance.verified += a.drafted
        acceptance.accepted += sum(a.accepted_per_position)
    return Run(seconds, [a.timing for a in answers], acceptance)
