"""Prompt files, acceptance sums and result files."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks.common import KINDS, OWN_PROMPTS, Acceptance, markdown_table, median, read_items, write_result


def test_read_items_takes_every_form_of_a_line(tmp_path):
    file = tmp_path / "p.jsonl"
    lines = [{"prompt": "a"}, {"turns": ["b", "c"]}, {"messages": [{"role": "system", "content": "s"}], "name": "n"}]
    file.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    items = read_items(file)
    assert [i.messages[0]["content"] for i in items] == ["a", "b", "s"]
    assert [i.name for i in items] == ["p-1", "p-2", "n"]
    assert len(read_items(file, 2)) == 2


@pytest.mark.parametrize("line", ['{"text": "x"}', '{"turns": []}', '{"prompt": 3}'])
def test_read_items_names_the_line_that_has_no_prompt(tmp_path, line):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a"}\n' + line + "\n")
    with pytest.raises(ValueError, match="p.jsonl:2"):
        read_items(file)


def test_own_prompts_are_five_and_of_three_kinds():
    records = [json.loads(line) for line in OWN_PROMPTS.read_text().splitlines()]
    assert len(records) == 5 and {r["kind"] for r in records} == {"maths", "code", "chat"}
    assert len({r["name"] for r in records}) == 5


def test_prompts_of_the_grid_are_32_of_each_kind_and_the_head_has_seen_none_of_them():
    texts = []
    for kind, file in KINDS.items():
        records = [json.loads(line) for line in file.read_text().splitlines()]
        assert len(records) == 32 and {r["kind"] for r in records} == {kind}
        assert [i.name for i in read_items(file)] == [f"{kind}-{n}" for n in range(1, 33)]
        texts += [r["prompt"] for r in records]
    assert len(set(texts)) == 96
    data = Path(__file__).parents[2] / "training/heads/smollm2-135m-instruct/data"
    seen = {json.loads(line)["prompt"] for file in data.glob("prompts-*.jsonl") for line in file.open(encoding="utf-8")}
    assert len(seen) > 1000 and not seen & set(texts)


def test_acceptance_counts_the_bonus_and_only_verified_positions():
    a = Acceptance()
    a.add(drafted=4, verified=4, accepted=4)
    a.add(drafted=4, verified=2, accepted=1)
    a.add(drafted=0, verified=0, accepted=0)
    assert a.length == pytest.approx(1 + 5 / 3)
    assert a.per_position == [1.0, 0.5, 1.0, 1.0]
    assert a.as_json()["verified_per_round"] == 2.0
    assert Acceptance().length == 1.0


def test_median_of_nothing_is_not_a_number():
    assert median([]) != median([]) and median([3, 1, 2]) == 2


def test_result_names_outside_files_without_their_place(tmp_path, monkeypatch):
    given = ["--prompts", "/somewhere/else/gsm8k.jsonl", "--prompts", "k=/x/p.jsonl", "--quick"]
    monkeypatch.setattr(sys, "argv", ["benchmarks/bench.py", *given])
    write_result(tmp_path / "sub" / "r.json", {"rows": [1]})
    result = json.loads((tmp_path / "sub" / "r.json").read_text())
    assert result["command"] == "python -m benchmarks.bench --prompts gsm8k.jsonl --prompts k=p.jsonl --quick"
    assert result["rows"] == [1] and result["machine"]["cores"] >= 1 and result["date"]


def test_markdown_table():
    made = markdown_table((("a", lambda r: r["x"]), ("b", lambda r: str(r["y"]))), [{"x": "u", "y": 1}])
    assert made == "| a | b |\n| --- | ---: |\n| u | 1 |"
