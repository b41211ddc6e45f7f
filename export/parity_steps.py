"""Parity of an autoregressive draft: its rows and its steps against ArDraft, which runs over the whole context.

Knows: docs/structures.md's tensors of the two graphs. Refuses to know: gates, cases, the other engines (parity.py).
Legend: R requests, S rows of one of them, G block size, V target vocabulary, d hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from training.autoregressive import Rows

from .heads import ALWAYS_CONFIDENT
from .runner import MASKED

if TYPE_CHECKING:
    from .parity import Parity


@dataclass(frozen=True)
class Draws:
    """What a case draws with: request 0 takes the argmax, 1 draws (`sampled`), 2 is matched. temperature [R], uniforms
    [R, G], noise [1, G, V] of request 2."""

    temperature: np.ndarray
    uniforms: np.ndarray
    noise: np.ndarray
    sampled: np.ndarray
    matched: np.ndarray

    @classmethod
    def random(cls, rng: np.random.Generator, R: int, G: int, V: int) -> Draws:
        uniforms, noise = rng.random((R, G), dtype=np.float32), rng.gumbel(size=(1, G, V)).astype(np.float32)
        return cls(np.array([0.0, 1.0, 0.7], np.float32), uniforms, noise, np.array([1]), np.array([2]))

    def feeds(self) -> dict[str, np.ndarray]:
        """The markov engine's inputs."""
        return dict(
            sample_index=self.sampled, temperature=self.temperature[self.sampled], uniforms=self.uniforms[self.sampled],
            match_index=self.matched, match_temperature=self.temperature[self.matched], noise=self.noise,
        )  # fmt: skip


@dataclass(frozen=True)
class Newest:
    """Each request's newest row: hidden [R, 1, d] before the final norm, its position p-1; rows: ArDraft's, one request
    each."""

    hidden: torch.Tensor
    position: np.ndarray
    rows: list[Rows]


def rows_pass(
    parity: Parity, case: str, features: list, tokens: list[list[int]], done: list[int], counts: list[int]
) -> Newest:
    """The new rows of each request behind those in the caches. features[r] [S, L*d] and tokens[r]: from its start."""
    R, Q, C, draft = len(features), max(counts), parity.C, parity.draft
    start, slots = np.array(done), np.arange(Q)
    used, firsts = slots < np.array(counts)[:, None], np.cumsum(counts) - counts
    positions, ends = start[:, None] + slots, start + counts
    seen = lambda at: np.where(np.arange(C) <= at[..., None], np.float32(0), MASKED)[:, None]
    behind = [t[n + 1 : n + k + 1] for t, n, k in zip(tokens, done, counts)]
    got = parity.run["backbone"](
        features=torch.cat([f[n:] for f, n in zip(features, done)]).numpy(), next_ids=np.array(sum(behind, [])),
        pad_index=np.where(used, firsts[:, None] + slots, 0), pack_index=np.flatnonzero(used), position_ids=positions,
        write_index=start, last_index=firsts + counts - 1, last_position_ids=ends[:, None] - 1,
        mask=seen(ends[:, None] - 1), mask_rows=seen(positions),
    )  # fmt: skip
    rows = []
    for f, t in zip(features, tokens):
        S = len(f)
        rows.append(draft.rows(f[None], torch.tensor([t[1 : S + 1]]), torch.tensor([[S - 1]])))
    hidden = torch.cat([row.hidden for row in rows])
    parity.compare("backbone", f"{case}, hidden", got["hidden"], hidden)
    logits = draft.lm_head(draft.norm(hidden))
    parity.compare("backbone", f"{case}, base_logits", got["base_logits"], logits, argmax=True)
    return Newest(hidden, ends - 1, rows)


def steps_pass(parity: Parity, name: str, newest: Newest, draws: Draws) -> dict:
    """The steps over the caches that rows_pass left; what they gave, and `want_confidence`."""
    G, C, draft = parity.G, parity.C, parity.draft
    mask = np.where(np.arange(C) <= newest.position[:, None], np.float32(0), MASKED)[:, None, None]
    base = draft.lm_head(draft.norm(newest.hidden))
    got = parity.run["markov"](
        hidden=newest.hidden.numpy(), base_logits=base.numpy(), position_ids=newest.position + 1, mask=mask,
        **draws.feeds(),
    )  # fmt: skip
    tokens, hidden, position = torch.tensor(got["draft_tokens"]), newest.hidden, newest.position.tolist()
    each = [block_logits(draft, hidden[r : r + 1], position[r], rows, tokens[r]) for r, rows in enumerate(newest.rows)]
    logits = np.stack(each)
    parity.picks(name, got, logits, draws, "steps")
    return {**got, "want_confidence": np.full((len(logits), G), ALWAYS_CONFIDENT, np.float32)}


def block_logits(draft, hidden: torch.Tensor, position: int, rows: Rows, tokens: torch.Tensor) -> np.ndarray:
    """hidden [1, 1, d] of the row at `position`, tokens [G] -> [G, V_d]: a block's logits, given its tokens."""
    logits, past = [draft.lm_head(draft.norm(hidden[0, 0]))], []
    bias = torch.zeros(1, 1, position + 1)
    for k in range(1, len(tokens)):
        at = torch.tensor([[position + k]])
        hidden, past = draft.step(hidden, tokens[None, k - 1 : k], at, rows.caches, bias, past)
        logits.append(draft.lm_head(draft.norm(hidden[0, 0])))
    return torch.stack(logits).numpy()
