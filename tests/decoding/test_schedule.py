import numpy as np
import pytest

from decoding.schedule import Fixed, NoDraft, RoundState, Threshold, make


def state(confidence, threshold=None):
    confidence = np.array(confidence, np.float32)
    R = len(confidence)
    own = np.full(R, np.nan) if threshold is None else np.array(threshold)
    return RoundState(confidence, own, context=1.0)


ROWS = [[0.9, 0.8, 0.4, 0.9], [0.4, 0.9, 0.9, 0.9], [0.9, 0.9, 0.9, 0.9]]


def test_lengths():
    assert NoDraft().lengths(state(ROWS)).tolist() == [0, 0, 0]
    assert Fixed().lengths(state(ROWS)).tolist() == [4, 4, 4]
    assert Fixed(2).lengths(state(ROWS)).tolist() == [2, 2, 2]
    assert Threshold(0.5).lengths(state(ROWS)).tolist() == [2, 0, 4]
    assert Threshold(0.4).lengths(state([[0.5, 0.4], [0.5, 0.39]])).tolist() == [2, 1]


def test_a_requests_own_threshold_goes_first():
    assert Threshold(0.5).lengths(state(ROWS, [0.95, np.nan, 0.3])).tolist() == [0, 0, 4]


def test_survival_is_the_running_product():
    np.testing.assert_allclose(state([[0.5, 0.5, 1.0]]).survival, [[0.5, 0.25, 0.25]])


@pytest.mark.parametrize("scheduler", [Fixed(), Fixed(3), Threshold(0.3), Threshold(0.7)])
def test_causal_later_confidences_never_change_an_earlier_decision(scheduler):
    rng = np.random.default_rng(0)
    for _ in range(50):
        before = rng.uniform(size=(1, 6))
        lengths = scheduler.lengths(state(before))
        for k in range(6):
            changed = before.copy()
            changed[:, k + 1 :] = rng.uniform(size=(1, 5 - k))
            assert (scheduler.lengths(state(changed)) > k) == (lengths > k)


def test_make():
    assert make("threshold", 0.25).threshold == 0.25 and make("threshold").threshold == 0.5
    assert not make("none").drafts and make("fixed").drafts
    with pytest.raises(ValueError, match="schedule is 'best'; it must be one of none, fixed, threshold."):
        make("best")
    with pytest.raises(ValueError, match="threshold is nan"):
        make("threshold", float("nan"))
