"""What the lines of an audit say together."""

import json

from decoding.checks import Check, as_json, show, verdict

SOUND = [
    Check("greedy equality", "fixed", "ok", "8 of 8"), Check("sampled tokens", "none", "ok", ""), Check("sampled tokens", "fixed", "ok", "")
]  # fmt: skip


def test_sound_lines_name_the_audited_schedules():
    assert verdict(SOUND) == (
        True,
        "Lossless: fixed give the target's greedy text, its seeded text and its distribution.",
    )


def test_a_warning_is_minded_and_passes():
    ok, sentence = verdict([Check("SPS table", "", "warn", "none"), *SOUND])
    assert ok and sentence.endswith("Mind: SPS table.")


def test_one_failure_is_enough():
    ok, sentence = verdict(
        [*SOUND, Check("coupled equality", "lagged", "fail", ""), Check("coupled equality", "lagged", "fail", "")]
    )
    assert not ok and sentence == "NOT LOSSLESS OR NOT AUDITED: coupled equality lagged."


def test_json_holds_every_figure():
    written = json.loads(json.dumps(as_json([Check("greedy equality", "fixed", "ok", "8 of 8", {"outputs": 8}, 1.5)])))
    assert (
        written["ok"] and written["checks"][0]["figures"] == {"outputs": 8} and written["checks"][0]["seconds"] == 1.5
    )


def test_a_line_is_shown_as_it_is_written(capsys):
    show(Check("greedy equality", "fixed", "ok", "a [red] word: 8 of 8", seconds=1.25))
    assert "a [red] word: 8 of 8" in capsys.readouterr().out
