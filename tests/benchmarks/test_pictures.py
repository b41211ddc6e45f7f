"""The two pictures are drawn from whatever the rows hold."""

import json
import struct

import pytest
import typer

from benchmarks import pictures
from benchmarks.cells import MODES
from tests.benchmarks.rows import META, grid


def size(png) -> tuple[int, int]:
    return struct.unpack(">II", png.read_bytes()[16:24])


def test_both_pictures_have_a_panel_a_kind(tmp_path):
    rows = grid(dict.fromkeys(MODES, [10.0]), kinds=("chat", "law", "maths"), levels=(1, 2, 32))
    (tmp_path / "bench.json").write_text(json.dumps(rows))
    (tmp_path / "bench.meta.json").write_text(json.dumps(META))
    pictures.main(tmp_path / "bench.json", tmp_path / "images", 0.0)
    assert pictures.kinds_of(rows) == ["maths", "chat", "law"]
    wide = size(tmp_path / "images/pareto.png")
    assert size(tmp_path / "images/budget.png")[0] == wide[0] > 1500, "legible at 900 pixels"
    pictures.draw_pareto([r for r in rows if r["kind"] == "law"], tmp_path / "one.png")
    assert size(tmp_path / "one.png")[0] < wide[0]


def test_lines_are_by_mode_and_in_the_order_of_users():
    rows = grid({"none": [1.0], "lagged": [2.0]}, levels=(16, 2))
    found = pictures.lines(rows, "maths")
    assert list(found) == ["none", "lagged"] and [r["concurrency"] for r in found["none"]] == [2, 16]


def test_every_mode_has_a_look_of_its_own():
    assert set(pictures.STYLES) == set(MODES)
    for part in ("color", "marker"):
        assert len({style[part] for style in pictures.STYLES.values()}) == len(MODES)


def test_nothing_to_draw_is_one_sentence(tmp_path, capsys):
    with pytest.raises(typer.Exit):
        pictures.main(tmp_path / "bench.json", tmp_path, 0.0)
    assert "make bench" in capsys.readouterr().err
