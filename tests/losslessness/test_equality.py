"""Greedy and coupled decoding on real engines: token for token the text of the target alone, whatever schedules it."""

import numpy as np
import pytest

import engines
from decoding.compare import top_gap
from decoding.loop import Loop
from decoding.request import Request, SamplingParams
from tests.bundles import tiny_bundle
from tests.decoding.drive import drive, prompts, requests, tokens
from tests.losslessness.driving import DRAFTING, make, run

NEAR_TIE = 1e-5  # of the top two logits: the tiny bundles are float32
TEXTS = prompts(40, seed=11, high=60)


def alone(loaded, todo, **options):
    """The target alone, one request at a time."""
    return tokens(drive(Loop(loaded, make("none"), max_requests=1, **options), todo))


def equal_but_for_near_ties(loaded, todo, want, have):
    """Number of near-ties; fails for any other difference."""
    near = 0
    for request in todo:
        a, b = want[request.id], have[request.id]
        if a != b:
            at = next((k for k, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
            assert top_gap(loaded, [*request.prompt_ids, *a[:at]]) < NEAR_TIE, (request.id, at)
            near += 1
    return near


@pytest.fixture(scope="module")
def greedy_alone(tiny):
    return alone(tiny, requests(TEXTS, max_tokens=24))


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("schedule", DRAFTING)
def test_greedy_output_is_the_targets(tiny, greedy_alone, schedule, batch):
    todo = requests(TEXTS, max_tokens=24)
    loop = Loop(tiny, make(schedule), max_requests=batch, token_budget=40)
    have = run(loop, todo)
    assert equal_but_for_near_ties(tiny, todo, greedy_alone, have) == 0, "the tiny bundle has no near-ties: look closer"
    assert 0 < loop.metrics.accepted_tokens < loop.metrics.verified_tokens


@pytest.mark.parametrize(
    "draft",
    [
        dict(head="gated"),
        dict(head="rnn", confidence="hidden"),
        dict(rank=0, confidence=None),
        dict(layer_ids=(-1, 1), layers=2),
        dict(rank=0, confidence=None, sample_from_anchor=False),
        dict(sample_from_anchor=False, layers=2),
        dict(kind="eagle3", draft_vocab=40),
        dict(kind="mtp", layers=2),
    ],
    ids=["gated", "rnn", "dflash", "embedding-output", "dflash-anchor-idle", "vanilla-anchor-idle", "eagle3", "mtp"],
)
def test_greedy_output_is_the_targets_with_every_head(tmp_path, draft):
    loaded = engines.load(tiny_bundle(tmp_path, family="qwen3", **draft), threads=1)
    todo = requests(TEXTS[:12], max_tokens=24)
    want = alone(loaded, todo)
    for schedule in DRAFTING:
        assert tokens(drive(Loop(loaded, make(schedule), max_requests=5), todo)) == want


def mixed(accept):
    """Requests of all sorts: what a coupled request's text may depend on, and greedy and rejection ones between
    them."""
    rng = np.random.default_rng(5)
    todo = []
    for i, text in enumerate(TEXTS):
        params = dict(
            max_tokens=20,
            seed=int(rng.integers(1 << 40)),
            temperature=float(rng.choice([0.5, 0.8, 1.0, 1.6])),
            accept=accept,
        )
        params |= [
            {}, dict(top_k=7), dict(top_p=0.8), dict(min_p=0.05), dict(repetition_penalty=1.3, frequency_penalty=0.5),
            dict(logit_bias=((5, 2.0), (9, -3.0)), bad_words=((4,), (7, 8)), min_tokens=6), dict(temperature=0.0),
            dict(return_log_probs=True),
        ][i % 8]  # fmt: skip
        todo.append(Request(i, text, SamplingParams(**params)))
    return todo


@pytest.fixture(scope="module")
def coupled_alone(tiny):
    return alone(tiny, mixed("coupled"))


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("schedule", DRAFTING)
def test_coupled_output_is_the_targets_for_the_seed(tiny, coupled_alone, schedule, batch):
    todo = mixed("coupled")
    beside = [Request(("beside", i), r.prompt_ids, r.params) for i, r in enumerate(mixed("rejection")[:10])]
    both = [r for pair in zip(todo, beside) for r in pair] + todo[len(beside) :]
    loop = Loop(tiny, make(schedule), max_requests=batch, token_budget=40)
    have = run(loop, both)
    assert {r.id: have[r.id] for r in todo} == coupled_alone
    assert 0 < loop.metrics.accepted_tokens < loop.metrics.verified_tokens


def test_seeds_matter(tiny, coupled_alone):
    """Otherwise equality would prove nothing."""
    other = [
        Request(r.id, r.prompt_ids, SamplingParams(**{**r.params.__dict__, "seed": r.params.seed + 1}))
        for r in mixed("coupled")
    ]
    have = alone(tiny, other)
    same = sum(have[i] == coupled_alone[i] for i in have)
    assert same < len(have) / 3
