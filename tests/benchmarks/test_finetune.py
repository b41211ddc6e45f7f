"""`make finetune` from prompts to report on a tiny target, given again, interrupted; what is refused."""

from __future__ import annotations

import json
import signal

import pytest
import typer
from safetensors.numpy import load_file
from typer.testing import CliRunner

from benchmarks import finetune
from benchmarks.sql_prompts import prompts as sql_prompts
from tests.tiny import make_draft, make_target
from tests.triton.support import make_tokenizer
from training.sources import Chat

VOCAB = 320
app = typer.Typer()
app.command()(finetune.main)


@pytest.fixture
def pair(tmp_path):
    folder = tmp_path / "target"
    folder.mkdir()
    vocab = make_tokenizer(folder, VOCAB)
    target = make_target(folder, vocab=vocab, eos=0)
    return target, make_draft(tmp_path / "draft", target, draft_vocab=200)


def write(path, texts):
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


def test_from_prompts_to_report_and_again(tmp_path, pair, monkeypatch):
    target, draft = pair
    mine = write(tmp_path / "mine.jsonl", [f"row {i}" for i in range(60)])
    options = [
        "--prompts", mine, "--target", target, "--draft", draft, "--bundle", tmp_path / "bundle", "--dtype", "fp32", "--out",
        tmp_path / "out", "--answers", 24, "--max-new", 12, "--steps", 3, "--limit", 4, "--draft-vocab-add", 10,
    ]  # fmt: skip
    options = [str(o) for o in options]
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 0, done.output
    out = tmp_path / "out"
    result = json.loads((out / "report.json").read_text())
    held = (out / "held-out.jsonl").read_text().splitlines()
    n = min(4, len(held))
    assert [(r["name"], r["temperature"], r["prompts"]) for r in result["rows"]] == [("held out", t, n) for t in (0.0, 1.0)]
    assert all(r[when]["rounds"] > 0 and r[when]["acceptance_length"] >= 1 for r in result["rows"] for when in ("before", "after"))
    before, after = result["before"], result["after"]
    assert 0 < before["coverage"] < after["coverage"] < 1 and result["lacking"], "ten tokens were not enough"
    said = (out / "report.md").read_text()
    assert f"of 200 tokens holds {before['coverage']:.2%}" in said and f"of 210 {after['coverage']:.2%}" in said
    old, new = load_file(draft / "model.safetensors"), out / "head" / "model.safetensors"
    assert finetune.draft_ids(draft) < finetune.draft_ids(out / "head") and len(finetune.draft_ids(draft)) == 200
    assert new.read_bytes() != (draft / "model.safetensors").read_bytes() and "d2t" in old
    assert json.loads((out / "bundle/manifest.json").read_text())["draft"]["vocab_size"] == 210
    asked = set((out / "data/prompts-00.jsonl").read_text().splitlines())
    assert held and asked and not set(held) & asked, "nothing that is evaluated was trained on"
    weights, stamp = new.read_bytes(), (out / "bundle/manifest.json").stat().st_mtime_ns
    before = (out / "before.json").stat().st_mtime_ns
    commands = []
    monkeypatch.setattr(finetune, "command", lambda *a: commands.append(a))  # these resume: their own rooms test it
    again = CliRunner().invoke(app, options)
    assert again.exit_code == 0 and new.read_bytes() == weights, again.output
    assert [c[:2] for c in commands] == [("training", "data"), ("training", "train")] and commands[1][-1] == "--resume"
    assert (out / "bundle/manifest.json").stat().st_mtime_ns == stamp and (out / "before.json").stat().st_mtime_ns == before
    other = write(tmp_path / "other.jsonl", [f"line {i}" for i in range(60)])
    options[1] = str(other)
    refused = CliRunner().invoke(app, options)
    assert refused.exit_code == 1 and "was begun with other prompts" in refused.output + refused.stderr


def test_an_interrupted_step_may_finish_what_it_does(tmp_path, monkeypatch):
    """The trainer saves its run at a Ctrl-C; killed at once, it would lose it."""
    (tmp_path / "saver.py").write_text(
        "import os, pathlib, signal, time\n"
        "def save(*_):\n    time.sleep(1)\n    pathlib.Path('saved').touch()\n    raise SystemExit(0)\n"
        "signal.signal(signal.SIGINT, save)\n"
        "os.kill(os.getppid(), signal.SIGINT)\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    )
    monkeypatch.chdir(tmp_path)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            finetune.command("saver")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "saved").exists()


def test_too_few_prompts_are_one_sentence(tmp_path):
    few = write(tmp_path / "few.jsonl", ["a", "b", "a"])
    with pytest.raises(ValueError, match=r"few.jsonl holds 2 different prompts; fine-tuning needs 40 or more\.$"):
        finetune.prepare(few, tmp_path / "out")


def test_a_head_that_drafts_everything_is_given_nothing(tmp_path, pair, monkeypatch):
    """And one with less room than asked for is given what there is."""
    target, small = pair
    mine, commands = write(tmp_path / "mine.jsonl", [f"row {i}" for i in range(60)]), []

    class Enough(Exception):
        pass

    def command(*asked):
        commands.append(asked)
        if asked[1] == "train":
            raise Enough

    monkeypatch.setattr(finetune, "command", command)
    monkeypatch.setattr(finetune, "evaluate", lambda *_, **__: [])
    for name, draft, added in (("small", small, VOCAB - 200), ("whole", make_draft(tmp_path / "all", target), 0)):
        sizes = {"target": {"vocab_size": VOCAB}, "draft": {"vocab_size": len(finetune.draft_ids(draft) or range(VOCAB))}}
        monkeypatch.setattr(finetune.bundles, "ensure", lambda *_: sizes)
        with pytest.raises(Enough):
            finetune.main(mine, target, draft, tmp_path / "bundle", out=tmp_path / name)
        asked = [str(word) for word in commands[-1]]
        assert asked[asked.index("--draft-vocab-add") + 1] == str(added), name


def test_a_prompt_stays_on_its_side():
    chats = [Chat((("user", f"question {i}"),)) for i in range(400)]
    train, held = finetune.split(chats)
    assert 20 < len(held) < 60 and len(train) + len(held) == 400
    assert set(finetune.split(chats[::-1])[1]) == set(held) and set(finetune.split(chats[:100])[1]) <= set(held)


def test_the_examples_prompts_differ_and_repeat(monkeypatch):
    made = sql_prompts(600, 1)
    assert len(set(made)) == 600 and made == sql_prompts(600, 1) != sql_prompts(600, 2)
    assert made[:100] == sql_prompts(100, 1) and not [text for text in made if "{" in text]
    for name in ("TASKS", "CHANGES"):
        monkeypatch.setattr(f"benchmarks.sql_prompts.{name}", ("{about}",))
    with pytest.raises(ValueError, match="count is 13; there are not so many different prompts"):
        sql_prompts(13, 1)
