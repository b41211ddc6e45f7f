import json

import numpy as np
import pytest
from typer.testing import CliRunner

from decoding.__main__ import app
from decoding.loop import Loop
from decoding.record import Prompt, Recorder, RecordError, read_prompts, record
from decoding.request import Request, SamplingParams
from decoding.schedule import make
from tests.decoding.drive import drive, prompts, requests, tokens

KEYS = {"confidence_logits", "accepted", "temperature", "request", "position", "kind", "meta"}


def some(count, seed=0):
    return [Prompt(ids, ("maths", "code", "chat")[i % 3]) for i, ids in enumerate(prompts(count, seed=seed))]


@pytest.fixture(scope="module")
def recorded(tiny, tmp_path_factory):
    file = tmp_path_factory.mktemp("record") / "deep" / "rollouts.npz"
    meta = record(tiny, some(6), file, max_tokens=24, max_requests=5, command="test")
    with np.load(file) as data:
        return meta, {name: data[name] for name in data.files}


def test_arrays_have_the_shapes_and_types_of_the_contract(tiny, recorded):
    meta, data = recorded
    B, G = meta["rounds"], tiny.bundle.draft.block_size
    assert set(data) == KEYS
    assert data["confidence_logits"].shape == (B, G) and data["confidence_logits"].dtype == np.float32
    for name, dtype in (("accepted", np.int16), ("temperature", np.float32), ("request", np.int32), ("position", np.int32)):
        assert data[name].shape == (B,) and data[name].dtype == dtype
    assert np.isfinite(data["confidence_logits"]).all() and np.ptp(data["confidence_logits"]) > 0
    assert 0 <= data["accepted"].min() < data["accepted"].max() <= G
    assert json.loads(str(data["meta"])) == meta
    assert (meta["draft_hash"], meta["target_hash"]) == (tiny.bundle.draft.hash, tiny.bundle.target.hash)


def test_every_prompt_is_answered_at_both_temperatures(recorded):
    meta, data = recorded
    assert meta["requests"] == 12
    for request in np.unique(data["request"]):
        rows = data["request"] == request
        assert set(data["temperature"][rows]) == {float(request % 2)}
        assert set(data["kind"][rows]) == {("maths", "code", "chat")[request // 2 % 3]}
    assert set(data["temperature"]) == {0.0, 1.0}


def test_positions_count_on_by_what_was_accepted(recorded):
    _, data = recorded
    lengths = [len(p.ids) for p in some(6)]
    for request in np.unique(data["request"]):
        rows = data["request"] == request
        position, accepted = data["position"][rows], data["accepted"][rows]
        assert position[0] == lengths[request // 2]
        np.testing.assert_array_equal(np.diff(position), accepted[:-1] + 1)


def test_the_rounds_are_those_of_the_loop(tiny):
    """Accepted counts against the loop's own outputs, logits against another run of one request alone."""
    todo = requests(prompts(3), temperature=1.0, max_tokens=20)
    recorder = Recorder(tiny.bundle.draft.block_size, {r.id: len(r.prompt_ids) for r in todo})
    outputs = drive(Loop(tiny, make("fixed"), observers=(recorder,)), todo)
    arrays = recorder.arrays()
    for r in todo:
        rows = arrays["request"] == r.id
        assert arrays["accepted"][rows].tolist() == [o.stats.accepted for o in outputs[r.id] if o.stats]
        alone = Recorder(tiny.bundle.draft.block_size, {r.id: len(r.prompt_ids)})
        drive(Loop(tiny, make("fixed"), observers=(alone,)), [r])
        np.testing.assert_allclose(alone.arrays()["confidence_logits"], arrays["confidence_logits"][rows], atol=1e-3)


def test_recording_changes_no_token(tiny):
    todo = requests(prompts(4), temperature=0.7)
    recorder = Recorder(tiny.bundle.draft.block_size, {r.id: len(r.prompt_ids) for r in todo})
    with_it = drive(Loop(tiny, make("fixed"), observers=(recorder,)), todo)
    assert tokens(with_it) == tokens(drive(Loop(tiny, make("fixed")), todo))


def test_only_whole_blocks_are_kept(tiny):
    """Under a scheduler that cuts blocks nothing (or only the whole ones) is kept; the positions still count on."""
    todo = [Request(0, prompts(1)[0], SamplingParams(20, 1.0, ignore_eos=True))]
    recorder = Recorder(tiny.bundle.draft.block_size, {0: len(todo[0].prompt_ids)})
    drive(Loop(tiny, make("threshold", 0.999), observers=(recorder,)), todo)
    assert len(recorder) == len(recorder.arrays()["accepted"]) == 0
    assert recorder._anchors[0] >= len(todo[0].prompt_ids) + 19


def test_the_same_seed_records_the_same_rounds(tiny, recorded, tmp_path):
    record(tiny, some(6), tmp_path / "again.npz", max_tokens=24, max_requests=5)
    with np.load(tmp_path / "again.npz") as again:
        np.testing.assert_array_equal(again["accepted"], recorded[1]["accepted"])
        np.testing.assert_array_equal(again["position"], recorded[1]["position"])


def test_a_time_limit_keeps_what_was_recorded(tiny, tmp_path):
    meta = record(tiny, some(200), tmp_path / "r.npz", max_tokens=64, max_requests=4, minutes=1e-6, least=1)
    assert 0 < meta["rounds"] and meta["finished"] < meta["requests"] == 400
    more = record(tiny, some(200), tmp_path / "r.npz", max_tokens=64, max_requests=4, minutes=1e-6, least=150)
    assert 150 <= more["rounds"] < 200


def test_prompt_files(tmp_path):
    lines = [{"input_ids": [1, 2], "kind": "maths"}, {"input_ids": [3]}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert read_prompts([tmp_path / "p.jsonl"], None) == [Prompt((1, 2), "maths"), Prompt((3,), "chat")]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", r"p.jsonl:2: "),
        ("[1]", "p.jsonl:2: it must be a JSON object"),
        ('{"kind": 3, "input_ids": [1]}', "kind is 3"),
        ('{"input_ids": ["a"]}', "input_ids must be a list of integers"),
        ('{"kind": "chat"}', "it has no prompt, turns, messages or input_ids"),
        ('{"prompt": "hello"}', "text needs a tokenizer"),
    ],
)
def test_lines_that_do_not_fit_are_refused(tmp_path, line, sentence):
    (tmp_path / "p.jsonl").write_text('{"input_ids": [1]}\n' + line + "\n")
    with pytest.raises(RecordError, match=sentence) as error:
        read_prompts([tmp_path / "p.jsonl"], None)
    assert "\n" not in str(error.value)


def test_an_empty_prompt_file_is_refused(tmp_path):
    (tmp_path / "p.jsonl").write_text("\n")
    with pytest.raises(RecordError, match="holds no prompt"):
        read_prompts([tmp_path / "p.jsonl"], None)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"temperatures": ()}, "temperature is empty"),
        ({"temperatures": (-1.0,)}, "prompt 1: temperature is -1.0"),
        ({"max_tokens": 1}, "max-tokens is 1"),
        ({"requests": -1}, "requests is -1"),
        ({"minutes": -1}, "minutes is -1"),
        ({"least": -1}, "least is -1"),
    ],
)
def test_options_out_of_range_are_refused(tiny, tmp_path, options, sentence):
    with pytest.raises(RecordError, match=sentence):
        record(tiny, some(2), tmp_path / "r.npz", **options)
    assert not list(tmp_path.iterdir())


def test_a_prompt_that_does_not_fit_is_refused(tiny, tmp_path):
    with pytest.raises(RecordError, match="prompt 2: prompt is 600 tokens long"):
        record(tiny, [*some(1), Prompt((1,) * 600, "chat")], tmp_path / "r.npz")


def test_the_command(tiny, tmp_path):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"input_ids": list(p.ids)}) + "\n" for p in some(2)))
    command = ["record", "--bundle", str(tiny.bundle.folder), "--output", str(tmp_path / "r.npz"), "--prompts", str(tmp_path / "p.jsonl")]
    result = CliRunner().invoke(app, [*command, "--max-tokens", "12", "--threads", "1"])
    assert result.exit_code == 0 and (tmp_path / "r.npz").is_file(), result.output
    for extra in (["--temperature", "warm"], ["--prompts", str(tmp_path / "none.jsonl")]):
        assert CliRunner().invoke(app, [*command, *extra]).exit_code == 1
