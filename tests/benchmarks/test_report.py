"""Filling the marked sections."""

from pathlib import Path

import pytest

from benchmarks.report import SECTIONS, closing_line, demo_output, fill

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
