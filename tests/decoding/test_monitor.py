import logging

import numpy as np
import pytest

from decoding.monitor import BINS, FLUSH, CalibrationMonitor
from decoding.trace import RoundTrace

G = 4


def trace(survival, verified, accepted):
    R = len(verified)
    return RoundTrace(
        list(range(R)), np.asarray(verified) > 0, None, survival, np.asarray(verified), np.asarray(accepted),
        np.zeros(R, np.float32), 0.0, 0.0, 0.0, 0.0, 0.0, int(np.sum(verified)), 0,
    )  # fmt: skip


def traffic(monitor, steps, *, shift=0.0, seed=0, R=16, lengths=None):
    """Steps whose tokens survive with chances drawn from 0.3..1, of which the draft predicts `shift` more on the logit scale."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        chance = rng.uniform(0.3, 1.0, (R, G))
        told = 1 / (1 + np.exp(-np.log(chance / (1 - chance)) - shift))
        accepted = np.cumprod(rng.random((R, G)) < chance, axis=1).sum(axis=1)
        survival = np.cumprod(told, axis=1).astype(np.float32)
        verified = np.full(R, G) if lengths is None else lengths(survival)
        monitor.round(trace(survival, verified, np.minimum(accepted, verified)))
    monitor.flush()
    return monitor


def test_one_verdict_by_hand():
    monitor = CalibrationMonitor(G, window=1e9, minimum=1)
    survival = np.array([[0.85, 0.65, 0.45, 0.25], [0.85, 0.35, 0.15, 0.05]], np.float32)
    monitor.round(trace(survival, [3, 1], [1, 0]))
    monitor.flush()
    np.testing.assert_allclose(monitor.weight, [2, 1, 1, 0])
    np.testing.assert_allclose(monitor.predicted, [0.85, 0.65, 0.45, np.nan], rtol=1e-6)
    np.testing.assert_allclose(monitor.observed, [0.5, 0.0, 0.0, np.nan])
    # position 1: both in one bin, |0.85 - 0.5|
    np.testing.assert_allclose(monitor.error, [0.35, 0.65, 0.45, np.nan], rtol=1e-6)


def test_errors_of_opposite_sign_do_not_cancel_between_bins():
    monitor = CalibrationMonitor(1, window=1e9, minimum=1)
    monitor.round(trace(np.array([[0.9], [0.1]]), [1, 1], [0, 1]))
    monitor.flush()
    assert monitor.error[0] == pytest.approx(0.9)
    assert monitor.predicted[0] == monitor.observed[0] == pytest.approx(0.5)


def test_a_certain_prediction_falls_into_the_last_bin():
    monitor = CalibrationMonitor(1, window=1e9, minimum=1)
    monitor.round(trace(np.ones((3, 1), np.float32), [1, 1, 1], [1, 1, 1]))
    monitor.flush()
    assert monitor.error[0] == 0.0 and monitor._sums[0, 0, BINS - 1] == pytest.approx(3)


def test_calibrated_traffic_gives_no_warning():
    monitor = traffic(CalibrationMonitor(G), 400)
    assert monitor.warning is None and monitor.warnings == 0
    assert (monitor.error < 0.05).all()


def test_shifted_traffic_warns_and_the_warning_names_position_error_and_bound(caplog):
    with caplog.at_level(logging.WARNING, "decoding.monitor"):
        monitor = traffic(CalibrationMonitor(G), 400, shift=1.0)
    assert "draft position" in monitor.warning and "bound 0.08" in monitor.warning
    worst = int(np.argmax(monitor.error)) + 1
    assert f"draft position {worst} " in monitor.warning
    assert "\n" not in monitor.warning
    assert monitor.warnings == len(caplog.records) >= 1
    assert (monitor.predicted > monitor.observed).all()


def test_the_selection_by_a_scheduler_does_not_bias_it():
    """Slot k is verified iff its predicted survival is over a bound: the verified ones are still calibrated."""
    monitor = traffic(CalibrationMonitor(G), 1000, lengths=lambda s: (s > 0.4).sum(axis=1))
    assert (monitor.error[:3] < 0.05).all() and monitor.warning is None
    assert monitor.weight[2] < 0.8 * monitor.weight[0]


def test_selection_by_the_outcome_would_show():
    """The counterexample: verifying position k only where x_k survives. The monitor must then be far off."""
    rng, monitor = np.random.default_rng(0), CalibrationMonitor(1)
    for _ in range(400):
        chance = rng.uniform(0.3, 1.0, (16, 1))
        survived = rng.random((16, 1)) < chance
        monitor.round(trace(chance, survived[:, 0].astype(int), survived[:, 0].astype(int)))
    monitor.flush()
    assert monitor.error[0] > 0.2


def test_too_few_verdicts_never_warn():
    monitor = traffic(CalibrationMonitor(G, minimum=1024), 60, shift=3.0)
    assert monitor.warning is None and monitor.error[0] > 0.08 and monitor.weight[0] < 1024


def test_hysteresis_and_recovery():
    monitor = CalibrationMonitor(1, bound=0.1, window=2000, minimum=500)
    rng = np.random.default_rng(0)

    def feed(steps, predicted, chance):
        for _ in range(steps):
            monitor.round(trace(np.full((16, 1), predicted), np.ones(16, int), (rng.random(16) < chance).astype(int)))
        monitor.flush()

    feed(640, 0.75, 0.60)
    assert monitor.warning and monitor.warnings == 1
    feed(640, 0.75, 0.66)  # 0.09: under the bound, over three quarters of it
    assert monitor.error[0] < 0.1 and monitor.warning and monitor.warnings == 1
    feed(640, 0.75, 0.75)
    assert monitor.warning is None
    feed(640, 0.75, 0.66)  # on the way up the same error does not warn
    assert monitor.warning is None and monitor.warnings == 1


def test_the_past_is_forgotten():
    monitor = traffic(CalibrationMonitor(G, window=1000, minimum=500), 400, shift=3.0)
    assert monitor.warning
    assert traffic(monitor, 1000, seed=1).warning is None
    assert monitor.weight[0] == pytest.approx(1000, rel=0.3)


def test_rows_without_a_draft_and_steps_without_confidence_are_left_out():
    monitor = CalibrationMonitor(G, minimum=1)
    survival = np.full((2, G), np.nan, np.float32)
    survival[0] = 0.5
    with np.errstate(all="raise"):
        for _ in range(FLUSH):
            monitor.round(trace(survival, [1, 0], [1, 0]))
            monitor.round(trace(None, [4, 4], [4, 4]))
    assert monitor.weight[0] == pytest.approx(FLUSH) and monitor.weight[1:].sum() == 0
    assert monitor.predicted[0] == pytest.approx(0.5) and np.isnan(monitor.error[1])


def test_a_trace_may_be_overwritten_by_the_next_step():
    monitor, survival = CalibrationMonitor(G, minimum=1), np.full((1, G), 0.5)
    monitor.round(trace(survival, [1], [1]))
    survival[:] = 0.9
    monitor.flush()
    assert monitor.predicted[0] == 0.5


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"bound": 0.0}, "bound is 0.0"), ({"bound": 1.5}, "bound is 1.5"), ({"minimum": 0}, "minimum is 0"), ({"window": 100.0}, "half the window of 100")],
)
def test_options_out_of_range_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        CalibrationMonitor(G, **options)
