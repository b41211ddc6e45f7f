"""Random inputs of the verify graph (docs/structures.md, 5.) that every accept rule, edit and filter occurs in.

Knows: which rows of logits which list names. Refuses to know: what the graph makes of them.
"""

from __future__ import annotations

import numpy as np

RULES = ("greedy", "rejection", "coupled")


class WideRows:
    """Inputs of the verify graph for requests under given rules, with or without edits, filters and log-probs."""

    def __init__(self, row_index: np.ndarray, num_draft: np.ndarray, temperature: np.ndarray, rules: list[str]):
        self.row_index, self.num_draft, self.temperature, self.rules = row_index, num_draft, temperature, rules

    def feeds(self, logits, draft_tokens, draft_indices, draft_probs, rng: np.random.Generator, edited: bool) -> dict:
        (R, G), V, f32 = draft_tokens.shape, logits.shape[1], np.float32
        counts, rules = self.num_draft + 1, np.array(self.rules)
        wide = np.flatnonzero((rules != "greedy") | edited)
        firsts = np.zeros(R, np.int64)
        firsts[wide] = np.cumsum(counts[wide]) - counts[wide]
        rows_of = lambda requests, first: np.concatenate(
            [[], *(first[r] + np.arange(counts[r]) for r in requests)]
        ).astype(np.int64)
        spread = lambda requests, values: np.repeat(np.asarray(values)[requests], counts[requests])
        wide_rows, drawn = rows_of(wide, self.row_index[:, 0]), np.flatnonzero(rules == "rejection")
        matched = [r for r in wide if rules[r] != "rejection"]
        match_rows = rows_of(matched, firsts)
        sampled = np.flatnonzero(rules != "greedy") if edited else np.zeros(0, np.int64)
        coupled = spread(matched, rules == "coupled") if len(matched) else np.zeros(0, bool)
        E = min(V, 40) if edited else 0
        M = len(wide_rows)
        edit_at = np.stack(
            [np.repeat(np.arange(M), E), np.concatenate([rng.permutation(V)[:E] for _ in range(M)] or [[]])], 1
        )
        ban = rng.random(M * E) < 0.1
        every = np.arange(R) if edited else np.zeros(0, np.int64)
        slots = [np.arange(counts[r]) for r in every]
        return dict(
            logits=logits,
            row_index=self.row_index,
            draft_tokens=draft_tokens,
            num_draft=self.num_draft,
            wide_rows=wide_rows,
            temperature=spread(wide, np.where(self.temperature > 0, self.temperature, 1)).astype(f32),
            edit_at=edit_at.astype(np.int64),
            edit_scale=(0.7 + rng.random(M * E)).astype(f32),
            edit_add=np.where(ban, -np.inf, rng.standard_normal(M * E)).astype(f32),
            filter_rows=rows_of(sampled, firsts),
            top_k=spread(sampled, rng.choice([V, min(20, V)], R)),
            top_p=spread(sampled, rng.choice([1, 0.9], R)).astype(f32),
            min_p=spread(sampled, rng.choice([0, 0.01], R)).astype(f32),
            top_count=np.array([V]),
            match_rows=match_rows,
            noise=(rng.gumbel(size=(len(match_rows), V)) * coupled[:, None]).astype(f32),
            match_filtered=np.flatnonzero(coupled & edited),
            sample_index=drawn,
            sample_rows=self.row_index[drawn] - self.row_index[drawn, :1] + firsts[drawn, None],
            draft_rows=np.arange(len(drawn)),
            draft_indices=draft_indices[drawn],
            draft_probs=draft_probs,
            accept_uniforms=rng.random((len(drawn), G), dtype=f32),
            next_uniforms=rng.random((len(drawn), G + 1), dtype=f32),
            log_prob_rows=rows_of(every, self.row_index[:, 0]),
            log_prob_at=np.stack([np.repeat(every, counts[every]), np.concatenate([[], *slots])], 1).astype(np.int64),
        )
