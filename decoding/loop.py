"""The decode round with continuous batching: admit -> draft -> schedule -> pack -> target -> verify -> commit.

Knows: which request sits in which cache row and what is fed to which engine when. Refuses to know: text, transports,
threads (one thread drives it), how an engine works.

Legend: R active requests (cache rows 0 .. R-1), G block size, n admitted draft tokens, a accepted ones.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Callable, Hashable

import numpy as np
from numpy import ndarray

from engines import Engines
from engines.base import ConfidenceBatch, MarkovBatch, MarkovResult, TargetResult, VerifyBatch, VerifyResult

from .metrics import Metrics
from .pack import pack_backbone, pack_target
from .random import ACCEPT, DRAFT, NEXT
from .request import Limits, Request, RequestError, Sequence, validate
from .schedule import RoundState, Scheduler

# Decode rows and long prefill chunks share one target pass unless more than this many (empty slots x cache positions)
# would be attended for nothing; then they take two passes, which read the weights twice.
WASTE = 1 << 15


@dataclass(frozen=True)
class RoundStats:
    """One verify round of one request: draft tokens made, verified (n), accepted (a, before clipping to max_tokens)."""

    drafted: int
    verified: int
    accepted: int


@dataclass(frozen=True)
class Output:
    """New tokens of one request. finish_reason: None (more to come), "stop", "length", "cancelled" or "error".

    stats is None where no verify round took place (the prefill pass gives the first token, cancellation none).
    """

    request_id: Hashable
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    stats: RoundStats | None = None
    error: str | None = None


@dataclass(frozen=True)
class _Draft:
    """markov's result for all R rows; drafted [R] bool: rows whose block is a real one; num_draft [R]: admitted."""

    block: MarkovResult
    drafted: ndarray
    num_draft: ndarray


@dataclass(frozen=True)
class _Pass:
    """Rows first_row .. first_row + len(counts) - 1 of one target pass; counts: tokens fed, 0 = only in the way."""

    first_row: int
    counts: list[int]


class Loop:
    """Decodes up to `max_requests` requests at once, `token_budget` tokens a step (decode first, then prefill)."""

    def __init__(self, engines: Engines, scheduler: Scheduler, max_requests: int = 16, token_budget: int = 512):
        if max_requests < 1:
            raise ValueError(f"max_requests is {max_requests}; it must be 1 or more.")
        if token_budget < 1:
            raise ValueError(f"token_budget is {token_budget}; it must be 1 or more.")
        self.engines, self.scheduler = engines, scheduler
        self.max_requests, self.token_budget = max_requests, token_budget
        bundle = engines.bundle
        self.G, self.V_d, self.max_context = bundle.draft.block_size, bundle.draft.vocab_size, bundle.max_context
        self.limits = Limits.of(bundle)
        self.metrics = Metrics(self.G)
        temperatures = bundle.confidence_temperatures or (1.0,) * self.G
        self._confidence_temperatures = np.array(temperatures, np.float32)
        self._eos = frozenset(bundle.target.eos_token_ids)
        self._waiting: deque[Request] = deque()
        self._rows: list[Sequence] = []  # index = cache row
        self._cancelled: list[Hashable] = []
        self._ids: set[Hashable] = set()
        self._empty = np.zeros((0, self.G, self.V_d), np.float32)

    @property
    def active(self) -> int:
        """Requests in cache rows."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """Requests not yet admitted."""
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        """step() has something to do or to say."""
        return bool(self._rows or self._waiting or self._cancelled)

    def add(self, request: Request) -> None:
        """Queues a request. Raises RequestError for one that does not fit or whose id is in flight."""
        validate(request, self.limits)
        if request.id in self._ids:
            raise RequestError(f"id is {request.id!r}; it must differ from every request in flight.")
        self._ids.add(request.id)
        self._waiting.append(request)

    def cancel(self, request_id: Hashable) -> bool:
        """Ends a request: its row is free at once, the next step() says "cancelled". False if it is not in flight."""
        for row, sequence in enumerate(self._rows):
            if sequence.request.id == request_id:
                self._release(row)
                self._cancelled.append(request_id)
                return True
        for request in self._waiting:
            if request.id == request_id:
                self._waiting.remove(request)
                self._cancelled.append(request_id)
                return True
        return False

    def step(self) -> list[Output]:
        """One round of everything in flight. Returns what each request got, in no order; may be empty (prefill)."""
        started = perf_counter()
        outputs = [self._finish(Output(i, (), "cancelled")) for i in self._cancelled]
        self._cancelled = []
        self._admit()
        if self._rows:
            outputs += self._round()
            for row in reversed(range(len(self._rows))):
                if self._rows[row].request.id not in self._ids:
                    self._release(row)
        self.metrics.steps += 1
        self.metrics.seconds += perf_counter() - started
        return outputs

    def _round(self) -> list[Output]:
        try:
            draft = self._draft()
            passes = self._plan(draft)
            # Between two passes a request may grow by a whole block.
            self.engines.ensure_capacity(len(self._rows), self._longest() + max(max(work.counts) for work in passes))
        except Exception as error:  # an engine's failure must not end the loop
            return self._fail(list(self._rows), error)
        outputs: list[Output] = []
        for work in passes:
            members = [s for s, n in zip(self._rows[work.first_row :], work.counts) if n]
            try:
                outputs += self._run(work, draft)
            except Exception as error:
                outputs += self._fail(members, error)
        return outputs

    def _admit(self) -> None:
        while self._waiting and len(self._rows) < self.max_requests:
            request = self._waiting.popleft()
            speculative = request.params.speculative and self.scheduler.drafts
            self._rows.append(Sequence(request, speculative, slack=self.G + 1))

    # -- draft and schedule ------------------------------------------------------------------------------------------

    def _draft(self) -> _Draft | None:
        """The blocks of all speculative requests in decode, and how much of each is verified; None when there is none.

        Waiting context is handed to the draft on the way, also for requests still in prefill (their block is ignored).
        """
        rows, G = self._rows, self.G
        drafted = np.array([s.speculative and s.decoding for s in rows])
        if not drafted.any() and max(s.pending_rows for s in rows) < 2 * self.token_budget:
            return None
        counts = np.array([s.pending_rows for s in rows], np.int64)
        lengths = np.array([s.draft_length for s in rows], np.int64)
        anchors = np.array([s.tokens[-1] if d else 0 for s, d in zip(rows, drafted)], np.int64)
        self.engines.ensure_capacity(len(rows), max(int(lengths.max() + counts.max()) + G, self._longest()))
        pieces = [s.pending for s in rows]
        batch = pack_backbone(pieces, counts, lengths, anchors, G, self.engines.draft_capacity, self.max_context)
        backbone = self._timed("backbone", self.engines.backbone, batch)
        for s in rows:
            s.injected()
        if not drafted.any():
            return None
        uniforms = np.stack([s.uniforms(DRAFT, G) if d else np.zeros(G, np.float32) for s, d in zip(rows, drafted)])
        batch = MarkovBatch(backbone.hidden, backbone.base_logits, anchors, self._temperatures(rows), uniforms)
        block = self._timed("markov", self.engines.markov, batch)
        return _Draft(block, drafted, self._schedule(backbone.hidden, block, drafted))

    def _schedule(self, hidden: ndarray, block: MarkovResult, drafted: ndarray) -> ndarray:
        """[R] draft tokens to verify; 0 where there is no draft."""
        rows = [s for s, d in zip(self._rows, drafted) if d]
        confidence = np.ones((len(rows), self.G), np.float32)
        if self.scheduler.uses_confidence:
            batch = ConfidenceBatch(hidden, block.markov_embeddings)
            logits = self._timed("confidence", self.engines.confidence, batch).confidence_logits[drafted]
            confidence = 1.0 / (1.0 + np.exp(-logits / self._confidence_temperatures))
        state = RoundState(
            confidence=confidence,
            threshold=np.array(
                [np.nan if s.request.params.threshold is None else s.request.params.threshold for s in rows]
            ),
            context=np.array([len(s.tokens) for s in rows]),
            plain=sum(s.decoding for s in self._rows) - len(rows),
            prefill=sum(s.prompt_length - s.target_length for s in self._rows if not s.decoding),
        )
        lengths = np.zeros(len(self._rows), np.int64)
        lengths[drafted] = self.scheduler.lengths(state)
        return lengths

    # -- pack and target ---------------------------------------------------------------------------------------------

    def _plan(self, draft: _Draft | None) -> list[_Pass]:
        """Tokens fed for each row: decode rows all, prefill rows what the budget leaves; in one pass, or two where the
        empty slots beside a long chunk would cost more than reading the weights again."""
        num_draft = draft.num_draft.tolist() if draft else [0] * len(self._rows)
        counts = [1 + n if s.decoding else 0 for s, n in zip(self._rows, num_draft)]
        # Prefill never starves: at least an eighth of the budget is its own.
        left, decode = max(self.token_budget - sum(counts), self.token_budget // 8, 1), [n > 0 for n in counts]
        for row, s in enumerate(self._rows):
            if not decode[row] and left > 0:
                counts[row] = min(s.prompt_length - s.target_length, left)
                left -= counts[row]
        empty = len(counts) * max(counts) - sum(counts)
        if not any(decode) or all(d or not n for d, n in zip(decode, counts)):
            return [self._span(counts)]
        if empty * self.engines.target_capacity <= WASTE:
            return [self._span(counts)]
        return [
            self._span([n if d else 0 for n, d in zip(counts, decode)]),
            self._span([0 if d else n for n, d in zip(counts, decode)]),
        ]

    @staticmethod
    def _span(counts: list[int]) -> _Pass:
        used = [row for row, n in enumerate(counts) if n]
        return _Pass(used[0], counts[used[0] : used[-1] + 1])

    def _run(self, work: _Pass, draft: _Draft | None) -> list[Output]:
        """Target, verify and commit for the rows of one pass."""
        here = slice(work.first_row, work.first_row + len(work.counts))
        rows = self._rows[here]
        R = len(rows)
        num_draft = draft.num_draft[here] if draft else np.zeros(R, np.int64)
        tokens = []
        for i, (s, count) in enumerate(zip(rows, work.counts)):
            fed = s.tokens[s.target_length : s.target_length + count]
            if count > len(fed):  # the anchor, then the admitted draft tokens
                fed += draft.block.draft_tokens[work.first_row + i, : count - 1].tolist()
            tokens.append(fed)
        lengths = np.array([s.target_length for s in rows], np.int64)
        logit_counts = np.array([self._logits_wanted(s, n) for s, n in zip(rows, work.counts)], np.int64)
        batch, starts, logit_starts = pack_target(
            tokens, lengths, logit_counts, self.engines.target_capacity, self.max_context, work.first_row
        )
        result = self._timed("target", self.engines.target, batch)
        verified = None
        if len(batch.logit_rows):
            verified = self._verify(rows, here, draft, num_draft, result, logit_counts, logit_starts)
        return self._commit(rows, work, draft, num_draft, result, starts, logit_counts, verified)

    @staticmethod
    def _logits_wanted(s: Sequence, count: int) -> int:
        """Rows of logits: every fed token of a decode row, the last one of a prompt's last chunk."""
        if s.decoding:
            return count
        return int(count > 0 and s.target_length + count == s.prompt_length)

    def _verify(
        self,
        rows: list[Sequence],
        here: slice,
        draft: _Draft | None,
        num_draft: ndarray,
        result: TargetResult,
        logit_counts: ndarray,
        logit_starts: ndarray,
    ) -> VerifyResult:
        R, G = len(rows), self.G
        slots = np.minimum(np.arange(G + 1), np.maximum(logit_counts - 1, 0)[:, None])
        starts = np.minimum(
            logit_starts, len(result.logits) - 1
        )  # rows without logits point anywhere; their result is ignored
        temperature = self._temperatures(rows)
        judged = draft is not None
        batch = VerifyBatch(
            logits=result.logits,
            row_index=starts[:, None] + slots,
            draft_tokens=draft.block.draft_tokens[here] if judged else np.zeros((R, G), np.int64),
            draft_indices=draft.block.draft_indices[here] if judged else np.zeros((R, G), np.int64),
            draft_probs=draft.block.draft_probs[here] if judged else self._no_probs(R),
            num_draft=num_draft,
            temperature=temperature,
            sample_index=np.flatnonzero((temperature > 0) & (logit_counts > 0)),
            accept_uniforms=np.stack([s.uniforms(ACCEPT, G) for s in rows]),
            next_uniforms=np.stack([s.uniforms(NEXT, G + 1) for s in rows]),
        )
        return self._timed("verify", self.engines.verify, batch)

    # -- commit ------------------------------------------------------------------------------------------------------

    def _commit(
        self,
        rows: list[Sequence],
        work: _Pass,
        draft: _Draft | None,
        num_draft: ndarray,
        result: TargetResult,
        starts: ndarray,
        logit_counts: ndarray,
        verified: VerifyResult | None,
    ) -> list[Output]:
        """Advances lengths (a rejected suffix is undone by not counting it), keeps features, emits tokens."""
        outputs = []
        for i, (s, count) in enumerate(zip(rows, work.counts)):
            if not count:
                continue
            row, n, stats, new = work.first_row + i, count, None, []
            if logit_counts[i]:
                accepted = int(verified.accepted[i])
                if s.decoding:
                    drafted = self.G if draft is not None and draft.drafted[row] else 0
                    stats, n = RoundStats(drafted, int(num_draft[i]), accepted), accepted + 1
                    new = draft.block.draft_tokens[row, :accepted].tolist() if accepted else []
                    self.metrics.round(stats.drafted, stats.verified, stats.accepted)
                new.append(int(verified.next_tokens[i]))
            if not s.decoding:
                self.metrics.prompt_tokens += count
            if s.speculative:
                s.keep(result.features[starts[i] : starts[i] + n])
            s.target_length += n
            if new:
                outputs.append(self._emit(s, new, stats))
        return outputs

    def _emit(self, s: Sequence, new: list[int], stats: RoundStats | None) -> Output:
        """Appends `new` to the request, cut after an end-of-sequence token or at max_tokens."""
        params, reason = s.request.params, None
        s.tokens += new
        room = params.max_tokens - s.emitted
        if len(new) >= room:
            new, reason = new[:room], "length"
        if not params.ignore_eos:
            end = next((k for k, token in enumerate(new) if token in self._eos), None)
            if end is not None:
                new, reason = new[: end + 1], "stop"
        s.emitted += len(new)
        self.metrics.emitted_tokens += len(new)
        output = Output(s.request.id, tuple(new), reason, stats)
        return self._finish(output) if reason else output

    def _finish(self, output: Output) -> Output:
        """The request's last output: its id is free, its row is released at the end of the round."""
        self._ids.discard(output.request_id)
        self.metrics.finished[output.finish_reason] = self.metrics.finished.get(output.finish_reason, 0) + 1
        return output

    def _fail(self, members: list[Sequence], error: Exception) -> list[Output]:
        reason = f"{type(error).__name__}: {error}"
        failed = [s.request.id for s in members if s.request.id in self._ids]
        return [self._finish(Output(i, (), "error", None, reason)) for i in failed]

    def _release(self, row: int) -> None:
        """Frees a cache row: the last row's request moves into it."""
        last = self._rows.pop()
        if row < len(self._rows):
            self.engines.move_row(len(self._rows), row, last.target_length, last.draft_length)
            self._rows[row] = last

    # -- small things ------------------------------------------------------------------------------------------------

    def _longest(self) -> int:
        """Cache positions of the longest active request after one more block."""
        return max(s.target_length for s in self._rows) + self.G + 1

    def _no_probs(self, R: int) -> ndarray:
        if len(self._empty) < R:
            self._empty = np.zeros((R, self.G, self.V_d), np.float32)
        return self._empty[:R]

    @staticmethod
    def _temperatures(rows: list[Sequence]) -> ndarray:
        return np.array([s.temperature for s in rows], np.float32)

    def _timed(self, name: str, call: Callable[[Any], Any], batch: Any) -> Any:
        started = perf_counter()
        result = call(batch)
        metrics = self.metrics
        metrics.engine_seconds[name] = metrics.engine_seconds.get(name, 0.0) + perf_counter() - started
        metrics.engine_calls[name] = metrics.engine_calls.get(name, 0) + 1
        return result
