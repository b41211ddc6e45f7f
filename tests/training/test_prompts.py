"""The repository's own prompts: deterministic, different, well-formed; and prompt files with bad lines."""

from __future__ import annotations

import json
import logging
import random
import re
from collections import Counter

import pytest

from training import prompts as room
from training.prompts import KINDS, MATHS_SUFFIX, SHARES, Prompt, close, expand, openings, prompts, read_prompts


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
    for line in (2, 6, 7, 8, 9):
        assert f"{file}:{line} left out" in caplog.text
    assert f"{file}: 5 of 8 lines left out." in caplog.text


def test_read_prompts_without_a_usable_line(tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text("nonsense\n")
    with pytest.raises(ValueError, match="no usable prompt"):
        list(read_prompts(file))


def test_prompts_survive_a_round_trip(tmp_path):
    made = list(prompts(50, seed=9)) + [Prompt('quote " and "text": here', "chat")]
    room.write_prompts(tmp_path / "p.jsonl", made)
    assert list(read_prompts(tmp_path / "p.jsonl")) == made
