"""The paper's Appendix A, through the real loop: target (0.7, 0.3), draft (0.5, 0.5), a_1 = 0.8, c_2 = 0.9 after A and
0 after B, steps per second 1.0, 0.5, 0.45 for 1, 2, 3 tokens. A retrospective argmax turns the target's (0.7, 0.3) into
(0.85, 0.15)."""

import numpy as np
import pytest

from decoding.loop import Loop
from decoding.request import Request, SamplingParams
from engines.sps import Sps
from tests.losslessness.driving import make
from tests.losslessness.exact import BOUND, p_value
from tests.losslessness.schedulers import APPENDIX_A, Alone, Retrospective
from tests.losslessness.table import NEVER, G, Table, TableEngines, V

DRAWS = 200_000
ROWS = 500
A, B = 0, 1


def appendix_a() -> Table:
    """The first position of every round is Appendix A's, whatever came before."""
    two = lambda a, b: np.array([np.log(a), np.log(b), *[NEVER] * (V - 2)], np.float32)
    target = np.broadcast_to(two(0.7, 0.3), (V, V, V))
    base = np.broadcast_to(two(0.5, 0.5), (G, V, V, V))
    logit = lambda c: np.float32(np.log(c / (1 - c)))
    confidence = np.full((G, V, V, V), -60.0, np.float32)  # slots 2.. never pay
    confidence[0] = logit(0.8)
    confidence[1, :, :, A] = logit(0.9)
    return Table(target, base, confidence)


def first_tokens(engines, scheduler, draws=DRAWS, rows=ROWS, **loop_options) -> np.ndarray:
    """[2] counts of A and B: the first token of every decode round, `rows` requests at once, each with a seed of its
    own."""
    loop = Loop(engines, scheduler, max_requests=rows, token_budget=1 << 20, **loop_options)
    counts, made, seed = np.zeros(2, np.int64), 0, 0
    while made < draws:
        while loop.active + loop.waiting < rows:
            loop.add(Request(seed, (A,), SamplingParams(300, 1.0, seed=seed, ignore_eos=True)))
            seed += 1
        outputs = loop.step()
        assert not [o.error for o in outputs if o.error], [o.error for o in outputs if o.error][0]
        firsts = [o.token_ids[0] for o in outputs if o.stats is not None]
        counts += np.bincount(firsts, minlength=2)
        made += len(firsts)
    return counts


@pytest.fixture(scope="module")
def paper(flat_graphs):
    return TableEngines(flat_graphs, appendix_a())


def retrospective():
    return Retrospective([APPENDIX_A[1], APPENDIX_A[2], APPENDIX_A[3]])


def test_a_retrospective_argmax_fails_as_the_paper_says(paper):
    counts = first_tokens(paper, retrospective(), draws=60_000)
    share = counts / counts.sum()
    assert share == pytest.approx([0.85, 0.15], abs=0.006), share
    assert p_value(counts, counts.sum() * np.array([0.7, 0.3])) < BOUND


def paper_sps() -> Sps:
    """APPENDIX_A as milliseconds of one request's step; the draft is all but free."""
    return Sps.from_points([(1, n, 0, 1.0 / speed) for n, speed in APPENDIX_A.items()], [(1, 0, 1e-6)])


@pytest.mark.parametrize("schedule", ["causal", "lagged"])
def test_the_shipped_schedulers_keep_the_target(paper, schedule):
    """Each request with a scheduler of its own, as in the paper."""
    sps = paper_sps()
    scheduler = Alone(lambda: make(schedule, sps), ROWS)
    keeps(first_tokens(paper, scheduler))
    assert (scheduler.admitted > 0) == (schedule == "lagged")  # Algorithm 1 stops before slot 1, whatever x_1 is


@pytest.mark.parametrize("schedule", ["causal", "lagged"])
def test_the_shipped_schedulers_keep_the_target_one_request_at_a_time(paper, schedule):
    """Without the wrapper: the loop's own skipping and probing."""
    keeps(first_tokens(paper, make(schedule, paper_sps()), draws=2_500, rows=1), draws=2_500)


def keeps(counts, draws=DRAWS):
    share = counts / counts.sum()
    assert counts.sum() >= draws and share == pytest.approx([0.7, 0.3], abs=5 * (0.21 / draws) ** 0.5), share
    assert p_value(counts, counts.sum() * np.array([0.7, 0.3])) > BOUND, share
