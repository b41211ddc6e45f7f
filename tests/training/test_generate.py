"""Batched sampling with slot refill against one-sequence-at-a-time decoding; shards, resuming, refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from tests.tiny import make_target
from training.generate import Sequence, generate, load_sequences
from training.prompts import Prompt, write_prompts
from training.sampling import BatchSampler, ChatTokens, Job, draw_temperature, draws, pick
from training.target import PackedBatch, TargetModel

EOS = 63


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny products: a second thread would only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random target with a word-level tokenizer: the tokens are w0 ... w59 and the template's three marks."""
    folder = make_target(tmp_path_factory.mktemp("target"), vocab=64, eos=EOS)
    words = {f"w{i}": i for i in range(60)} | {"<user>": 60, "<answer>": 61, "<unk>": 62, "<end>": EOS}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<user> {{ m.content }} <end> {% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
    )
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return TargetModel.from_pretrained(folder)


def one_at_a_time(model, job: Job, seed: int) -> list[int]:
    """The whole sequence anew for each token, without caches."""
    answer, uniforms = [], draws(seed, job.index)[1](job.max_new)
    while len(answer) < job.max_new and (not answer or answer[-1] != EOS):
        tokens = job.tokens + answer
        batch = PackedBatch.build([tokens], [0], len(tokens))
        logits = model(batch, torch.tensor([len(tokens) - 1])).logits
        temperature, uniform = torch.tensor([job.temperature]), torch.tensor([uniforms[len(answer)]])
        answer.append(int(pick(logits, temperature, uniform)))
    return answer


def some_jobs(temperature=None) -> list[Job]:
    rng = np.random.default_rng(0)
    return [
        Job(i, rng.integers(0, 60, rng.integers(1, 40)).tolist(), draw_temperature(5, i) if temperature is None else
            temperature, int(rng.integers(1, 40)))
        for i in range(24)
    ]


@pytest.mark.parametrize("temperature", [0.0, None])
def test_slot_refill_equals_one_sequence_at_a_time(model, temperature):
    jobs = some_jobs(temperature)
    alone = {job.index: one_at_a_time(model, job, 5) for job in jobs}
    assert any(a[-1] == EOS for a in alone.values()) and any(a[-1] != EOS for a in alone.values())
    for slots in (1, 5, 64):
        sampler = BatchSampler(model, EOS, seed=5, slots=slots, capacity=90, max_new=50)
        assert {job.index: answer.tolist() for job, answer in sampler.run(jobs)} == alone


def test_a_sampler_can_run_again(model):
    sampler = BatchSampler(model, EOS, seed=5, slots=7, capacity=90, max_new=50)
    first = {j.index: a.tolist() for j, a in sampler.run(some_jobs())}
    assert {j.index: a.tolist() for j, a in sampler.run(some_jobs())} == first
    assert list(sampler.run(some_jobs(), seconds=0.0)) == []


def test_pick_follows_the_distribution_and_greedy_is_its_limit():
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]])
    n = 20_000
    uniforms = (torch.arange(n) + 0.5) / n
    for temperature in (0.7, 1.0):
        picked = pick(logits.expand(n, 4), torch.full((n,), temperature), uniforms)
        share = torch.bincount(picked, minlength=4) / n
        assert torch.allclose(share, torch.softmax(logits[0] / temperature, -1), atol=1e-3)
    assert pick(logits, torch.zeros(1), torch.zeros(1)).item() == 2
    assert pick(logits, torch.ones(1), torch.tensor([1 - 2**-24])).item() == 2


def test_temperatures_have_their_shares():
    drawn = [draw_temperature(1, i) for i in range(2000)]
    assert [round(drawn.count(t) / 2000, 1) for t in (0.0, 0.7, 1.0)] == [0.4, 0.2, 0.4]


def prompt_file(tmp_path, count=23):
    file = tmp_path / "prompts.jsonl"
    write_prompts(file, [Prompt(f"w{i} w{i + 1} w{i + 2}", ("maths", "code", "chat")[i % 3]) for i in range(count)])
    return file


def run(folder, out, file, **changes):
    settings = dict(count=23, seed=2, prompt_file=file, slots=4, max_new=12, max_prompt=20, shard_size=6, dtype="float32")
    return generate(folder, out, **(settings | changes))


def as_set(sequences: list[Sequence]) -> set:
    return {(tuple(s.tokens.tolist()), s.prompt_length, s.kind) for s in sequences}


def test_folder_holds_every_prompt_with_its_answer(folder, tmp_path):
    out = tmp_path / "data"
    counts = run(folder, out, prompt_file(tmp_path))
    sequences = load_sequences(out)
    assert counts["answered"] == len(sequences) == 23 and counts["shards"] == 4
    assert counts["answer_tokens"] == sum(len(s.tokens) - s.prompt_length for s in sequences)
    chat = ChatTokens(folder)
    prompts = {tuple(s.tokens[: s.prompt_length].tolist()): s.kind for s in sequences}
    assert prompts == {tuple(chat.question(f"w{i} w{i + 1} w{i + 2}")): ("maths", "code", "chat")[i % 3] for i in range(23)}
    assert all(s.tokens.dtype == np.int32 for s in sequences)


def test_an_unfinished_turn_may_be_empty(folder):
    chat = ChatTokens(folder)
    none, begun, whole = chat.unfinished(""), chat.unfinished("w1 w2"), chat.question("w1 w2")
    assert begun == [*none, *chat.encode("w1 w2")] and whole[: len(begun)] == begun and len(none) < len(begun) < len(whole)


def test_a_stopped_run_goes_on(folder, tmp_path):
    file = prompt_file(tmp_path)
    run(folder, tmp_path / "whole", file)
    run(folder, tmp_path / "torn", file)
    shards = sorted((tmp_path / "torn").glob("shard-*"))
    shards[-1].unlink()
    shards[-2].unlink()
    (tmp_path / "torn" / "shard-00-00002.part").write_bytes(b"half a shard")
    counts = run(folder, tmp_path / "torn", file)
    assert counts["resumed"] == 12 and counts["answered"] == 11
    assert as_set(load_sequences(tmp_path / "torn")) == as_set(load_sequences(tmp_path / "whole"))


def test_parts_together_are_the_whole(folder, tmp_path):
    file = prompt_file(tmp_path)
    for part in (0, 1):
        run(folder, tmp_path / "parts", file, part=part, parts=2)
    assert len(load_sequences(tmp_path / "parts")) == 23
    with pytest.raises(ValueError, match="part is 2"):
        run(folder, tmp_path / "parts", file, part=2, parts=2)


def test_own_prompts_are_finished_by_the_target(folder, tmp_path):
    counts = run(folder, tmp_path / "own", None, count=10, max_prompt=300)
    assert counts["answered"] + counts["too_long"] >= 6
    again = run(folder, tmp_path / "own2", None, count=10, max_prompt=300)
    assert again == counts and as_set(load_sequences(tmp_path / "own")) == as_set(load_sequences(tmp_path / "own2"))


def test_long_prompts_are_counted_and_left_out(folder, tmp_path):
    file = tmp_path / "long.jsonl"
    write_prompts(file, [Prompt("w1 " * 30, "chat"), Prompt("w1", "chat")])
    assert run(folder, tmp_path / "d", file)["too_long"] == 1 and len(load_sequences(tmp_path / "d")) == 1


def test_other_settings_are_refused(folder, tmp_path):
    file = prompt_file(tmp_path)
    run(folder, tmp_path / "d", file)
    with pytest.raises(ValueError, match="seed was 2, now 3"):
        run(folder, tmp_path / "d", file, seed=3)


def test_nothing_there_is_said_in_one_sentence(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no shard"):
        load_sequences(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no tokenizer.json"):
        ChatTokens(tmp_path)


def test_command_line(folder, tmp_path):
    from training.__main__ import app

    threads = torch.get_num_threads()
    command = ["generate", "--target", str(folder), "--out", str(tmp_path / "d"), "--seed", "1"]
    command += ["--prompts", str(prompt_file(tmp_path)), "--max-new", "5", "--slots", "8"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0 and "answered 23" in done.output
    assert CliRunner().invoke(app, command + ["--seed", "2"]).exit_code == 1
    assert torch.get_num_threads() == threads
