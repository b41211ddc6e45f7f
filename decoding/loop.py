"""The decode round with continuous batching: admit -> draft -> schedule -> pack -> target -> verify -> commit.

Knows: which request sits in which cache row and what is fed to which engine when. Refuses to know: text, transports,
threads (one thread drives it), how an engine works.

Legend: R active requests (cache rows 0 .. R-1), G block size, n admitted draft tokens, a accepted ones.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from time import perf_counter
from typing import Hashable

import numpy as np
from numpy import ndarray

from engines import Engines
from engines.base import TargetResult
from engines.pack import pack_target

from .drafter import Draft, Drafter
from .judge import Judge, Verdicts
from .metrics import Metrics, Split
from .passes import Pass, plan
from .request import Limits, Request, RequestError, Sequence, validate
from .schedule import Scheduler
from .trace import Observer, RoundTrace
from .twins import Twins


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
    log_probs: one for each of token_ids, of the target's own distribution; None where they were not asked for.
    """

    request_id: Hashable
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    stats: RoundStats | None = None
    error: str | None = None
    log_probs: tuple[float, ...] | None = None


class Loop:
    """Decodes up to `max_requests` requests at once, `token_budget` tokens a step (decode first, then prefill)."""

    def __init__(
        self,
        engines: Engines,
        scheduler: Scheduler,
        max_requests: int = 16,
        token_budget: int = 512,
        accept: str = "rejection",
        observers: tuple[Observer, ...] = (),
    ):
        if max_requests < 1:
            raise ValueError(f"max_requests is {max_requests}; it must be 1 or more.")
        if token_budget < 1:
            raise ValueError(f"token_budget is {token_budget}; it must be 1 or more.")
        if (most := engines.pass_limits) is not None:
            if max_requests > most.requests:
                raise ValueError(
                    f"max_requests is {max_requests}; these engines were compiled for 1..{most.requests}: "
                    f"export again with --max-requests {max_requests}."
                )
            token_budget = min(token_budget, most.tokens)
        self.engines, self.scheduler = engines, scheduler
        self.max_requests, self.token_budget = max_requests, token_budget
        bundle = engines.bundle
        self.G, self.max_context = bundle.draft.block_size, bundle.max_context
        self.limits, self.packed = Limits.of(bundle), bundle.packed("target")
        self.metrics = Metrics(self.G)
        self.observers = tuple(observers)
        wants_confidence = any(o.wants_confidence for o in self.observers)
        self.drafter = Drafter(engines, scheduler, self.metrics, token_budget, wants_confidence)
        self.judge = Judge(engines, self.metrics, accept)
        self._eos = frozenset(bundle.target.eos_token_ids)
        self._waiting: deque[Request] = deque()
        self._rows: list[Sequence] = []  # index = cache row
        self._cancelled: list[Hashable] = []
        self._ids: set[Hashable] = set()
        self._twins = Twins()

    @property
    def active(self) -> int:
        """Requests in cache rows."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """Requests not yet admitted."""
        return len(self._waiting)

    @property
    def cached_tokens(self) -> int:
        """Tokens that the target's cache holds for the active requests."""
        return sum(s.target_length for s in self._rows)

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
            outputs += self._round(started)
            for row in reversed(range(len(self._rows))):
                if self._rows[row].request.id not in self._ids:
                    self._release(row)
        if not self._rows:
            self.scheduler.idle()
        self.metrics.steps += 1
        self.metrics.seconds += perf_counter() - started
        return outputs

    def _round(self, started: float) -> list[Output]:
        rows, before = self._rows, self.metrics.split()
        decode = [s.decoding for s in rows]
        self._accepted = [0] * len(rows)
        try:
            draft = self.drafter.draft(rows, decode, *self._share())
            passes = self._plan(draft)
            self.engines.ensure_capacity(len(rows), self._needed(passes))
        except Exception as error:  # an engine's failure must not end the loop
            return self._fail(list(rows), error)
        outputs, whole = [], True
        for work in passes:
            members = [s for s, n in zip(rows[work.first_row :], work.counts) if n]
            try:
                outputs += self._run(work, draft)
            except Exception as error:
                outputs, whole = outputs + self._fail(members, error), False
        if whole and any(decode):
            tokens = sum(sum(work.counts) for work in passes)
            self._tell(draft, decode, tokens, before, started)
        return outputs

    def _tell(self, draft: Draft | None, decode: list[bool], tokens: int, before: Split, started: float) -> None:
        """What this step did, to the scheduler and the observers: only now, so that both see past rounds only."""
        metrics, drafted = self.metrics, 0
        metrics.tokens += tokens
        spent = Split(*(b - a for a, b in zip(before, metrics.split())))
        if draft is not None:
            self._twins.drafted()
            verified, accepted = draft.num_draft, np.array(self._accepted)
            drafted = sum(verified.tolist())
            if not all(decode) or not draft.drafted.all():
                verified, accepted = verified[draft.drafted], accepted[draft.drafted]
            self.scheduler.observe(verified, accepted)
        if tokens == sum(decode) + drafted:  # no prompt in it
            self.scheduler.timed(1e3 * spent.draft, 1e3 * (perf_counter() - started - spent.draft))  # the host's part too
        if not self.observers:
            return
        host = perf_counter() - started - sum(spent)
        trace = RoundTrace.of_step(self._rows, decode, draft, self._accepted, spent, host, tokens)
        for observer in self.observers:
            observer.round(trace)

    def _admit(self) -> None:
        while self._waiting and len(self._rows) < self.max_requests:
            request = self._waiting.popleft()
            speculative = request.params.speculative and self.scheduler.drafts
            twin = self._twins.take(request.params.seed) if speculative and self.scheduler.load_aware else 0
            self._rows.append(Sequence(request, speculative, self.judge.accept, limits=self.limits, twin=twin))

    # -- pack and target ---------------------------------------------------------------------------------------------

    def _share(self) -> tuple[int, int]:
        """(prompt tokens that this step will feed beside the decode rows, draft tokens that fit into the budget then)."""
        decode = sum(s.decoding for s in self._rows)
        waiting = sum(s.prompt_length - s.target_length for s in self._rows if not s.decoding)
        prefill = min(waiting, max(self.token_budget - decode, self.token_budget // 8, 1))
        return prefill, max(self.token_budget - decode - min(waiting, max(self.token_budget // 8, 1)), 0)

    def _needed(self, passes: list[Pass]) -> int:
        """Cache positions that these passes write. Between two of them a request may grow by a whole block, and where empty
        slots are written every row is as wide as its pass."""
        block = self.G + 1
        if not self.packed:
            return max(s.target_length for s in self._rows) + block + max(max(work.counts) for work in passes)
        fed = [0] * len(self._rows)
        for work in passes:
            fed[work.first_row : work.first_row + len(work.counts)] = work.counts
        return max(s.target_length + max(n, block) for s, n in zip(self._rows, fed)) + block

    def _plan(self, draft: Draft | None) -> list[Pass]:
        """Tokens fed for each row, decode rows all, prefill rows what the budget leaves; in as many passes as pay."""
        num_draft = draft.num_draft.tolist() if draft else [0] * len(self._rows)
        decode = [s.decoding for s in self._rows]
        counts = [1 + n if d else 0 for d, n in zip(decode, num_draft)]
        if all(decode):
            return [Pass(0, counts)]
        # Prefill never starves: at least an eighth of the budget is its own.
        left = max(self.token_budget - sum(counts), self.token_budget // 8, 1)
        for row, s in enumerate(self._rows):
            if not decode[row] and left > 0:
                counts[row] = min(s.prompt_length - s.target_length, left)
                left -= counts[row]
        return plan(counts, decode, self.engines.target_capacity, self.engines.pass_worth)

    def _run(self, work: Pass, draft: Draft | None) -> list[Output]:
        """Target, verify and commit for the rows of one pass."""
        here = slice(work.first_row, work.first_row + len(work.counts))
        rows = self._rows[here]
        R = len(rows)
        num_draft = draft.num_draft[here] if draft else np.zeros(R, np.int64)
        tokens = []
        for i, (s, count) in enumerate(zip(rows, work.counts)):
            fed = s.tokens[s.target_length : s.target_length + count]
            if count > len(fed):  # the anchor, then the admitted draft tokens
                fed += draft.tokens(work.first_row + i, count - 1)
            tokens.append(fed)
        lengths = np.array([s.target_length for s in rows], np.int64)
        logit_counts = np.array([self._logits_wanted(s, n) for s, n in zip(rows, work.counts)], np.int64)
        batch, starts, logit_starts = pack_target(
            tokens, lengths, logit_counts, self.engines.target_capacity, self.max_context, work.first_row
        )
        result = self.metrics.timed("target", self.engines.target, batch)
        verified = None
        if len(batch.logit_rows):
            first = work.first_row
            verified = self.judge.verdicts(rows, first, draft, num_draft, result, logit_counts, logit_starts)
        return self._commit(rows, work, draft, num_draft, result, starts, logit_counts, verified)

    @staticmethod
    def _logits_wanted(s: Sequence, count: int) -> int:
        """Rows of logits: every fed token of a decode row, the last one of a prompt's last chunk."""
        if s.decoding:
            return count
        return int(count > 0 and s.target_length + count == s.prompt_length)

    # -- commit ------------------------------------------------------------------------------------------------------

    def _commit(
        self,
        rows: list[Sequence],
        work: Pass,
        draft: Draft | None,
        num_draft: ndarray,
        result: TargetResult,
        starts: ndarray,
        logit_counts: ndarray,
        verified: Verdicts | None,
    ) -> list[Output]:
        """Advances lengths (a rejected suffix is undone by not counting it), keeps features, emits tokens."""
        outputs = []
        # A token each: nothing will be rejected, what one request keeps is no more than its round's. Beside a prompt, or drafts,
        # it would keep their rows alive with it.
        features, own = result.features, len(rows) == 1 or all(n == 1 for n in work.counts)
        if own and not result.lasting:
            own = len(rows) > 1
            features = features.copy() if own and any(s.speculative for s in rows) else features
        for i, (s, count) in enumerate(zip(rows, work.counts)):
            if not count:
                continue
            row, n, stats, new = work.first_row + i, count, None, []
            if logit_counts[i]:
                accepted = int(verified.accepted[i])
                if s.decoding:
                    self._accepted[row] = accepted
                    drafted = self.G if draft is not None and draft.drafted[row] else 0
                    stats, n = RoundStats(drafted, int(num_draft[i]), accepted), accepted + 1
                    new = draft.tokens(row, accepted) if accepted else []
                    self.metrics.round(stats.drafted, stats.verified, stats.accepted)
                new.append(int(verified.next_tokens[i]))
            if not s.decoding:
                self.metrics.prompt_tokens += count
            if s.speculative:
                s.keep(features[starts[i] : starts[i] + n], own)
            s.target_length += n
            if new:
                outputs.append(self._emit(s, new, stats, verified.log_probs[i]))
        return outputs

    def _emit(self, s: Sequence, new: list[int], stats: RoundStats | None, log_probs: ndarray | None) -> Output:
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
        given = None if log_probs is None else tuple(log_probs[: len(new)].tolist())
        output = Output(s.request.id, tuple(new), reason, stats, log_probs=given)
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
        if self._rows[row].speculative and self.scheduler.load_aware:
            self._twins.end(self._rows[row].request.params.seed, self._rows[row].twin)
        last = self._rows.pop()
        if row < len(self._rows):
            self.engines.move_row(len(self._rows), row, last.target_length, last.draft_length)
            self._rows[row] = last
