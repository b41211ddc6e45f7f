"""Filling the marked sections."""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks.report import SECTIONS, accept_section, closing_line, demo_output, fill, main
from tests.benchmarks.rows import META, grid

ROOT = Path(__file__).parents[2]


def test_fill_replaces_one_section_and_can_be_repeated():
    page = "x\n<!-- a:begin -->\nold\n<!-- a:end -->\n<!-- b:begin -->\nkeep\n<!-- b:end -->\n"
    once = fill(page, "a", "new \\1")
    assert "old" not in once and "new \\1" in once and "keep" in once
    assert fill(once, "a", "new \\1") == once
    with pytest.raises(ValueError, match="'c'"):
        fill(page, "c", "")


def test_every_section_is_in_its_page():
    for page, sections in SECTIONS.items():
        text = (ROOT / page).read_text()
        for name in sections:
            assert fill(text, name, "body") != text


def test_closing_line():
    log = "...\n3 failed, 5 passed in 9.1s\n===== 12 passed, 1 skipped in 3.42s (0:00:03) =====\nmake: done\n"
    assert "12 passed, 1 skipped in 3.42s" in closing_line(log) and "failed" not in closing_line(log)
    with pytest.raises(ValueError):
        closing_line("nothing")


def test_demo_output_keeps_the_first_answer_and_the_table():
    text = "ready\n\n╭─ one ─╮\nA\n╭─ two ─╮\nB\n  Title\n┏━━┓\n│ x │\nwritten: y\n"
    made = demo_output(text)
    assert "A" in made and "B" not in made and "[...]" in made and "Title" in made and "written: y" in made


def page(root, name: str) -> str:
    return (root / name).read_text()


def test_results_fill_their_sections_and_the_others_stay(tmp_path):
    for name in SECTIONS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    build, before = tmp_path / "build", page(tmp_path, "docs/results.md")
    build.mkdir()
    main(build, tmp_path)
    assert page(tmp_path, "docs/results.md") == before, "there is no result yet"
    speeds = {"none": [10.0], "fixed": [8.0], "lagged": [11.0]}
    (build / "bench.json").write_text(json.dumps(grid(speeds, paths=("in_process", "grpc"))))
    (build / "bench.meta.json").write_text(json.dumps(META))
    peer = dict(peer="another", version="3", variant="bf16", precision="bf16", schedule=None, streams=1, runs=2)
    peer |= dict(total_tok_s=5.0, decode_tok_s=6.0, ratio_to_ours_same_precision=None, ratio_to_ours_best=0.5)
    (build / "peers.json").write_text(json.dumps([peer]))
    (build / "peers-16.json").write_text(json.dumps([peer | {"streams": 16, "total_tok_s": 7.0}]))
    second = {"machine": META["machine"], "date": "2026-01-02", "command": "the second command"}
    (build / "peers-16.meta.json").write_text(json.dumps(second))
    main(build, tmp_path)
    made = page(tmp_path, "docs/results.md")
    assert "in 4 of 4 cells, and faster than both in 4 (in 4 by" in made and "the lowest ratio is 1.100" in made
    assert "| maths | 1 | lagged | 9.9 |" in made and "| another 3 | bf16 |  | 1 | 2 | 5.0 |" in made and "a cpu, 2 cores" in made
    assert "| another 3 | bf16 |  | 16 | 2 | 7.0 |" in made and "`the second command`" in made
    for link in ("images/pareto.png", "images/budget.png"):
        assert link in made and (tmp_path / "docs" / link).is_file()
    section = before.split("<!-- equality:begin -->")[1]
    assert section in made, "a section whose result is missing stays"
    assert "docs/images/pareto.png" in page(tmp_path, "README.md") and "| 8 | 80 | 0.80 | 1.10 |" in page(tmp_path, "README.md")


def test_accept_rules_stand_side_by_side():
    row = {"name": "p", "temperature": 1.0, "prompts": 2, "output_tokens": 9, "acceptance_length": 2.0, "per_position": [0.5]}
    result = {"target": "t", "dtype": "int8", "max_tokens": 8, "machine": META["machine"], "date": "2026-01-02", "command": "c"}
    old = {**result, "rows": [row]}
    assert accept_section([old]) == "", "rows that name no rule are of another section"
    rows = [{**row, "accept": "rejection"}, {**row, "accept": "coupled", "acceptance_length": 1.8}]
    made = accept_section([old, {**result, "rows": rows}]).splitlines()
    assert made[-2].startswith("| p | coupled | 1 |") and made[-1].startswith("| p | rejection | 1 |")
    each = [{**result, "accept": r["accept"], "rows": [{k: v for k, v in r.items() if k != "accept"}]} for r in rows]
    assert accept_section(each).splitlines()[-2:] == made[-2:]
