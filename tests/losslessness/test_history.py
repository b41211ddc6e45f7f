"""What a load-aware scheduler remembers must tell nothing about a token still to be drawn.

`lagged` takes its budget from the confidences of two rounds before, those of discarded draft tokens included, and skips
drafts by what came of past ones. If a draft's uniform came back (keyed by its position, say), the past would reveal the
present. The model: target (0.7, 0.3), draft (0.5, 0.5) everywhere, and confidences that tell what x_k was.
"""

import numpy as np
import pytest

from decoding import random
from decoding.loop import Loop
from decoding.random import DRAFT
from decoding.request import Request, SamplingParams, Sequence
from decoding.twins import Twins
from engines.sps import Sps
from tests.losslessness.driving import make, run
from tests.losslessness.exact import BOUND, p_value
from tests.losslessness.schedulers import SkipsByTheLast, TwoRoundsAgo
from tests.losslessness.table import NEVER, G, Table, TableEngines, V
from tests.losslessness.test_counterexample import first_tokens

A, B = 0, 1
SPEEDS = [1.0, 0.27, 0.27, 0.27, 0.27]  # a whole block pays when all its confidences are 0.9, else nothing does
TARGET = np.array([0.7, 0.3])


def telling(slot: int) -> Table:
    """The confidence of `slot` (from 0) is 0.9 if the draft token before it is A, else 0; the other slots' are 0.9."""
    two = lambda a, b: np.array([np.log(a), np.log(b), *[NEVER] * (V - 2)], np.float32)
    high = np.float32(np.log(9.0))
    confidence = np.full((G, V, V, V), high, np.float32)
    confidence[slot], confidence[slot, :, :, A] = -60.0, high
    return Table(np.broadcast_to(two(0.7, 0.3), (V, V, V)), np.broadcast_to(two(0.5, 0.5), (G, V, V, V)), confidence)


@pytest.fixture
def keyed_by_position(monkeypatch):
    """The mutation: a draft token's uniform is that of its position, so a token drafted twice is drawn twice alike."""
    monkeypatch.setattr(Sequence, "draft_uniforms", by_position)


def by_position(s: Sequence, slots: int) -> np.ndarray:
    return random.uniforms(s.request.params.seed, len(s.tokens) + np.arange(slots), DRAFT)


def budgets_of_two_rounds_before(flat_graphs, draws):
    """The third draft token of a round stands where the first of two rounds later stands, if nothing was verified."""
    engines = TableEngines(flat_graphs, telling(slot=3))
    return first_tokens(engines, TwoRoundsAgo(SPEEDS, 500), draws=draws)


def skipping_by_the_last_draft(flat_graphs, draws):
    """The second draft token of a round stands where the first of the next round stands."""
    engines = TableEngines(flat_graphs, telling(slot=2))
    return first_tokens(engines, SkipsByTheLast(slot=2), draws=draws, rows=1)


CASES = {budgets_of_two_rounds_before: (20_000, 60_000), skipping_by_the_last_draft: (2_000, 5_000)}


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.__name__)
def test_draft_uniforms_keyed_by_position_leak(flat_graphs, case, keyed_by_position):
    counts = case(flat_graphs, CASES[case][0])
    assert p_value(counts, counts.sum() * TARGET) < BOUND, counts / counts.sum()


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.__name__)
def test_history_tells_nothing(flat_graphs, case):
    counts = case(flat_graphs, CASES[case][1])
    assert p_value(counts, counts.sum() * TARGET) > BOUND, counts / counts.sum()


def beside_a_twin(flat_graphs, pairs) -> np.ndarray:
    """[2] counts: the first drafted token of a request that decodes beside another one with the same seed, under
    `causal`.

    The other's prompt makes its survivals 0.95 and then 0.89 if its x_1 is A, this one's 0.88. The fourth token of a
    step is cheap and the fifth is dear: this one's x_1 is verified only if the other's x_1 is B, the same token if they
    share their draft uniforms.
    """
    logit = lambda c: np.float32(np.log(c / (1 - c)))
    this, other = 2, 3  # last tokens of the prompts: the token before the first anchor
    confidence = np.full((G, V, V, V), -60.0, np.float32)
    confidence[0, other], confidence[1, other, :, A], confidence[0, this] = logit(0.95), logit(0.94), logit(0.88)
    sps = Sps.from_points(
        [(2, n, 0, ms) for n, ms in ((2, 1.0), (3, 1.05), (4, 1.1), (5, 9.0), (10, 30.0))], [(2, 0, 1e-6)]
    )
    loop = Loop(
        TableEngines(flat_graphs, telling(slot=1).changed(confidence=confidence)), make("causal", sps), max_requests=2
    )
    params = lambda seed: SamplingParams(2, 1.0, seed=seed, ignore_eos=True)
    firsts = []
    for seed in range(pairs):
        got = run(
            loop, [Request("other", (A, other), params(seed)), Request("this", (A, this), params(seed))], burst=64
        )
        firsts.append(got["this"][1])
    assert 0.2 < loop.metrics.verified_tokens / (4 * pairs), "nothing was verified: the test would prove nothing"
    return np.bincount(firsts, minlength=2)


def test_requests_with_equal_seeds_leak_without_twin_numbers(flat_graphs, monkeypatch):
    monkeypatch.setattr(Twins, "take", lambda self, seed: 0)
    monkeypatch.setattr(Twins, "end", lambda self, seed, number: None)
    counts = beside_a_twin(flat_graphs, 1_000)
    assert p_value(counts, counts.sum() * TARGET) < BOUND, counts / counts.sum()


def test_requests_with_equal_seeds_tell_each_other_nothing(flat_graphs):
    counts = beside_a_twin(flat_graphs, 2_000)
    assert p_value(counts, counts.sum() * TARGET) > BOUND, counts / counts.sum()
