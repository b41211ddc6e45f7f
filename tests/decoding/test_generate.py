import json
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from typer.testing import CliRunner

from decoding.__main__ import app
from decoding.compare import compare
from decoding.generate import Answer, read_answers
from decoding.request import Request, SamplingParams
from decoding.schedule import Fixed

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"


@pytest.fixture
def bundle(tiny, tmp_path):
    """The tiny bundle with a byte-level tokenizer of its 64 ids, linked together in a folder of its own."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    for path in tiny.bundle.folder.iterdir():
        (folder / path.name).symlink_to(path)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:64]
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def generate(bundle, tmp_path):
    def go(lines, *options, folder=bundle):
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        (tmp_path / "in.jsonl").write_text(text + "\n")
        files = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
        result = CliRunner().invoke(
            app, ["generate", "--bundle", str(folder), "--threads", "1", "--schedule", "fixed", *files, *map(str, options)]
        )
        assert not result.exception or isinstance(result.exception, SystemExit), result.exception
        out = tmp_path / "out.jsonl"
        return result, [json.loads(line) for line in out.read_text("utf-8").splitlines()] if out.exists() else None

    return go


IDS = {"input_ids": [1, 2, 3]}


def test_a_line_of_each_kind(generate, tiny):
    lines = [{"prompt": "AB", "id": "first"}, {"messages": [{"role": "1", "content": "2"}]}, {**IDS, "max_tokens": 5}]
    result, out = generate(lines, "--max-tokens", 9, "--ignore-eos")
    assert result.exit_code == 0 and [o["id"] for o in out] == ["first", 1, 2]
    keys = ["id", "output_ids", "text", "finish_reason", "num_input_tokens", "num_output_tokens", "rounds"]
    assert all(list(o) == keys for o in out)
    assert [(o["num_input_tokens"], o["num_output_tokens"], o["finish_reason"]) for o in out] == [
        (2, 9, "length"), (5, 9, "length"), (3, 5, "length"),
    ]  # fmt: skip
    for o in out:
        assert len(o["output_ids"]) == o["num_output_tokens"] and len(o["text"]) == o["num_output_tokens"]
        assert all(r["drafted"] == r["verified"] == 4 and 0 <= r["accepted"] <= 4 for r in o["rounds"])
        assert sum(r["accepted"] + 1 for r in o["rounds"]) + 1 >= o["num_output_tokens"]


def test_schedules_agree_and_none_has_empty_rounds(generate):
    runs = {
        s: generate([IDS] * 3, "--schedule", s, "--max-tokens", 12, "--ignore-eos")[1]
        for s in ("none", "fixed", "threshold")
    }
    assert len({json.dumps([o["output_ids"] for o in out]) for out in runs.values()}) == 1
    assert runs["none"][0]["rounds"] == [{"drafted": 0, "verified": 0, "accepted": 0}] * 11
    assert any(r["verified"] < r["drafted"] for r in runs["threshold"][0]["rounds"])


def test_seeds(generate):
    options = ("--temperature", 1, "--max-tokens", 12, "--ignore-eos")
    ids = lambda out: [o["output_ids"] for o in out]
    first = ids(generate([IDS] * 4, *options, "--seed", 5)[1])
    assert len({str(i) for i in first}) == 4, "each line has its own seed"
    assert ids(generate([IDS] * 4, *options, "--seed", 5, "--max-requests", 1)[1]) == first
    assert ids(generate([IDS] * 3, *options, "--seed", 6)[1]) == first[1:], "line i uses seed + i"
    assert ids(generate([{**IDS, "seed": 8}], *options)[1]) == first[3:]
    assert ids(generate([{**IDS, "temperature": 0}], *options)[1]) == ids(
        generate([IDS], "--max-tokens", 12, "--ignore-eos")[1]
    )


BAD = [
    ("nope", "it is not JSON"),
    ("[1]", "it must be a JSON object."),
    ("[" * 100_000, "it is not JSON"),
    ({}, "it holds 0 of prompt, messages and input_ids; it must hold exactly 1."),
    ({**IDS, "prompt": "x"}, "it holds 2 of prompt"),
    ({**IDS, "top_q": 1}, "'top_q' is not a known field"),
    ({"prompt": 3}, "prompt must be a string."),
    ({"prompt": ""}, "prompt is empty"),
    ({"prompt": "\ud800"}, "prompt holds a lone surrogate"),
    ({"messages": []}, "messages is empty"),
    ({"input_ids": [1, 64]}, "input_ids holds 64; every id must lie in 0..63."),
    ({"input_ids": ["1"]}, "input_ids must be a list of integers."),
    ({"input_ids": [10**30]}, "input_ids holds a number outside int64."),
    ({"input_ids": 3}, "input_ids must be a list of integers."),
    ({"input_ids": [1] * 600}, "prompt is 600 tokens long"),
    ({**IDS, "max_tokens": 0}, "max_tokens is 0; it must lie in 1..505"),
    ({**IDS, "max_tokens": "7"}, "max_tokens is 7"),
    ({**IDS, "temperature": -1}, "temperature is -1"),
    ('{"input_ids": [1], "temperature": NaN}', "temperature is nan"),
    ({**IDS, "seed": 2**64}, "seed is 18446744073709551616"),
    ({**IDS, "threshold": 2}, "threshold is 2"),
    ({**IDS, "ignore_eos": 1}, "ignore_eos is 1; it must be true or false."),
]


def test_bad_lines_are_refused_one_by_one_and_the_others_go_on(generate):
    lines = [x for bad, _ in BAD for x in (bad, IDS)]
    result, out = generate(lines, "--max-tokens", 4)
    assert result.exit_code == 0 and len(out) == len(lines)
    for number, (_, message) in enumerate(BAD):
        line = out[2 * number]
        assert set(line) == {"id", "error"} and line["error"].startswith(f"line {2 * number + 1}: {message}"), line
        assert "\n" not in line["error"]
        assert out[2 * number + 1]["output_ids"] == out[1]["output_ids"]


def test_invalid_utf8_is_one_bad_line(tmp_path):
    file = tmp_path / "in.jsonl"
    file.write_bytes(b'{"input_ids": [1]}\n\n{"prompt": "\xff"}\n')
    good, bad = read_answers(file, None, SamplingParams(4))
    assert good.error is None and bad.error == "line 2: it is not valid UTF-8."


def test_exit_codes(generate, tmp_path):
    assert generate(["nope"])[0].exit_code == 1
    assert generate([])[0].exit_code == 0
    result, _ = generate([IDS], folder=tmp_path)
    assert result.exit_code == 1 and "manifest.json" in result.output
    for option, message in (
        (("--schedule", "best"), "schedule is 'best'"),
        (("--max-requests", 0), "max_requests is 0"),
    ):
        result, _ = generate([IDS], *option)
        assert result.exit_code == 1 and message in result.output


def test_without_a_tokenizer_ids_still_work(generate, tiny):
    result, out = generate([IDS, {"prompt": "x"}], "--max-tokens", 4, folder=tiny.bundle.folder)
    assert out[0]["text"] == "" and len(out[0]["output_ids"]) == 4
    assert out[1]["error"] == "line 2: prompt needs a tokenizer and this bundle has none; send input_ids."


def test_report(generate, tmp_path):
    generate([IDS] * 3, "--max-tokens", 10, "--ignore-eos", "--report", tmp_path / "r.json")
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["output_tokens"] == 30 and len(report["acceptance_per_position"]) == 4 and report["refused"] == 0
    assert 1 <= report["acceptance_length"] <= 5 and 0 < report["share_outside_engines"] < 1


def test_as_a_command(bundle, tmp_path):
    (tmp_path / "in.jsonl").write_text(json.dumps(IDS) + "\n")
    command = [sys.executable, "-m", "decoding", "generate", "--bundle", str(bundle), "--input", str(tmp_path / "in.jsonl"),
               "--output", str(tmp_path / "new" / "out.jsonl"), "--schedule", "threshold", "--threshold", "0.3", "--temperature",
               "0.7", "--seed", "3", "--max-tokens", "6", "--max-requests", "2", "--token-budget", "64"]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert 1 <= json.loads((tmp_path / "new" / "out.jsonl").read_text())["num_output_tokens"] <= 6
    loaded = "import sys, decoding.__main__, engines.onnxruntime; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True).stdout == "[]\n"


# -- compare -----------------------------------------------------------------------------------------------------------


def answers(count=4):
    requests = [Request(i, tuple(range(1 + i, 6 + 2 * i)), SamplingParams(12, ignore_eos=True)) for i in range(count)]
    return [Answer(i + 1, i, r) for i, r in enumerate(requests)]


def test_compare_finds_equality(tiny):
    result = compare(tiny, answers(), [1, 3], Fixed(), 1e-4)
    assert (result["prompts"], result["tokens"], result["different"], result["near_ties"]) == (4, 48, 0, 0)
    assert [(r["batch"], r["equal"]) for r in result["runs"]] == [(1, 4), (3, 4)]


class Wrong:
    """The real engines; verify adds one to the next token of its n-th call."""

    def __init__(self, engines, at):
        self.engines, self.left = engines, at

    def __getattr__(self, name):
        return getattr(self.engines, name)

    def verify(self, batch):
        result, self.left = self.engines.verify(batch), self.left - 1
        if self.left == 0:
            result.next_tokens[:] = (result.next_tokens + 1) % 60
        return result


def test_compare_finds_a_difference_and_says_where(tiny):
    result = compare(Wrong(tiny, at=4 * 12 + 3), answers(), [1], Fixed(), 1e-4)
    assert result["different"] == 1 and result["near_ties"] == 0
    (difference,) = result["runs"][0]["differences"]
    assert difference["line"] == 1 and difference["at"] >= 2 and difference["gap"] > 1e-4
    assert compare(Wrong(tiny, at=4 * 12 + 3), answers(), [1], Fixed(), 1e9)["near_ties"] == 1


def test_compare_as_a_command(bundle, tmp_path):
    (tmp_path / "in.jsonl").write_text((json.dumps({**IDS, "max_tokens": 8}) + "\n") * 3)
    options = ["--bundle", str(bundle), "--prompts", str(tmp_path / "in.jsonl"), "--threads", "1", "--batch", "1,2"]
    result = CliRunner().invoke(app, ["compare", *options, "--report", str(tmp_path / "c.json")])
    assert result.exit_code == 0 and json.loads((tmp_path / "c.json").read_text())["different"] == 0
    assert CliRunner().invoke(app, ["compare", *options, "--batch", "0"]).exit_code == 1


SAMPLING = dict(
    temperature=0.9, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.1, presence_penalty=0.2, frequency_penalty=0.1,
    bad_words=["AB", [3, 4]], logit_bias={"5": 1.5}, min_tokens=3, seed=4, return_log_probs=True, speculative=True,
)  # fmt: skip


def test_every_sampling_key_and_both_rules(generate):
    lines = [{**IDS, **SAMPLING, "accept": rule} for rule in ("rejection", "coupled")]
    result, out = generate(lines, "--max-tokens", 12, "--ignore-eos")
    assert result.exit_code == 0, out
    for o in out:
        assert len(o["log_probs"]) == len(o["output_ids"]) == 12 and max(o["log_probs"]) <= 0
    plain = generate([lines[1]], "--max-tokens", 12, "--ignore-eos", "--schedule", "none")[1]
    assert plain[0]["output_ids"] == out[1]["output_ids"]
    by_option = generate([{**IDS, **SAMPLING}], "--max-tokens", 12, "--ignore-eos", "--accept", "coupled")[1]
    assert by_option[0]["output_ids"] == out[1]["output_ids"]


def test_logit_bias_as_pairs_is_the_same(generate):
    lines = [{**IDS, "logit_bias": {"5": 50}}, {**IDS, "logit_bias": [[5, 50]]}]
    out = generate(lines, "--max-tokens", 4)[1]
    assert [o["output_ids"] for o in out] == [[5] * 4] * 2


def test_a_stop_word_ends_the_answer(generate):
    whole = generate([IDS], "--max-tokens", 12, "--ignore-eos")[1][0]
    word = whole["text"][5:7]
    first = whole["text"].index(word)
    cut = generate([{**IDS, "stop_words": ["never", word], "return_log_probs": True}], "--max-tokens", 12, "--ignore-eos")[1][0]
    assert (cut["text"], cut["finish_reason"]) == (whole["text"][:first], "stop")
    assert cut["output_ids"] == whole["output_ids"][: first + 2] and len(cut["log_probs"]) == first + 2
    unmet = generate([{**IDS, "stop_words": ["never"]}], "--max-tokens", 12, "--ignore-eos")[1][0]
    assert (unmet["text"], unmet["finish_reason"]) == (whole["text"], "length")


BAD_SAMPLING = [
    ({"accept": "greedy"}, "accept is 'greedy'"),
    ({"top_k": 1.5}, "top_k is 1.5"),
    ({"bad_words": "x"}, "bad_words is 'x'; it must be a list of texts or lists of token ids."),
    ({"bad_words": [""]}, "bad_words holds an empty text."),
    ({"bad_words": [7]}, "bad_words holds 7"),
    ({"logit_bias": {"x": 1}}, "logit_bias holds the key 'x'; a key must be a token id."),
    ({"stop_words": [""]}, "stop_words is ['']; it must be a list of texts, none of them empty."),
    ({"min_tokens": 99}, "min_tokens is 99"),
]


def test_bad_sampling_keys_are_one_sentence(generate):
    result, out = generate([{**IDS, **change} for change, _ in BAD_SAMPLING], "--max-tokens", 4)
    assert result.exit_code == 1
    for o, (_, message) in zip(out, BAD_SAMPLING):
        assert message in o["error"] and o["error"].endswith(".") and "\n" not in o["error"]
