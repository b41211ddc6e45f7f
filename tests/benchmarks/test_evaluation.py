"""Recorded rounds in, report out: every figure against rounds that can be counted by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks.evaluation import Head, app, by_length, by_position, depths, evaluate, report, under
from benchmarks.evaluation_pictures import draw
from training.rollouts import Rollouts

ACCEPTED = np.array([0, 1, 3, 3])
META = {"draft_hash": "d", "target_hash": "t"}


def rollouts(accepted=ACCEPTED, kind=("maths", "maths", "code", "code"), temperature=(0.0, 0.0, 0.0, 1.0)) -> Rollouts:
    B = len(accepted)
    logits = np.full((B, 3), 20.0)  # surely kept
    logits[1:2] = -20.0
    return Rollouts(logits, np.array(accepted), np.array(temperature), np.arange(B), META, np.array(kind))


def write(file, r: Rollouts):
    np.savez(
        file, confidence_logits=r.logits, accepted=r.accepted, temperature=r.temperature, request=r.request,
        position=np.zeros(len(r), int), kind=r.kind, meta=json.dumps(r.meta),
    )  # fmt: skip
    return file


def test_by_position_and_by_length():
    assert by_position(ACCEPTED, 3) == pytest.approx([3 / 4, 2 / 3, 1.0])
    assert by_position(np.array([0, 0]), 2) == [0.0, None]
    assert by_length(ACCEPTED, 3) == pytest.approx([1 + 3 / 4, 1 + 5 / 4, 1 + 7 / 4])


def test_a_threshold_cuts_a_block_at_the_first_position_below_it():
    predicted = np.array([[0.9, 0.3, 0.8], [0.2, 0.9, 0.9]])
    cut = under(0.5, predicted, np.array([3, 3]))
    assert cut == {"threshold": 0.5, "tau": 1.5, "verified": 0.5, "rejected": 0.0}
    assert under(0.0, predicted, np.array([1, 3]))["rejected"] == pytest.approx(1 - 4 / 6)
    assert under(0.95, predicted, np.array([1, 3])) == {"threshold": 0.95, "tau": 1.0, "verified": 0.0, "rejected": 0.0}


def test_groups_of_kind_and_temperature():
    result = evaluate(Head("a", rollouts()))
    said = {(r["kind"], r["temperature"]): (r["rounds"], r["tau"]) for r in result["rows"]}
    assert said == {
        ("maths", 0.0): (2, 1.5), ("code", 0.0): (1, 4.0), ("all", 0.0): (3, pytest.approx(1 + 4 / 3)),
        ("code", 1.0): (1, 4.0), ("all", 1.0): (1, 4.0),
    }  # fmt: skip
    assert result["thresholds"][0]["verified"] == 3.0 and result["thresholds"][-1]["verified"] == pytest.approx(9 / 4)


def test_a_calibration_is_applied_by_the_kind_of_request():
    calibration = {"greedy": [1.0] * 3, "sampled": [1.0] * 3, "bias": {"greedy": [0.0] * 3, "sampled": [-60.0] * 3}}
    predicted = Head("a", rollouts(), calibration).survival()
    assert predicted[0].min() > 0.99 and predicted[3].max() < 1e-6


def test_drafts_side_by_side_say_what_one_gains():
    better = rollouts(accepted=[1, 2, 3, 3])
    text = report([evaluate(Head("a", rollouts())), evaluate(Head("b", better))], "python -m x")
    assert "| maths | 0 | a | 2 | 1.50 |  | 17 |" in text and "| maths | 0 | b | 2 | 2.50 | +67% | 50 |" in text
    alone = report([evaluate(Head("a", rollouts()))], "python -m x")
    assert "to the first draft" in text and "to the first draft" not in alone


def test_drafts_that_differ_in_depth_make_a_line(tmp_path):
    def head(name, depth, kind, accepted):
        r = rollouts(accepted=accepted)
        return Head(name, Rollouts(r.logits, r.accepted, r.temperature, r.request, META | {"depth": depth, "kind": kind}, r.kind))

    heads = [head("two", 2, "dspark", [1, 2, 3, 3]), head("one", 1, "dspark", ACCEPTED), head("other", 1, "dflash", ACCEPTED)]
    results = [evaluate(h) for h in heads]
    line = [(1, pytest.approx(1 + 4 / 3)), (2, pytest.approx(3.0))]
    assert depths(results) == {("dspark", 3, 0.0): line, ("dspark", 3, 1.0): [(1, 4.0), (2, 4.0)]}
    assert depths(results[1:]) == {}
    assert "depths.png" in report(results, "c") and "depths.png" not in report(results[:1], "c")
    assert (tmp_path / "depths.png") in draw(heads, results, depths(results), tmp_path)


def test_the_command_writes_report_and_pictures(tmp_path):
    file = write(tmp_path / "r.npz", rollouts())
    done = CliRunner().invoke(app, ["--rollouts", f"head={file}", "--out", str(tmp_path / "eval")])
    assert done.exit_code == 0, done.output
    names = {"report.md", "eval.json", "positions.png", "lengths.png", "thresholds.png", "reliability.png"}
    assert {f.name for f in (tmp_path / "eval").iterdir()} == names
    for name in names - {"report.md", "eval.json"}:
        assert name in (tmp_path / "eval/report.md").read_text()


@pytest.mark.parametrize(
    "options, said",
    [
        (["--rollouts", "x"], "rollouts is 'x'; it must be NAME=FILE, each name once."),
        (["--rollouts", "a=/no.npz"], "No such file"),
        (["--rollouts", "a=R", "--calibration", "b=c"], "calibration names 'b'; the drafts are a."),
    ],
)
def test_bad_options_are_one_sentence(tmp_path, options, said):
    file = write(tmp_path / "r.npz", rollouts())
    done = CliRunner().invoke(app, [o.replace("=R", f"={file}") for o in options])
    assert done.exit_code == 1 and said in str(done.exception or done.output)


def test_an_empty_recording_is_refused(tmp_path):
    file = write(tmp_path / "r.npz", rollouts(accepted=np.zeros(0, int), kind=np.zeros(0, str), temperature=()))
    done = CliRunner().invoke(app, ["--rollouts", f"a={file}"])
    assert "hold no round" in str(done.exception or done.output)


