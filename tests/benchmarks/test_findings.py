"""Tables that judge state what the rows hold, and nothing better."""

import pytest

from benchmarks import findings
from benchmarks.cells import PATHS, with_ratios
from tests.benchmarks.rows import grid

ROWS = grid({"none": [10.0, 10.0, 10.0], "fixed": [20.0, 20.0, 20.0], "lagged": [19.0, 19.6, 30.0]})


def test_the_claim_is_against_the_better_of_both_cell_by_cell():
    said, table = findings.claim(ROWS)
    assert "in 4 of 4 cells, and faster than both in 0 (in 0 by the whole" in said and "lowest ratio is 0.980" in said
    assert table.count("| fixed | 0.980 | 0.95 to 1.50 | yes |") == 4
    slow = grid({"none": [10.0], "fixed": [5.0], "lagged": [9.6]}, kinds=("chat",), levels=(16,))
    said, table = findings.claim(slow)
    assert "in 0 of 1 cells" in said and "0.960 (chat, 16 users)" in said and "| none | 0.960 | 0.96 to 0.96 | **no** |" in table


def test_cells_without_all_three_of_one_run_are_no_evidence():
    rows = [{**r, "run": "other"} if r["mode"] == "fixed" else r for r in ROWS]
    assert findings.claim(with_ratios(rows)) == ("No run holds lagged, none and fixed together.", "")


def test_grpc_is_judged_by_its_ratio():
    rows = grid({"none": [10.0], "lagged": [12.0]}, paths=PATHS)
    said, table = findings.grpc(rows)
    assert "in 0 of 8 cells; the lowest ratio is 0.900" in said and table.count("**no**") == 8
    assert findings.grpc(ROWS)[1] == ""


def test_throughput_has_a_line_for_each_kind_and_level_with_kinds_in_our_order():
    lines = findings.throughput(ROWS[::-1]).splitlines()
    assert lines[0] == "| kind | users | none | fixed | lagged |"
    assert [line.split("|")[1:3] for line in lines[2:]] == [
        [" maths ", " 1 "], [" maths ", " 8 "], [" chat ", " 1 "], [" chat ", " 8 "]
    ]  # fmt: skip
    assert lines[3].endswith("| 80 | 160 (2.00) | 157 (1.96) |")


def test_latency_and_short_tables_leave_gaps_for_what_is_missing():
    rows = [r for r in ROWS if not (r["mode"] == "none" and r["kind"] == "chat")]
    assert "| chat | 1 | 19.6 |  | 50 |  | 10.0 | 20.0 | 1.50 | 2.00 | 75 | 10 | 3.0 |" in findings.latency(rows)
    assert findings.short(rows).splitlines()[2] == "| 1 | 10 | 2.00 | 1.96 |"


def test_scheduling_states_both_bounds():
    result = {
        "block_size": 7,
        "bound_us": 300.0,
        "decisions": [
            {"scheduler": "lagged", "requests": n, "median_us": us, "p99_us": 2 * us} for n, us in ((8, 20.0), (256, 310.0))
        ],
        "host": [{"mode": "lagged", "requests": 16, "step_ms": 20.0, "host_ms": 1.0, "host_share": 0.05}],
    }
    said, table = findings.scheduling(result)
    assert "at most 310 us (median; lagged): **no** against the bound of 300 us" in said
    assert "at most 5.0% (lagged, 16 requests): yes against the bound of 8%" in said
    assert "| lagged | 256 | 310.0 | 620.0 |" in table and "| lagged | 16 | 20.00 | 1.000 | 5.0 |" in table


def measured(ece: float) -> dict:
    one = lambda v: [v, v]
    names = ("ece_low", "ece_high", "noise", "auc", "brier")
    return {"ece": one(ece), **{name: one(0.01) for name in names}}


def test_calibration_shows_raw_and_after_by_position():
    side = {"before": measured(0.07), "temperature_only": measured(0.05), "after": measured(0.015), "held_out": 1000}
    result = {"greedy": [1.0, 2.0], "sampled": [1.5, 3.0], "report": {"greedy": side, "sampled": side}}
    said, table = findings.calibration(result)
    assert "greedy: mean ECE raw 7.00%, after 1.50% (yes against 2%" in said
    assert "| sampled | 2 | 3.00 | 0.00 | 7.00 | 5.00 | 1.50 | 1.00 to 1.00 | 0.010 | 0.0100 | 0.0100 |" in table


def test_peers_say_which_schedule_and_how_many_rounds():
    row = dict(peer="llama.cpp", version="1", variant="Q8_0", precision="int8", schedule=None, streams=16, runs=2)
    row |= dict(total_tok_s=80.0, decode_tok_s=90.0, ratio_to_ours_same_precision=0.5, ratio_to_ours_best=None)
    ours = row | dict(peer="dspark-triton", variant="int8", schedule="lagged", streams=1, ratio_to_ours_best=1.0)
    made = findings.peers([row, ours | dict(schedule="none", total_tok_s=70.0), ours]).splitlines()
    assert made[2:] == [
        "| dspark-triton 1 | int8 | lagged | 1 | 2 | 80.0 | 90.0 | 0.50 | 1.00 |",
        "| dspark-triton 1 | int8 | none | 1 | 2 | 70.0 | 90.0 | 0.50 | 1.00 |",
        "| llama.cpp 1 | Q8_0 |  | 16 | 2 | 80.0 | 90.0 | 0.50 |  |",
    ]


@pytest.mark.parametrize("value, said", [(None, ""), (0.123, "12.3")])
def test_numbers(value, said):
    assert findings._number(value, 1, 100) == said
