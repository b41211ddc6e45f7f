"""The rule that outranks speed: speculation changes no output. Greedy equality, and at temperature 1 the distribution."""

import math
from itertools import product

import numpy as np
import pytest

import engines
from decoding.compare import next_logits
from decoding.loop import Loop
from decoding.random import ACCEPT, DRAFT
from decoding.request import Request, SamplingParams, Sequence
from decoding.schedule import Fixed, NoDraft, Scheduler, Threshold
from tests.bundles import tiny_bundle
from tests.decoding.drive import drive, prompts, requests, tokens

VOCAB, LENGTH, SAMPLES, PROMPT = 8, 4, 20_000, (1, 5, 2)
FEWER = 5_000  # enough to see every fault below: the same test, with less evidence than it passes with
BOUND = 1e-4  # least p-value of the chi-square test; the seeds are fixed, so a pass stays a pass


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("scheduler", [Fixed(), Threshold(0.5)], ids=["fixed", "threshold"])
def test_greedy_output_is_the_targets(tiny, scheduler, batch):
    todo = requests(prompts(40, seed=11, high=60), max_tokens=24)
    want = tokens(drive(Loop(tiny, NoDraft(), max_requests=1), todo))
    assert tokens(drive(Loop(tiny, scheduler, max_requests=batch), todo)) == want


@pytest.mark.parametrize(
    "draft",
    [
        dict(head="gated"),
        dict(head="rnn", confidence="hidden"),
        dict(rank=0, confidence=None),
        dict(layer_ids=(-1, 2), layers=2),
    ],
    ids=["gated", "rnn", "dflash", "embedding-output"],
)
def test_greedy_output_is_the_targets_with_every_head(tmp_path, draft):
    loaded = engines.load(tiny_bundle(tmp_path, family="qwen3", **draft), threads=1)
    todo = requests(prompts(12, seed=2), max_tokens=24)
    want = tokens(drive(Loop(loaded, NoDraft(), max_requests=1), todo))
    assert tokens(drive(Loop(loaded, Fixed(), max_requests=5), todo)) == want


# -- temperature 1 -----------------------------------------------------------------------------------------------------


def make_small(folder, draft_vocab):
    """(engines, exact [8^4] probabilities of every continuation of PROMPT, first token slowest)."""
    loaded = engines.load(
        tiny_bundle(folder, vocab=VOCAB, depth=2, rank=4, block_size=3, draft_vocab=draft_vocab), threads=1
    )
    exact = np.ones(1)
    for length in range(LENGTH):
        rows = [softmax(next_logits(loaded, [*PROMPT, *prefix])) for prefix in product(range(VOCAB), repeat=length)]
        exact = (exact[:, None] * np.stack(rows)).reshape(-1)
    return loaded, exact


@pytest.fixture(scope="module")
def trimmed(tmp_path_factory):
    """A draft vocabulary of 5 of the 8 tokens."""
    return make_small(tmp_path_factory.mktemp("trimmed"), 5)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_small(tmp_path_factory.mktemp("whole"), None)


def softmax(logits):
    e = np.exp(logits.astype(np.float64) - logits.max())
    return e / e.sum()


def sample(loaded, scheduler, samples=SAMPLES, temperature=1.0):
    """[samples, LENGTH] continuations of PROMPT, one seed each, 64 at a time, greedy neighbours among them."""
    todo = [
        Request(i, PROMPT, SamplingParams(LENGTH, temperature, seed=i * 7919, ignore_eos=True)) for i in range(samples)
    ]
    beside = [
        Request(("greedy", i), PROMPT + (3,), SamplingParams(2 + i % 5, ignore_eos=True)) for i in range(samples // 50)
    ]
    mixed = [r for i, request in enumerate(todo) for r in ((request, beside[i // 50]) if i % 50 == 0 else (request,))]
    got = tokens(drive(Loop(loaded, scheduler, max_requests=64), mixed))
    return np.array([got[i] for i in range(samples)])


def p_value(drawn, exact):
    """Chi-square test of [samples, LENGTH] tokens against exact cell probabilities; cells under 5 expected are pooled."""
    cells = np.ravel_multi_index(drawn.T, (VOCAB,) * drawn.shape[1])
    observed, expected = np.bincount(cells, minlength=len(exact)), exact * len(drawn)
    rare = expected < 5
    observed = np.append(observed[~rare], observed[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    if expected[-1] == 0:
        observed, expected = observed[:-1], expected[:-1]
    chi, degrees = ((observed - expected) ** 2 / expected).sum(), len(expected) - 1
    # Wilson and Hilferty: (chi / degrees)^(1/3) is close to normal.
    z = ((chi / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))
    return 0.5 * math.erfc(z / math.sqrt(2))


def p_values(drawn, exact):
    """Of the joint distribution, and of every position's own."""
    table = exact.reshape((VOCAB,) * LENGTH)
    alone = [p_value(drawn[:, [k]], table.sum(axis=tuple(j for j in range(LENGTH) if j != k))) for k in range(LENGTH)]
    return [p_value(drawn, exact), *alone]


@pytest.mark.parametrize("scheduler", [Fixed(), Threshold(0.5)], ids=["fixed", "threshold"])
@pytest.mark.parametrize("vocabulary", ["whole", "trimmed"])
def test_sampled_distribution_is_the_targets(request, vocabulary, scheduler):
    loaded, exact = request.getfixturevalue(vocabulary)
    values = p_values(sample(loaded, scheduler), exact)
    assert min(values) > BOUND, values


def test_the_exact_table_is_a_distribution_that_plain_sampling_follows(trimmed):
    loaded, exact = trimmed
    assert exact.sum() == pytest.approx(1) and exact.max() < 0.5
    values = p_values(sample(loaded, NoDraft(), 5000), exact)
    assert min(values) > BOUND, values


class Broken:
    """The real engines with a verify whose inputs are changed on purpose."""

    def __init__(self, engines, change):
        self.engines, self.change = engines, change

    def __getattr__(self, name):
        return getattr(self.engines, name)

    def verify(self, batch):
        changed = {**batch.__dict__, **self.change(batch)}
        return self.engines.verify(type(batch)(**changed))


class LooksAhead(Scheduler):
    """Not causal: verifies up to the slot with the highest confidence of all (the paper's Appendix A)."""

    drafts = uses_confidence = True

    def lengths(self, state):
        return state.confidence.argmax(axis=1)


BREAKS = {
    "accepts everything": lambda b: {"accept_uniforms": np.zeros_like(b.accept_uniforms)},
    "accepts too much": lambda b: {"accept_uniforms": b.accept_uniforms * np.float32(0.8)},
    "wrong draft distribution": lambda b: {"draft_probs": np.full_like(b.draft_probs, 1 / b.draft_probs.shape[-1])},
    "slots off by one": lambda b: {"draft_probs": np.ascontiguousarray(np.roll(b.draft_probs, 1, axis=1))},
    "next token from the accept uniform": lambda b: {
        "next_uniforms": np.concatenate([b.accept_uniforms, b.next_uniforms[:, :1]], axis=1)
    },
}


@pytest.mark.parametrize("name", BREAKS)
def test_the_test_fails_when_the_accept_rule_is_broken(trimmed, name):
    loaded, exact = trimmed
    values = p_values(sample(Broken(loaded, BREAKS[name]), Fixed(), FEWER), exact)
    assert min(values) < BOUND, values


def test_the_test_fails_when_accept_and_draft_share_their_randomness(trimmed, monkeypatch):
    loaded, exact = trimmed
    honest = Sequence.uniforms
    monkeypatch.setattr(
        Sequence, "uniforms", lambda s, purpose, n: honest(s, DRAFT if purpose == ACCEPT else purpose, n)
    )
    values = p_values(sample(loaded, Fixed(), FEWER), exact)
    assert min(values) < BOUND, values


def test_the_test_fails_for_a_scheduler_that_looks_ahead(trimmed):
    loaded, exact = trimmed
    values = p_values(sample(loaded, LooksAhead(), 2 * FEWER), exact)
    assert min(values) < BOUND, values
