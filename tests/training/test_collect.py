"""The `data` command from sources to shards: what is kept, who answers, and going on after an end."""

import json
import logging

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from tests.bundles import exported
from tests.tiny import make_draft, make_target
from training.collect import Collection, collect
from training.data import is_held_out_prompt
from training.evaluate import generate_plain
from training.generate import load_sequences
from training.sources import read
from training.target import TargetModel

EOS = 63
quiet = lambda text: None


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """A random target with a word-level tokenizer: the tokens are w0 ... w59 and the template's marks."""
    folder = make_target(tmp_path_factory.mktemp("target"), vocab=64, eos=EOS)
    words = {f"w{i}": i for i in range(60)} | {"<user>": 60, "<answer>": 61, "<unk>": 62, "<end>": EOS}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    marks = "{% for m in messages %}<user> {{ m.content }} <end> {% endfor %}"
    think = "{% if enable_thinking %}w59 {% endif %}"
    last = "{% if add_generation_prompt %}<answer> " + think + "{% endif %}"
    (folder / "chat_template.jinja").write_text(marks + last)
    return folder


@pytest.fixture
def source(tmp_path):
    """70 lines: 60 prompts, of which 4 come twice, and 6 bad lines; benchmark prompts are 5 of them."""
    lines = [json.dumps({"prompt": f"w{i} w{(i * 7) % 60} w{(i * i) % 60}"}) for i in range(60)]
    (tmp_path / "benchmark.jsonl").write_text("\n".join(lines[:5]) + "\n")
    bad = ["", "{", '{"turns": []}', "[1]", '{"messages": []}', '{"kind": 3}']
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join([*lines, *lines[10:14], *bad, ""]))
    return file


def plan(target, out, source, **changes):
    base = dict(max_new=6, temperature="0", exclude=(str(source.parent / "benchmark.jsonl"),), shard_size=9, slots=8)
    return Collection(target, out, (str(source),), **base | changes)


def test_from_a_file_to_shards(target, source, tmp_path, caplog):
    said = []
    with caplog.at_level(logging.WARNING):
        counts = collect(plan(target, tmp_path / "d", source), said.append)
    assert counts["answered"] == 55 and counts["left_out"] == counts["resumed"] == 0 and counts["shards"] == 7
    assert said[0].startswith("64 prompts read, 4 repeated, 5 left out as a benchmark's; of 55 kept, ")
    assert f"{source}:66 left out: it is not JSON" in caplog.text
    sequences = load_sequences(tmp_path / "d")
    model = TargetModel.from_pretrained(target, dtype=torch.bfloat16)
    assert len(sequences) == 55 and sequences[0].tokens.dtype == "int32"
    asked = {tuple(s.tokens[: s.prompt_length].tolist()) for s in sequences}
    assert (60, 5, 35, 25, EOS, 61) in asked and (60, 4, 28, 16, EOS, 61) not in asked
    for s in sequences[:3]:
        prompt = s.tokens[: s.prompt_length].tolist()
        assert s.tokens.tolist() == generate_plain(model, prompt, 6, (EOS,))
    held = list(read(str(tmp_path / "d" / "held-out.jsonl")))
    assert 0 < len(held) < 8 and f"{len(held)} are held out" in said[0]
    ids = lambda chat: [60, *[int(w[1:]) for w in chat.text.split()], EOS, 61]
    assert all(is_held_out_prompt(ids(chat)) for chat in held)
    assert {f.suffix for f in (tmp_path / "d").iterdir()} == {".safetensors", ".jsonl", ".json"}


def test_a_run_that_ended_early_is_gone_on_with(target, source, tmp_path):
    collect(plan(target, tmp_path / "whole", source), quiet)
    collect(plan(target, tmp_path / "torn", source), quiet)
    for file in sorted((tmp_path / "torn").glob("shard-*"))[4:]:
        file.unlink()
    (tmp_path / "torn" / "shard-00-00004.part").write_bytes(b"half")
    source.unlink()  # the folder keeps the prompts
    counts = collect(plan(target, tmp_path / "torn", source), quiet)
    assert counts["resumed"] == 36 and counts["answered"] == 19
    as_set = lambda name: {(s.prompt_length, *s.tokens.tolist()) for s in load_sequences(tmp_path / name)}
    assert as_set("torn") == as_set("whole")
    with pytest.raises(ValueError, match="seed was 1, now 2"):
        collect(plan(target, tmp_path / "torn", source, seed=2), quiet)


def test_a_corrupt_shard_is_one_sentence(target, source, tmp_path):
    collect(plan(target, tmp_path / "d", source, count=12), quiet)
    shard = tmp_path / "d" / "shard-00-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-40])
    go_on = lambda: collect(plan(target, tmp_path / "d", source, count=12), quiet)
    for again in (go_on, lambda: load_sequences(tmp_path / "d")):
        with pytest.raises(ValueError, match="shard-00-00000.safetensors is corrupt .*; remove it") as caught:
            again()
        assert "\n" not in str(caught.value)
    shard.unlink()
    assert go_on()["answered"] == 9


def test_our_own_engines_answer_as_the_target_does(target, source, tmp_path):
    """Greedy, whole command, token ids both ways."""
    bundle = exported(target, make_draft(tmp_path / "draft", target), tmp_path / "bundle")
    counts = collect(plan(target, tmp_path / "d", source, count=8, answers="engines", bundle=bundle), quiet)
    assert counts["answered"] == 8
    model = TargetModel.from_pretrained(target)
    for s in load_sequences(tmp_path / "d"):
        assert s.tokens.tolist() == generate_plain(model, s.tokens[: s.prompt_length].tolist(), 6, (EOS,))


def test_logs_are_kept_with_the_answers_that_they_have(target, tmp_path, caplog):
    user, answer = {"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2 w3"}
    system = {"role": "system", "content": "w9"}
    logs = [[user, answer], [user | {"content": "w4"}], [system, user | {"content": "w5"}, answer]]
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "a.json").write_text(json.dumps([{"messages": log} for log in logs]))
    source = tmp_path / "logs"
    with caplog.at_level(logging.WARNING):
        counts = collect(Collection(target, tmp_path / "d", (str(source),), answers="logs"), quiet)
    assert counts["answered"] == 2 and counts["left_out"] == 1 and "a chat with no assistant turn" in caplog.text
    tokens = [s.tokens.tolist() for s in load_sequences(tmp_path / "d")]
    assert tokens == [[60, 1, EOS, 61, 2, 3, EOS], [60, 9, EOS, 60, 5, EOS, 61, 2, 3, EOS]]


def test_recommended_sampling_thinking_and_mixed_temperatures(target, source, tmp_path):
    other = tmp_path / "target"
    other.mkdir()
    for file in target.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    (other / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.95, "top_k": 20}))
    with pytest.raises(ValueError, match="the PyTorch sampler knows no top_p or top_k"):
        collect(plan(other, tmp_path / "a", source, temperature="recommended"), quiet)
    kept = json.loads((tmp_path / "a" / "meta.json").read_text())
    assert (kept["temperature"], kept["top_p"], kept["top_k"]) == (0.6, 0.95, 20)
    off = dict(top_p=1.0, top_k=0, count=12, thinking=True)
    collect(plan(other, tmp_path / "b", source, temperature="mixed", **off), quiet)
    assert {s.tokens[s.prompt_length - 1] for s in load_sequences(tmp_path / "b")} == {59}
    assert json.loads((tmp_path / "b" / "meta.json").read_text())["temperature"] == "mixed"


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"answers": "oracle"}, "answers is 'oracle'; it must be one of torch, engines, server, logs"),
        ({"answers": "engines"}, "need a bundle"),
        ({"answers": "server"}, "need its address and model"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"max_new": 0}, "max_new is 0; it must be 1 or more"),
        ({"exclude": "all"}, "no prompt is left of 64"),
        ({"max_prompt": 3}, None),
    ],
)
def test_what_cannot_be(changes, words, target, source, tmp_path):
    if changes.get("exclude") == "all":
        changes = {"exclude": (str(source),)}
    if words is None:  # too long is counted, not an error
        counts = collect(plan(target, tmp_path / "d", source, **changes), quiet)
        assert counts["too_long"] == 55 and counts["answered"] == 0
        return
    with pytest.raises(ValueError, match=words):
        collect(plan(target, tmp_path / "d", source, **changes), quiet)


def test_command_line(target, source, tmp_path):
    from training.__main__ import app

    command = ["data", "--target", str(target), "--out", str(tmp_path / "d"), "--source", str(source), "--count", "5"]
    done = CliRunner().invoke(app, [*command, "--temperature", "0", "--max-new", "4"])
    assert done.exit_code == 0 and "answered 5" in done.output, done.output
    refused = CliRunner().invoke(app, [*command, "--answers", "server"])
    assert refused.exit_code == 1 and "need its address" in refused.output
