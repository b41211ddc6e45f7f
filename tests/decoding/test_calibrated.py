"""The loop uses the bundle's calibration: `sampled` or `greedy` by each request's temperature, in one batch."""

import shutil

import numpy as np
import pytest

import engines
from decoding.loop import Loop
from decoding.monitor import CalibrationMonitor
from decoding.schedule import make
from engines.bundle import update_manifest
from tests.decoding.drive import drive, prompts, requests, tokens

CALIBRATION = {
    "sampled": [2.0, 1.0, 0.5, 1.0], "greedy": [0.5, 1.5, 1.0, 3.0],
    "bias": {"sampled": [-0.5, 0.0, 0.3, 0.0], "greedy": [0.0, 1.0, 0.0, -1.0]},
}  # fmt: skip


class Watch:
    wants_confidence = True

    def __init__(self):
        self.traces = []

    def round(self, trace):
        self.traces.append(trace)


@pytest.fixture(scope="module")
def calibrated(tiny, tmp_path_factory):
    folder = shutil.copytree(tiny.bundle.folder, tmp_path_factory.mktemp("calibrated") / "bundle")
    update_manifest(folder, calibration=CALIBRATION)
    loaded = engines.load(folder, threads=1)
    yield loaded
    loaded.close()


def mixed():
    todo = requests(prompts(6), temperature=0.0)
    return todo[::2] + [r for r in requests(prompts(6), temperature=0.8) if r.id % 2]


def test_survival_is_calibrated_by_each_requests_temperature(calibrated):
    watch = Watch()
    drive(Loop(calibrated, make("fixed"), observers=(watch,)), mixed())
    kinds = set()
    for trace in watch.traces:
        for logits, survival, temperature, drafted in zip(trace.confidence_logits, trace.survival, trace.temperature, trace.drafted):
            if drafted:
                kind = "sampled" if temperature > 0 else "greedy"
                chance = 1 / (1 + np.exp(-logits / np.array(CALIBRATION[kind]) - np.array(CALIBRATION["bias"][kind])))
                np.testing.assert_allclose(survival, np.cumprod(chance), rtol=1e-4)
                kinds.add(kind)
    assert kinds == {"sampled", "greedy"}


def test_logits_stay_raw_and_no_token_changes_with_full_blocks(tiny, calibrated):
    watches = Watch(), Watch()
    plain, fitted = (drive(Loop(e, make("fixed"), observers=(w,)), mixed()) for e, w in zip((tiny, calibrated), watches))
    assert tokens(plain) == tokens(fitted)
    for a, b in zip(watches[0].traces, watches[1].traces):
        np.testing.assert_array_equal(a.confidence_logits, b.confidence_logits)


def test_the_threshold_scheduler_obeys_it(tiny, calibrated):
    watches = Watch(), Watch()
    for e, w in zip((tiny, calibrated), watches):
        drive(Loop(e, make("threshold", 0.5), observers=(w,)), mixed())
    first = [t.verified.tolist() for t in watches[0].traces], [t.verified.tolist() for t in watches[1].traces]
    assert first[0] != first[1]


def test_the_monitor_runs_in_the_loop(calibrated):
    monitor = CalibrationMonitor(4, minimum=1)
    loop = Loop(calibrated, make("threshold", 0.2), observers=(monitor,))
    drive(loop, mixed())
    monitor.flush()
    np.testing.assert_allclose(monitor.weight, loop.metrics.verified_at, rtol=0.05)
    np.testing.assert_allclose(monitor.observed * monitor.weight, loop.metrics.accepted_at, rtol=0.05, atol=0.05)


def test_the_monitor_asks_for_nothing_under_a_scheduler_without_confidence(calibrated):
    monitor = CalibrationMonitor(4)
    loop = Loop(calibrated, make("fixed"), observers=(monitor,))
    drive(loop, mixed())
    assert "confidence" not in loop.metrics.engine_calls and not monitor.weight.any()
