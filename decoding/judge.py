"""Target logits -> verdicts: how many draft tokens of each request hold, the token after them, their log-probs.

Knows: the verify engine's batch and what of it each request needs. Refuses to know: why so many tokens were drafted,
what is done with a verdict, what the engine computes.

Legend: R requests of this pass, G block size, n admitted draft tokens, V / V_d target / draft vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy import ndarray

from engines import Engines
from engines.base import TargetResult, VerifyBatch, VerifyResult

from .argmax_batch import argmax_batch
from .drafter import Draft
from .metrics import Metrics
from .random import ACCEPT, NEXT, prepare_judge
from .request import ACCEPT_RULES, Sequence

TOP_COUNT = 64  # what a nucleus is looked for in first; four times as much where it did not fit
PATIENCE = 64  # verdicts until a larger count, once needed, is given up again


@dataclass(frozen=True)
class Verdicts:
    """accepted [R], next_tokens [R]; log_probs: for each request None, or float32 [a + 1] of the tokens it was
    given."""

    accepted: ndarray
    next_tokens: ndarray
    log_probs: list[ndarray | None]


@dataclass(frozen=True)
class Case:
    """One request before the judge: its row in the pass, where its logits begin, how many it has (n + 1), its n draft
    tokens."""

    row: int
    sequence: Sequence
    start: int
    count: int
    draft: list[int]

    @property
    def wide(self) -> bool:
        """Its rows are edited or sampled."""
        return self.sequence.temperature > 0 or self.sequence.edits is not None


class Judge:
    """`accept`: the rule of requests that name none themselves."""

    def __init__(self, engines: Engines, metrics: Metrics, accept: str = "rejection"):
        if accept not in ACCEPT_RULES:
            raise ValueError(f"accept is {accept!r}; it must be one of {', '.join(ACCEPT_RULES)}.")
        self.engines, self.metrics, self.accept = engines, metrics, accept
        bundle = engines.bundle
        self.G, self.V, self.V_d = bundle.draft.block_size, bundle.target.vocab_size, bundle.draft.vocab_size
        self._top_count, self._since = TOP_COUNT, 0

    def verdicts(
        self,
        rows: list[Sequence],
        first_row: int,
        draft: Draft | None,
        num_draft: ndarray,
        result: TargetResult,
        logit_counts: ndarray,
        logit_starts: ndarray,
    ) -> Verdicts:
        """`rows`: the R requests in cache rows first_row .. first_row + R - 1; num_draft [R] admitted draft tokens.

        logit_counts [R], logit_starts [R]: how many rows of `result.logits` each request has, and its first. The
        verdict of a request without logits means nothing.
        """
        starts, counts = logit_starts.tolist(), logit_counts.tolist()
        if all(s.plain for s in rows) and all(counts):
            verdict = self._run(self._plain(result.logits, starts, counts, draft, first_row, num_draft))
            return Verdicts(verdict.accepted, verdict.next_tokens, [None] * len(rows))
        cases = []
        for row, (s, n, start, count) in enumerate(zip(rows, num_draft.tolist(), starts, counts)):
            if count:
                cases.append(Case(row, s, start, count, draft.tokens(first_row + row, n) if n else []))
        accepted, following = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
        log_probs: list[ndarray | None] = [None] * len(rows)
        for group in self._groups(cases):
            at = [c.row for c in group]
            verdict = self._judge(group, draft, first_row, num_draft[at], result.logits)
            accepted[at], following[at] = verdict.accepted, verdict.next_tokens
            first = 0
            for c in group:
                if c.sequence.request.params.return_log_probs:
                    log_probs[c.row] = verdict.log_probs[first : first + int(accepted[c.row]) + 1].copy()
                    first += c.count
        return Verdicts(accepted, following, log_probs)

    def _plain(self, *work) -> VerifyBatch:
        return argmax_batch(*work, self.G, self.V_d)

    def _groups(self, cases: list[Case]) -> list[list[Case]]:
        """Runs of neighbours with at most `verify_rows` wide rows (or one request)."""
        most = self.engines.verify_rows
        if most is None or sum(c.count for c in cases if c.wide) <= most:
            return [cases]
        groups, used = [[]], 0
        for c in cases:
            rows = c.count if c.wide else 0
            if used and used + rows > most:
                groups.append([])
                used = 0
            groups[-1].append(c)
            used += rows
        return groups

    def _judge(self, cases: list[Case], draft: Draft | None, first_row: int, num_draft: ndarray, logits: ndarray):
        """VerifyResult of neighbours, with the K that their filters need."""
        start, counts = cases[0].start, np.array([c.count for c in cases])
        tokens = np.zeros((len(cases), self.G), np.int64)
        for i, c in enumerate(cases):
            tokens[i, : len(c.draft)] = c.draft
        slots = np.minimum(np.arange(self.G + 1), counts[:, None] - 1)
        row_index = np.array([c.start - start for c in cases])[:, None] + slots
        judged = logits[start : cases[-1].start + cases[-1].count]
        batch = VerifyBatch.greedy(judged, row_index, tokens, num_draft, self.V_d)
        asked = [(i, c) for i, c in enumerate(cases) if c.sequence.request.params.return_log_probs]
        wide = [(i, c) for i, c in enumerate(cases) if c.wide]
        if asked:
            batch = replace(batch, **_log_probs(asked, start))
        if not wide:
            return self._run(batch)
        firsts = dict(zip([i for i, _ in wide], np.cumsum([0, *(c.count for _, c in wide)]).tolist()))
        placed = [(i, c, firsts[i]) for i, c in wide]
        batch = batch.__dict__ | _wide(placed, start)
        if matched := [p for p in placed if not p[1].sequence.drawn]:
            batch |= _matches(self, matched)
        if drawn := [p for p in placed if p[1].sequence.drawn]:
            batch |= _rejections(self, drawn, draft, first_row, row_index, start)
        if not (filtered := [p for p in placed if p[1].sequence.filtered]):
            return self._run(VerifyBatch(**batch))
        batch |= _filters(self, filtered)
        return self._filtered(batch, [c.sequence.request.params for _, c, _ in filtered])

    def _filtered(self, batch: dict, params: list):
        """Repeats the call with a larger K while a nucleus does not fit into it; the result is that of K = V."""
        by_k = max((p.top_k for p in params), default=0)
        nucleus = any(p.top_p < 1 and not p.top_k for p in params)
        count = max(by_k, self._top_count if nucleus else 1)
        while True:
            count = min(count, self.V)
            batch["top_count"] = np.array([count], np.int64)
            result = self._run(VerifyBatch(**batch))
            if result.complete.all():
                break
            count = self._top_count = 4 * count
            self._since = 0
        self._since += nucleus
        if self._since > PATIENCE:
            self._top_count, self._since = max(TOP_COUNT, self._top_count // 4), 0
        return result

    def _run(self, batch: VerifyBatch) -> VerifyResult:
        return self.metrics.timed("verify", self.engines.verify, batch, "accepted")


# What the lists of a VerifyBatch hold; each for requests placed as (index in the group, case, its first wide row).


def _joined(parts: list[ndarray], shape: tuple, dtype=np.int64) -> ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.zeros(shape, dtype)


def _ranges(placed) -> ndarray:
    """The wide rows of `placed`."""
    return _joined([np.arange(first, first + c.count) for _, c, first in placed], (0,))


def _repeated(values: list, placed, dtype) -> ndarray:
    return np.repeat(np.array(values, dtype), [c.count for _, c, _ in placed])


def _wide(placed, start: int) -> dict[str, ndarray]:
    at, scale, add = [], [], []
    for _, c, first in placed:
        if c.sequence.edits is None:
            continue
        block = c.sequence.edits.block(c.sequence.tokens, c.draft)
        rows = np.repeat(np.arange(first, first + c.count), len(block.tokens))
        at.append(np.stack([rows, np.tile(block.tokens, c.count)], axis=1))
        scale.append(block.scale.reshape(-1))
        add.append(block.add.reshape(-1))
    return {
        "wide_rows": _joined([np.arange(c.start - start, c.start - start + c.count) for _, c, _ in placed], (0,)),
        "temperature": _repeated([c.sequence.temperature or 1.0 for _, c, _ in placed], placed, np.float32),
        "edit_at": _joined(at, (0, 2)),
        "edit_scale": _joined(scale, (0,), np.float32),
        "edit_add": _joined(add, (0,), np.float32),
    }


def _filters(judge: Judge, placed) -> dict[str, ndarray]:
    params = [c.sequence.request.params for _, c, _ in placed]
    return {
        "filter_rows": _ranges(placed),
        "top_k": _repeated([p.top_k or judge.V for p in params], placed, np.int64),
        "top_p": _repeated([p.top_p for p in params], placed, np.float32),
        "min_p": _repeated([p.min_p for p in params], placed, np.float32),
    }


def _matches(judge: Judge, placed) -> dict[str, ndarray]:
    noise = [
        c.sequence.noise(c.count) if c.sequence.coupled else np.zeros((c.count, judge.V), np.float32)
        for _, c, _ in placed
    ]
    filtered = _repeated([c.sequence.filtered for _, c, _ in placed], placed, bool)
    return {
        "match_rows": _ranges(placed),
        "noise": _joined(noise, (0, judge.V), np.float32),
        "match_filtered": np.flatnonzero(filtered),
    }


def _rejections(
    judge: Judge, placed, draft: Draft | None, first_row: int, row_index: ndarray, start: int
) -> dict[str, ndarray]:
    G, R = judge.G, len(placed)
    indices, rows, probs = np.zeros((R, G), np.int64), np.zeros(R, np.int64), {}
    if draft is not None and len(draft.block.draft_probs):
        probs = {"draft_probs": draft.block.draft_probs}
        for k, (_, c, _) in enumerate(placed):
            if c.draft:
                block_row = first_row + c.row - draft.first_row
                indices[k] = draft.block.draft_indices[block_row]
                rows[k] = draft.probs_row(block_row)
    prepare_judge([c.sequence.stream for _, c, _ in placed], [len(c.sequence.tokens) for _, c, _ in placed], G + 1)
    at = np.array([i for i, _, _ in placed], np.int64)
    moved = np.array(
        [first - (c.start - start) for _, c, first in placed], np.int64
    )  # from rows of logits to wide rows
    return {
        "sample_index": at,
        "sample_rows": row_index[at] + moved[:, None],
        "draft_rows": rows,
        "draft_indices": indices,
        "accept_uniforms": np.stack([c.sequence.uniforms(ACCEPT, G) for _, c, _ in placed]),
        "next_uniforms": np.stack([c.sequence.uniforms(NEXT, G + 1) for _, c, _ in placed]),
        **probs,
    }


def _log_probs(asked, start: int) -> dict[str, ndarray]:
    return {
        "log_prob_rows": _joined([np.arange(c.start - start, c.start - start + c.count) for _, c in asked], (0,)),
        "log_prob_at": _joined([np.stack([np.full(c.count, i), np.arange(c.count)], 1) for i, c in asked], (0, 2)),
    }

