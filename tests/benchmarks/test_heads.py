"""Drafts trained on the same tokens and compared: once for real on a tiny target, and what is kept or refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks.heads import Entry, app, finished
from tests.tiny import make_target
from training.generate import ShardWriter
from training.sampling import Job

SHARED = "--fp32 --seed 1 --draft-vocab 0 --depth 1 --block-size 3 --rank 8 --mask-token-id 62 --tokens-per-batch 128"


def test_an_entry_is_a_known_name_or_has_its_own_options():
    assert Entry.of("eagle3") == Entry("eagle3", ("--kind", "eagle3", "--depth", "1"))
    assert Entry.of("deep=--depth 3 --rank 0") == Entry("deep", ("--depth", "3", "--rank", "0"))
    assert Entry.of("plain=") == Entry("plain", ())
    with pytest.raises(ValueError, match="draft 'medusa' is none of dspark, dflash, eagle3, mtp"):
        Entry.of("medusa")
    with pytest.raises(ValueError, match="has no plain name"):
        Entry.of("a/b=--depth 1")


@pytest.fixture
def data(tmp_path):
    rng, writer = np.random.default_rng(0), ShardWriter(tmp_path / "data", 0, 100)
    (tmp_path / "data").mkdir()
    for i in range(40):
        prompt = rng.integers(2, 62, 6).tolist()
        writer.add(Job(i, prompt, 0.0, 16), rng.integers(2, 62, 16).astype(np.int32), "chat")
    writer.flush()
    return tmp_path / "data"


def test_two_drafts_become_one_report_and_what_is_there_is_kept(tmp_path, data):
    target = make_target(tmp_path / "target", vocab=64)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"input_ids": [5 + i, 9, 7], "kind": "maths"}) + "\n" for i in range(4)))
    options = [
        "--target", str(target), "--data", str(data), "--out", str(tmp_path / "out"), "--steps", "2", "--dtype", "fp32",
        "--record", "--max-tokens 12", "--prompts", str(prompts),
    ]  # fmt: skip
    drafts = ["--draft", "markov=", "--draft", "flat=--rank 0"]
    done = CliRunner().invoke(app, [*options, *drafts, "--train", SHARED])
    assert done.exit_code == 0, done.output
    report = (tmp_path / "out/report.md").read_text()
    assert "| all | 0 | markov |" in report and "| all | 0 | flat |" in report
    assert [d["name"] for d in json.loads((tmp_path / "out/eval.json").read_text())["drafts"]] == ["markov", "flat"]
    made = {f: f.stat().st_mtime_ns for f in (tmp_path / "out").glob("*/*") if f.is_file()}
    (tmp_path / "out/report.md").unlink()
    again = CliRunner().invoke(app, [*options, *drafts, "--train", SHARED])
    assert again.exit_code == 0 and (tmp_path / "out/report.md").exists()
    assert made == {f: f.stat().st_mtime_ns for f in (tmp_path / "out").glob("*/*") if f.is_file()}
    other = CliRunner().invoke(app, [*options, *drafts, "--train", SHARED + " --lr 1e-4"])
    assert other.exit_code == 1 and "was begun with options" in str(other.exception or other.output)


def test_a_run_is_finished_when_its_last_step_and_its_head_are_there(tmp_path):
    assert not finished(tmp_path, 2)
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    assert not finished(tmp_path, 2)
    (tmp_path / "latest").mkdir()
    (tmp_path / "latest/model.safetensors").write_bytes(b"")
    assert finished(tmp_path, 2) and not finished(tmp_path, 3)
