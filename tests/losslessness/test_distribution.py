"""Whole outputs against the target's exact distribution, for every scheduler and accept rule, in batches of 1 to 8 and
of 64.

One loop holds requests of every kind at once: temperatures, filters, penalties, bans, greedy and plain ones; they join
and leave at any step, prompts are fed in chunks beside decoding, drafts are skipped and probed. Coupled: the
distribution over seeds.
"""

from functools import cache

import numpy as np
import pytest

from decoding.loop import Loop
from decoding.request import Request, SamplingParams
from tests.losslessness.driving import SCHEDULES, make, run
from tests.losslessness.exact import BOUND, outputs, p_values
from tests.losslessness.table import EOS

LENGTH = 5
KINDS = {
    "plain temperature 1": ((1, 2, 3), dict()),
    "temperature 0.7": ((4, 0), dict(temperature=0.7)),
    "temperature 1.5, ends": ((3, 3, 1, 2), dict(temperature=1.5, ignore_eos=False)),
    "top_k": ((2, 6), dict(top_k=3)),
    "top_p": (tuple(range(7)) * 3 + (0, 4), dict(temperature=1.7, top_p=0.6)),
    "min_p, repetition": ((6, 1, 1), dict(temperature=0.9, min_p=0.12, repetition_penalty=1.4)),
    "edits": (
        (0, 3) * 5,
        dict(presence_penalty=0.7, frequency_penalty=0.4, bad_words=((1,), (2, 4), (0, 3, 6)),
             logit_bias=((3, 1.5), (6, -1.0))),
    ),
    "greedy with penalties": ((5, 1), dict(temperature=0.0, frequency_penalty=0.9, repetition_penalty=1.2)),
    "all filters, min_tokens": ((2,), dict(temperature=1.2, top_k=6, top_p=0.9, min_p=0.05, min_tokens=2,
                                             ignore_eos=False)),
    "target alone": ((7, 1, 4), dict(speculative=False)),
}  # fmt: skip


def params(kind: str, **more) -> SamplingParams:
    return SamplingParams(**{"max_tokens": LENGTH, "temperature": 1.0, "ignore_eos": True, **KINDS[kind][1], **more})


def todo(kinds, each: int, first_seed: int, **more) -> list[Request]:
    """`each` requests of every kind, interleaved, a seed of its own each; the id is (kind, number)."""
    rng = np.random.default_rng(first_seed)
    order = rng.permutation(np.repeat(np.arange(len(kinds)), each))
    return [
        Request((kinds[k], i), KINDS[kinds[k]][0], params(kinds[k], seed=first_seed + i, **more))
        for i, k in enumerate(order)
    ]


def draw(loop: Loop, requests: list[Request]) -> dict[str, list[tuple[int, ...]]]:
    """{kind: outputs}. Every 50th request is cancelled on the way (and not counted)."""
    cancelled = {r.id for r in requests if r.id[1] % 50 == 49}
    kinds: dict[str, list] = {}
    for id, tokens in run(loop, requests, cancelled).items():
        if id not in cancelled:
            kinds.setdefault(id[0], []).append(tuple(tokens))
    return kinds


@cache
def _exact(engines, kind: str) -> dict[tuple[int, ...], float]:
    target = engines.table.target
    logits = lambda ids: target[ids[-2] if len(ids) > 1 else 0, ids[-1]]
    return outputs(logits, Request(kind, KINDS[kind][0], params(kind)), (EOS,))


def worst(engines, drawn: dict[str, list]) -> dict[str, float]:
    """The least p-value of each kind."""
    return {kind: min(p_values(each, _exact(engines, kind))) for kind, each in drawn.items()}


def test_the_tables_are_distributions(jagged):
    for kind in KINDS:
        exact = _exact(jagged, kind)
        assert sum(exact.values()) == pytest.approx(1)
        assert len(exact) == 1 if "greedy" in kind else len(exact) > 50 and max(exact.values()) < 0.3
    assert any(len(o) < LENGTH for o in _exact(jagged, "temperature 1.5, ends"))
    assert min(len(o) for o in _exact(jagged, "all filters, min_tokens")) == 3
    assert all(1 not in o for o in _exact(jagged, "edits"))


def mixed_draw(engines, schedule, accept, each=4, wide=400):
    """{kind: outputs} over batches of 1 to 8 (`each` x batch requests of every kind) and one of 64 (`wide`)."""
    drawn: dict[str, list] = {}
    for batch, count in [*((b, each * b) for b in range(1, 9)), (64, wide)]:
        if not count:
            continue
        loop = Loop(engines, make(schedule), max_requests=batch, token_budget=max(12, 4 * batch), accept=accept)
        for kind, each_output in draw(loop, todo([*KINDS], count, 10_000 * batch)).items():
            drawn.setdefault(kind, []).extend(each_output)
        if schedule == "lagged" and batch == 3:
            assert loop.metrics.rounds_without_draft and loop.metrics.drafts, "skipping and probing must take part"
    return drawn


@pytest.mark.parametrize("accept", ["rejection", "coupled"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_outputs_have_the_targets_distribution(jagged, schedule, accept):
    values = worst(jagged, mixed_draw(jagged, schedule, accept))
    assert min(values.values()) > BOUND, values


@pytest.mark.slow
@pytest.mark.parametrize("accept", ["rejection", "coupled"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_outputs_have_the_targets_distribution_with_more_draws(jagged, schedule, accept):
    values = worst(jagged, mixed_draw(jagged, schedule, accept, each=60, wide=10_000))
    assert min(values.values()) > BOUND, values
