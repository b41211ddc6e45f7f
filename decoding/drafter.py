"""Draft and schedule of a round: which requests get a block, what is in it, how much of it is verified.

Knows: backbone -> markov -> confidence -> scheduler. Refuses to know: the target's verdict, token budgets of prefill.

Legend: R active requests (cache rows 0 .. R-1), B rows that a draft covers, G block size, V_d draft vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from time import perf_counter

import numpy as np
from numpy import ndarray

from engines import Engines
from engines.base import BackboneResult, ConfidenceBatch, MarkovBatch, MarkovResult
from engines.pack import draws_after, pack_draft

from .metrics import Metrics
from .random import prepare_draft
from .request import Sequence
from .schedule import RoundLoad, RoundState, Scheduler


@dataclass(frozen=True)
class Draft:
    """The blocks of cache rows first_row .. first_row + B - 1.

    block: markov's result for these B rows (some may be no real ones: requests in prefill or without a draft);
    drafted [R] bool: rows whose block is a real one; num_draft [R]: how much of it is verified, 0 where there is none;
    sample_index [Rs]: the rows of the B that the block's draft_probs belong to;
    confidence_logits, confidence [B, G] (calibrated): None where the confidence engine did not run.
    """

    first_row: int
    block: MarkovResult
    drafted: ndarray
    num_draft: ndarray
    sample_index: ndarray
    confidence_logits: ndarray | None = None
    confidence: ndarray | None = None

    @property
    def survival(self) -> ndarray | None:
        """[B, G]: chance that slots 0 .. k are all accepted."""
        return None if self.confidence is None else np.cumprod(self.confidence, axis=1)

    def tokens(self, row: int, count: int) -> list[int]:
        """The first `count` draft tokens of cache row `row`."""
        return self.block.draft_tokens[row - self.first_row, :count].tolist()

    def probs_row(self, block_row: int) -> int:
        """Where the draft_probs of row `block_row` of the B lie."""
        return int(np.searchsorted(self.sample_index, block_row))

    def spread(self, array: ndarray) -> ndarray:
        """[R, G] float32: rows of `array` [B, G] where they belong, NaN for rows without a draft."""
        wide = np.full((len(self.drafted), array.shape[1]), np.nan, np.float32)
        wide[self.first_row : self.first_row + len(array)] = array
        wide[~self.drafted] = np.nan
        return wide


def markov_batch(
    members: list[Sequence], drafted: ndarray, anchors: ndarray, backbone: BackboneResult, G: int, vocab_size: int
) -> MarkovBatch:
    """Of the B `members`, those with a real draft (`drafted` [B]) get the randomness of their accept rule."""
    drawn = [i for i, s in enumerate(members) if s.drawn and drafted[i]]
    coupled = [i for i, s in enumerate(members) if s.coupled and drafted[i]]
    if not drawn and not coupled:
        return MarkovBatch.greedy(backbone.hidden, backbone.base_logits, anchors, vocab_size, G)
    prepare_draft([members[i].stream for i in drawn], G)
    temperatures = lambda at: np.array([members[i].temperature for i in at], np.float32)
    noise = [members[i].noise(G) for i in coupled]
    return MarkovBatch(
        hidden=backbone.hidden,
        base_logits=backbone.base_logits,
        anchor_ids=anchors,
        sample_index=np.array(drawn, np.int64),
        temperature=temperatures(drawn),
        uniforms=np.stack([members[i].draft_uniforms(G) for i in drawn]) if drawn else np.zeros((0, G), np.float32),
        match_index=np.array(coupled, np.int64),
        match_temperature=temperatures(coupled),
        noise=(noise[0][None] if len(noise) == 1 else np.stack(noise)) if noise else np.zeros((0, G, vocab_size), np.float32),
    )


class Drafter:
    """Makes the drafts of a loop's rows. `wants_confidence`: run the confidence engine whatever the scheduler says."""

    def __init__(self, engines: Engines, scheduler: Scheduler, metrics: Metrics, token_budget: int, wants_confidence: bool):
        bundle = engines.bundle
        self.engines, self.scheduler, self.metrics = engines, scheduler, metrics
        self.G, self.max_context, self.token_budget = bundle.draft.block_size, bundle.max_context, token_budget
        self.spec, self.slots = bundle.draft, bundle.draft.block_slots
        self.V, self.limits, self.packed = bundle.target.vocab_size, engines.pass_limits, bundle.packed("backbone")
        self.confidence = scheduler.uses_confidence or wants_confidence
        self._temperatures = np.array([bundle.temperatures(False), bundle.temperatures(True)], np.float32)  # greedy, sampled
        self._biases = np.array([bundle.biases(False), bundle.biases(True)], np.float32)
        self._turn = 0  # where the last probe ended: probes go round the rows

    def draft(self, rows: list[Sequence], decode: list[bool], prefill: int, room: int) -> Draft | None:
        """The blocks of this round and how much of each is verified; None when there is none.

        decode [R] bool: rows in decode; prefill: prompt tokens that this step feeds; room: draft tokens that fit into its token budget.
        Waiting context is handed to the draft on the way, also for requests still in prefill (their block is ignored).
        """
        if not any(s.speculative for s in rows):
            return None
        wanting = [s.speculative and d for s, d in zip(rows, decode)]
        load = self._load(rows, decode, sum(wanting), prefill)
        started = perf_counter()
        wanted = min(self.scheduler.draft(load), load.requests) if load.requests else 0
        self.metrics.add("schedule", perf_counter() - started)
        if not wanted:
            waiting = [s.pending_rows for s in rows]
            if max(waiting) >= 2 * self.token_budget or (self.limits and sum(waiting) >= self.limits.kept_rows):
                self._backbone(rows, 0, len(rows), np.array(wanting))
            return None
        drafted = np.array(wanting)
        self.metrics.probes += self.scheduler.probing
        first, count, every = 0, len(rows), wanted == len(rows)
        if wanted < load.requests:
            first, count = self._window(drafted, wanted)
            drafted[:first] = drafted[first + count :] = False
        here = slice(first, first + count)
        members = rows[here]
        anchors, context, backbone = self._backbone(rows, first, count, drafted[here])
        batch = draws_after(context, backbone, markov_batch(members, drafted[here], anchors, backbone, self.G, self.V))
        sample_index = batch.sample_index
        last = not self.confidence
        block = self.metrics.timed("markov", self.engines.markov, batch, "draft_tokens" if last else None)
        logits = confidence = None
        if self.confidence:
            batch = ConfidenceBatch(backbone.hidden, block.markov_embeddings)
            result = self.metrics.timed("confidence", self.engines.confidence, batch, "confidence_logits")
            logits = result.confidence_logits
            confidence = self._calibrated(logits, members)
        started = perf_counter()
        at = range(count) if every else np.flatnonzero(drafted).tolist()
        real = slice(None) if len(at) == count else np.array(at) - first
        lengths = self.scheduler.lengths(
            RoundState(
                confidence=np.ones((len(at), self.G), np.float32) if confidence is None else confidence[real],
                threshold=thresholds([rows[i].request.params.threshold for i in at]),
                context=load.context,
                plain=load.requests + load.plain - len(at),
                prefill=prefill,
                room=room,
            )
        )
        self.metrics.add("schedule", perf_counter() - started)
        num_draft = lengths
        if not every:
            num_draft = np.zeros(len(rows), np.int64)
            num_draft[at] = lengths
        return Draft(first, block, drafted, num_draft, sample_index, logits, confidence)

    def _calibrated(self, logits: ndarray, members: list[Sequence]) -> ndarray:
        """[B, G]: the sigmoid of logits / temperature + bias, those of each member's kind, without overflow."""
        kinds = [s.temperature > 0 for s in members]
        kind = int(kinds[0]) if all(kinds) or not any(kinds) else np.array(kinds, np.int64)
        x = logits / self._temperatures[kind]
        x += self._biases[kind]
        x *= 0.5
        np.tanh(x, out=x)
        x += 1.0
        x *= 0.5
        return x

    @staticmethod
    def _load(rows: list[Sequence], decode: list[bool], requests: int, prefill: int) -> RoundLoad:
        """requests: those that may have a draft."""
        longest = max((s.target_length for s, d in zip(rows, decode) if d), default=0)
        return RoundLoad(requests, sum(decode) - requests, prefill, float(longest))

    def _window(self, ready: ndarray, wanted: int) -> tuple[int, int]:
        """(first row, rows): a stretch of rows that holds `wanted` requests to draft for, another one at each probe."""
        at = np.flatnonzero(ready)
        start = self._turn % (len(at) - wanted + 1)
        self._turn = start + wanted
        return int(at[start]), int(at[start + wanted - 1] - at[start]) + 1

    def _backbone(self, rows: list[Sequence], first: int, count: int, drafted: ndarray):
        """(anchors [count], the backbone's batch and result) of rows first .. first + count - 1, their waiting context
        handed over."""
        members = rows[first : first + count]
        anchors = np.array([s.tokens[-1] if d else 0 for s, d in zip(members, drafted)], np.int64)
        *early, last = self._shares(np.array([s.pending_rows for s in members], np.int64))
        for counts in early:  # their blocks mean nothing: the next pass overwrites them
            self._pass(rows, first, members, counts, anchors)
        return anchors, *self._pass(rows, first, members, last, anchors)

    def _shares(self, waiting: ndarray) -> list[ndarray]:
        """How much of the waiting context [B] goes into which pass: all into one, unless the engines take less. A block
        that is drafted by steps starts from a row of its own pass: the last one has a row of each that has any."""
        if (most := self.limits) is None:
            return [waiting]
        kept = np.minimum(waiting, 1) if self.spec.autoregressive else np.zeros_like(waiting)
        shares, waiting = [], waiting - kept
        while not shares or waiting.any():
            share = np.minimum(waiting, most.tokens)
            share = np.maximum(share - np.maximum(np.cumsum(share) - most.context_rows, 0), 0)
            shares.append(share)
            waiting = waiting - share
        whole = shares[-1] + kept
        if whole.max() <= most.tokens and whole.sum() <= most.context_rows:
            return [*shares[:-1], whole]
        return [*shares, kept]

    def _pass(self, rows: list[Sequence], first: int, members: list[Sequence], counts: ndarray, anchors: ndarray):
        """(batch, result) of the backbone over the first counts [B] rows of each member's waiting context."""
        lengths = np.array([s.draft_length for s in members], np.int64)
        longest = max(s.target_length for s in rows) + self.G + 1
        # Every row is padded to the widest one's slots, and padded slots may be written too.
        context = int((lengths + counts).max() if self.packed else lengths.max() + counts.max())
        self.engines.ensure_capacity(len(rows), max(context + self.slots, longest))
        each = list(zip(members, counts.tolist()))
        pieces, following = [s.waiting(n) for s, n in each], [s.following(n) for s, n in each]
        at = self.engines.draft_capacity, self.max_context, first
        batch = pack_draft(self.spec, pieces, following, counts, lengths, anchors, *at)
        result = self.metrics.timed("backbone", self.engines.backbone, batch)
        for s, n in each:
            s.injected(n)
        return batch, result


def thresholds(own: list[float | None]) -> ndarray:
    """[R]: the requests' own, NaN where they have none."""
    if all(value is None for value in own):
        return none_own(len(own))
    return np.array([np.nan if value is None else value for value in own])


@cache
def none_own(R: int) -> ndarray:
    array = np.full(R, np.nan)
    array.setflags(write=False)
    return array
