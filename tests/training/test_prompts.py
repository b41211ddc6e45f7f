"""The repository's own prompts: deterministic, different, well-formed; and prompt files with bad lines."""

from __future__ import annotations

import json
import logging
import random
import re
from collections import Counter

import pytest

from training import prompts as room
from training.prompts import KINDS, MATHS_SUFFIX, SHARES, Prompt, close, expand, held_out, openings, prompts, read_prompts


def test_prompts_are_deterministic_and_different():
    first = list(prompts(1500, seed=3))
    assert first == list(prompts(1500, seed=3))
    assert len({p.text for p in first}) == 1500
    assert list(prompts(200, seed=4)) != first[:200]


def test_kinds_have_their_shares_and_their_form():
    made = list(prompts(1500, seed=1))
    counts = Counter(p.kind for p in made)
    for kind in KINDS:
        assert abs(counts[kind] / 1500 - SHARES[kind]) < 0.05
    for p in made:
        assert not re.search(r"[«»]|\[[^\]\n]*\|", p.text), p.text
        assert "\\n" not in p.text
        assert p.text.endswith(MATHS_SUFFIX) == (p.kind == "maths")
        if p.kind == "code":
            assert p.text.count("```") % 2 == 0, p.text


def test_every_template_expands():
    for name, templates in room._sections().items():
        for template in templates if name != "words" else []:
            for seed in range(5):
                assert expand(template, random.Random(seed))
    assert len(room._section("maths-story")) >= 60


@pytest.mark.parametrize("template, pattern", [
    ("«name» and «name2» and «name»", r"(\w+) and (?!\1)\w+ and \1"),
    ("«a=7..7» times «b=10..10/5» is «=a*b», not «a»", "7 times 10 is 70, not 7"),
    ("«:a=20000..20000»[x|x«a»]", "x(20,000)?"),
    ("[one [small|small] step|one small step]\\nmore", "one small step\nmore"),
])
def test_template_language(template, pattern):
    for seed in range(10):
        assert re.fullmatch(pattern, expand(template, random.Random(seed)))


def test_unknown_word_list_and_unbound_number_are_errors():
    with pytest.raises(KeyError, match="nosuchlist"):
        expand("«nosuchlist»", random.Random(0))
    with pytest.raises(NameError):
        expand("«=q+1»", random.Random(0))


def test_templates_that_run_dry_say_so(monkeypatch):
    monkeypatch.setattr(room, "_finished", lambda kind, rng: f"{kind} {rng.randrange(3)}")
    with pytest.raises(ValueError, match="no more new prompts"):
        list(prompts(50, seed=1))


def test_openings_are_closed_with_the_kinds_last_line():
    begun = list(openings(300, seed=2))
    assert begun == list(openings(300, seed=2)) and {p.kind for p in begun} == set(KINDS)
    maths = Prompt("Nina has 3", "maths")
    assert close(maths, " boxes of ten pens each.").text == "Nina has 3 boxes of ten pens each." + MATHS_SUFFIX
    assert close(maths, " boxes.") is None
    assert close(Prompt("```python\ndef", "code"), " f(a: int, b: int) -> int:").text.endswith(":\n```")


def test_read_prompts_takes_three_forms_and_names_bad_lines(tmp_path, caplog):
    file = tmp_path / "mixed.jsonl"
    file.write_text("\n".join([
        json.dumps({"turns": ["a first turn", "a second"]}),
        "{ not json",
        json.dumps({"prompt": "zwei", "kind": "maths"}),
        json.dumps({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "three"}]}),
        "",
        json.dumps({"turns": []}),
        json.dumps(["a list"]),
        json.dumps({"prompt": "x", "kind": "poetry"}),
        json.dumps({"messages": [{"role": "system", "content": "no user"}]}),
    ]), encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        read = list(read_prompts(file))
    assert read == [Prompt("a first turn", "chat"), Prompt("zwei", "maths"), Prompt("three", "chat")]
    for line in (2, 5, 6, 7, 8, 9):
        assert f"{file}:{line} left out" in caplog.text
    assert f"{file}: 6 of 9 lines left out." in caplog.text


def test_read_prompts_without_a_usable_line(tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text("nonsense\n")
    with pytest.raises(ValueError, match="no usable prompt"):
        list(read_prompts(file))


def test_prompts_survive_a_round_trip(tmp_path):
    made = list(prompts(50, seed=9)) + [Prompt('quote " and "text": here', "chat")]
    room.write_prompts(tmp_path / "p.jsonl", made)
    assert list(read_prompts(tmp_path / "p.jsonl")) == made


def test_held_out_prompts_avoid_the_training_data_and_take_its_held_out_slice_first():
    known = list(prompts(300, 1))
    slice_of = {p.text for p in known[::10]}
    chosen = held_out(45, 2, known, lambda p: p.text in slice_of)
    texts = [p.text for p in chosen]
    assert len(set(texts)) == 45 and [p.kind for p in chosen[:6]] == ["maths", "code", "chat"] * 2
    assert not {p.text for p in known} - slice_of & set(texts)
    from_slice = [p for p in chosen if p.text in slice_of]
    for kind in KINDS:
        assert sum(p.kind == kind for p in from_slice) == min(15, sum(p.kind == kind for p in known[::10]))
    assert held_out(45, 2, known, lambda p: p.text in slice_of) == chosen


def test_a_new_seed_alone_would_not_be_disjoint():
    """Why the texts are compared: the templates give some prompts again under another seed."""
    known = {p.text for p in prompts(2000, 1)}
    assert known & {p.text for p in prompts(300, 2)}
    assert not known & {p.text for p in held_out(120, 2, prompts(2000, 1))}


def test_prompts_command(tmp_path):
    from typer.testing import CliRunner

    from training.__main__ import app

    run = lambda *arguments: CliRunner().invoke(app, ["prompts", "--out", str(tmp_path / "a" / "p.jsonl"), *arguments])
    assert run("--count", "6").exit_code == 0
    assert [p.kind for p in read_prompts(tmp_path / "a" / "p.jsonl")] == ["maths", "code", "chat"] * 2
    for arguments, sentence in (
        (["--count", "0"], "count is 0"),
        (["--data", str(tmp_path)], "holds no prompts-*.jsonl"),
        (["--data", str(tmp_path / "a")], "holds no prompts-*.jsonl"),
    ):
        result = run(*arguments)
        assert result.exit_code == 1 and sentence in result.output
    (tmp_path / "prompts-00.jsonl").write_text('{"prompt": "a", "kind": "chat"}\n')
    assert "needs --target" in run("--data", str(tmp_path)).output
