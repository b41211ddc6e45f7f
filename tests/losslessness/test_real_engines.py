"""The distribution of sampled outputs through real ONNX Runtime engines: target, draft and confidence models with
weights."""

from itertools import product

import numpy as np
import pytest

import engines
from decoding.compare import next_logits
from decoding.loop import Loop
from decoding.request import Request, SamplingParams
from tests.bundles import tiny_bundle
from tests.decoding.drive import drive, tokens
from tests.losslessness.driving import SCHEDULES, make
from tests.losslessness.exact import BOUND, outputs, p_values

VOCAB, LENGTH, PROMPT = 8, 4, (1, 5, 2)


class Small:
    """A real bundle of vocabulary 8, and the exact chance of every continuation of PROMPT."""

    def __init__(self, folder, draft):
        self.engines = engines.load(tiny_bundle(folder, vocab=VOCAB, depth=2, block_size=3, **draft), threads=1)
        prefixes = [p for length in range(LENGTH) for p in product(range(VOCAB), repeat=length)]
        logits = {(*PROMPT, *prefix): next_logits(self.engines, [*PROMPT, *prefix]) for prefix in prefixes}
        request = Request("exact", PROMPT, SamplingParams(LENGTH, 1.0, ignore_eos=True))
        self.exact = outputs(logits.__getitem__, request, ())

    def draw(self, schedule, samples):
        """[samples] continuations of PROMPT, one seed each, 64 at a time, greedy neighbours among them."""
        todo = []
        for i in range(samples):
            todo.append(Request(i, PROMPT, SamplingParams(LENGTH, 1.0, seed=i * 7919, ignore_eos=True)))
            if i % 50 == 0:
                todo.append(Request(("greedy", i), PROMPT + (3,), SamplingParams(2 + i // 50 % 5, ignore_eos=True)))
        got = tokens(drive(Loop(self.engines, make(schedule, G=3), max_requests=64), todo))
        return [tuple(got[i]) for i in range(samples)]


DRAFTS = {
    "whole": dict(rank=4),
    "trimmed": dict(rank=4, draft_vocab=5),
    "eagle3": dict(kind="eagle3"),
    "mtp": dict(kind="mtp", layers=2, draft_vocab=5),
}


@pytest.fixture(scope="module", params=DRAFTS)
def small(request, tmp_path_factory):
    """The draft's vocabulary: all 8 tokens, or 5 of them (trimmed, mtp)."""
    return Small(tmp_path_factory.mktemp(request.param), DRAFTS[request.param])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sampled_distribution_is_the_targets(small, schedule):
    if small.engines.bundle.draft.autoregressive and schedule not in ("fixed", "lagged"):
        pytest.skip("with more draws below")
    values = p_values(small.draw(schedule, 6_000), small.exact)
    assert min(values) > BOUND, values


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sampled_distribution_is_the_targets_with_more_draws(small, schedule):
    values = p_values(small.draw(schedule, 60_000), small.exact)
    assert min(values) > BOUND, values


def test_the_exact_table_is_a_distribution(small):
    chances = np.array([*small.exact.values()])
    assert chances.sum() == pytest.approx(1) and chances.max() < 0.5
