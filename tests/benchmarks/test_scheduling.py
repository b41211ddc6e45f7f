"""What is timed is a whole decision of the real schedulers."""

import pytest

from benchmarks import scheduling
from decoding.schedule import SCHEDULES, Scheduler


@pytest.mark.parametrize("name", [s for s in SCHEDULES if s != "none"])
def test_a_decision_is_timed(name):
    row = scheduling.decisions(name, 5, count=20)
    assert row["scheduler"] == name and row["requests"] == 5 and 0 < row["median_us"] <= row["p99_us"]


def test_a_decision_takes_every_step_of_the_protocol(monkeypatch):
    calls = []

    class Told(Scheduler):
        def draft(self, load):
            calls.append(("draft", load.requests))
            return load.requests

        def lengths(self, state):
            calls.append(("lengths", state.confidence.shape))
            return state.threshold * 0 == 0  # not a draft token for anybody: nan

        def observe(self, verified, accepted):
            calls.append(("observe", accepted.sum()))

        def timed(self, draft_ms, target_ms):
            calls.append(("timed",))

    monkeypatch.setattr(scheduling, "make", lambda name, sps: Told())
    scheduling.decisions("told", 3, count=10)
    assert calls[:4] == [("draft", 3), ("lengths", (3, scheduling.G)), ("observe", 0), ("timed",)] and len(calls) == 4 * 11


def test_the_table_is_jagged_and_reaches_every_number_of_requests():
    table = scheduling.table()
    steps = [float(table.target_ms(16, n, 200)) for n in range(16, 129)]
    slopes = {round(b - a, 2) for a, b in zip(steps, steps[1:])}
    assert len(slopes) > 1 and min(steps) > 0
    assert float(table.target_ms(256, 2048, 300)) > float(table.target_ms(256, 256, 300))
