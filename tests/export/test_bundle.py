"""python -m export end to end on tiny models: what it writes, what it refuses, and that nothing half-written stays."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import engines
from export.__main__ import export
from export.bundle import copy_tokenizer, kept_calibration, target_entry, written_whole
from export.gates import Gate
from tests.tiny import make_draft, make_target
from training.checkpoint import checkpoint_hash
from training.decoder_config import DecoderConfig

ROOT = Path(__file__).parents[2]
QUIET = Console(quiet=True)
ENGINES = ["target", "backbone", "markov", "confidence", "verify"]


@pytest.fixture()
def pair(tmp_path):
    target = make_target(tmp_path / "target")
    return target, make_draft(tmp_path / "draft", target)


def left_over(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if ".partial-" in p.name or ".old-" in p.name)


@pytest.mark.parametrize(
    "family, target_options, draft_options, dtype",
    [
        ("llama", {}, {}, "fp32"),
        ("llama", {"tied": True}, {"head": "gated", "confidence": "hidden", "layer_ids": (-1, 1)}, "int8"),
        ("qwen3", {}, {"head": "rnn", "draft_vocab": 40}, "fp32"),
        ("qwen3", {"bias": True}, {"rank": 0, "confidence": None}, "int8"),
        ("qwen3", {}, {"rank": 0, "confidence": None, "sample_from_anchor": False}, "int8-block64"),
    ],
)
def test_bundle_is_what_the_manifest_says(tmp_path, family, target_options, draft_options, dtype):
    target = make_target(tmp_path / "target", family=family, eos=[62, 63], **target_options)
    draft = make_draft(tmp_path / "draft", target, **draft_options)
    out = tmp_path / "bundle"
    export(target, draft, out, dtype=dtype, max_context=128, console=QUIET)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["format_version"] == 2 and manifest["dtype"] == dtype and manifest["max_context"] == 128
    assert manifest["target"]["hash"] == checkpoint_hash(target) and manifest["draft"]["hash"] == checkpoint_hash(draft)
    assert manifest["target"]["eos_token_ids"] == [62, 63] and manifest["target"]["bos_token_id"] == 0
    assert manifest["draft"]["vocab_size"] == draft_options.get("draft_vocab", 64)
    assert manifest["draft"]["has_confidence"] == (draft_options.get("confidence", "markov") is not None)
    assert manifest["draft"].get("sample_from_anchor", True) == draft_options.get("sample_from_anchor", True)
    assert list(manifest["engines"]) == ENGINES
    for entry in manifest["engines"].values():
        path = out / entry["path"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"]
        data = path.with_name("model.onnx.data")
        assert data.is_file() == ("data_sha256" in entry)
    assert {row["engine"] for row in manifest["parity"]} == set(ENGINES)
    assert all(np.isfinite([row["cosine"], row["norm_ratio"], row["max_abs"]]).all() for row in manifest["parity"])
    assert left_over(tmp_path) == [] and not (out / "tokenizer.json").exists()


def test_without_parity_nothing_is_compared_and_it_is_said(tmp_path, pair, monkeypatch):
    monkeypatch.setattr("export.__main__.load_models", lambda *a: pytest.fail("a model was loaded"))
    text = io.StringIO()
    export(*pair, tmp_path / "bundle", parity=False, max_context=64, console=Console(file=text, width=140))
    assert json.loads((tmp_path / "bundle" / "manifest.json").read_text())["parity"] == []
    assert "parity: skipped; no graph was compared with PyTorch, no output was looked at" in text.getvalue()
    assert "graphs written: " in text.getvalue() and engines.load(tmp_path / "bundle").bundle.dtype == "fp32"


@pytest.mark.parametrize("emulate", ["fp16", "bf16", "int8"])
def test_an_emulation_is_a_bundle_for_onnx_runtime(tmp_path, pair, emulate):
    """It loads here, rounds as TensorRT's graphs do, and says what it is."""
    out = tmp_path / "bundle"
    export(*pair, out, emulate=emulate, max_context=128, console=QUIET)
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["backend"], manifest["dtype"], manifest["emulates"]) == ("onnxruntime", "fp32", emulate)
    worst = min(row["cosine"] for row in manifest["parity"] if row["engine"] == "target")
    assert 0.99 < worst < 1 - 1e-9
    opened = engines.load(out)
    opened.ensure_capacity(1, 64)
    assert opened.target_capacity >= 64
    opened.close()


def test_an_emulation_is_of_onnx_runtime_in_fp32(tmp_path, pair):
    with pytest.raises(ValueError, match="emulate is 'fp16'; it needs backend onnxruntime and dtype fp32, not onnxruntime int8"):
        export(*pair, tmp_path / "bundle", dtype="int8", emulate="fp16", console=QUIET)


def test_a_failed_export_leaves_the_old_bundle(tmp_path, pair, monkeypatch):
    out = tmp_path / "bundle"
    export(*pair, out, console=QUIET)
    before = (out / "manifest.json").read_bytes()
    monkeypatch.setattr("export.gates.FP32", Gate(cosine=1.0, relative=0.0))  # a gate that no rounding passes
    with pytest.raises(ValueError, match=r"^parity: .* is outside the fp32 gate"):
        export(*pair, out, console=QUIET)
    assert (out / "manifest.json").read_bytes() == before and left_over(tmp_path) == []


def test_what_is_no_bundle_is_not_replaced(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="is not a bundle"):
        with written_whole(tmp_path / "mine"):
            pass
    assert (tmp_path / "mine" / "thesis.txt").exists()


def edit(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop_tensor(folder: Path, name: str) -> None:
    state = load_file(folder / "model.safetensors")
    del state[name]
    save_file(state, folder / "model.safetensors")


def add_tensor(folder: Path, name: str) -> None:
    save_file(load_file(folder / "model.safetensors") | {name: torch.zeros(2)}, folder / "model.safetensors")


BAD = {
    "another hidden size": (lambda t, d: edit(d, hidden_size=64), "hidden_size is 64, the target's is 32"),
    "another vocabulary": (lambda t, d: edit(d, vocab_size=80), "vocab_size is 80, the target's is 64"),
    "another depth": (lambda t, d: edit(d, num_target_layers=9), "num_target_layers is 9, the target's is 3"),
    "layer ids": (lambda t, d: edit(d, target_layer_ids=[0, 3]), "target_layer_ids"),
    "the last layer": (lambda t, d: edit(d, target_layer_ids=[0, 2]), "[0, 2]; 2 is the target's last layer"),
    "mask id": (lambda t, d: edit(d, mask_token_id=64), "mask_token_id is 64"),
    "family": (lambda t, d: edit(t, model_type="gpt2"), "model_type is 'gpt2'"),
    "weight missing": (lambda t, d: drop_tensor(d, "fc.weight"), "fc.weight"),
    "weight unused": (lambda t, d: add_tensor(t, "model.extra"), "extra"),
    "no target": (lambda t, d: (t / "config.json").unlink(), "--target"),
    "no draft": (lambda t, d: (d / "config.json").unlink(), "--draft"),
    "no weights": (lambda t, d: (t / "model.safetensors").unlink(), "safetensors"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(tmp_path, pair, name):
    damage, expected = BAD[name]
    damage(*pair)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        export(*pair, tmp_path / "bundle", console=QUIET)
    assert expected in str(error.value) and "\n" not in str(error.value)
    assert left_over(tmp_path) == [] and not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("max_context", [3, 100_000])
def test_max_context_has_a_range(tmp_path, pair, max_context):
    with pytest.raises(ValueError, match=r"max_context is \d+; it must lie in 8\.\.512"):
        export(*pair, tmp_path / "bundle", max_context=max_context, console=QUIET)


def test_command_line(tmp_path, pair):
    command = [sys.executable, "-m", "export", "--target", pair[0], "--draft", tmp_path / "nowhere", "--out", tmp_path / "bundle"]
    done = subprocess.run([str(c) for c in command], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("export: --draft") and len(done.stderr.splitlines()) == 1


def test_eos_from_either_config(tmp_path):
    target = make_target(tmp_path / "target", eos=5)
    config = DecoderConfig.from_hf(json.loads((target / "config.json").read_text()))
    assert target_entry(target, config)["eos_token_ids"] == [5]
    (target / "generation_config.json").unlink()
    edit(target, eos_token_id=[7, 8])
    assert target_entry(target, config)["eos_token_ids"] == [7, 8]


def test_chat_template_inside_the_tokenizer_config(tmp_path):
    (tmp_path / "bundle").mkdir()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    copy_tokenizer(tmp_path, tmp_path / "bundle")
    assert (tmp_path / "bundle" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_a_calibration_outlives_an_export_of_the_same_checkpoints(tmp_path):
    target, draft = {"hash": "t"}, {"hash": "d", "block_size": 2}
    calibration = {"draft_hash": "d", "target_hash": "t", "sampled": [1.0, 2.0], "greedy": [1.0, 1.0]}
    keep = lambda **changes: kept_calibration(tmp_path, {**target, **changes.get("target", {})}, {**draft, **changes.get("draft", {})})
    assert keep() is None  # no bundle there yet
    (tmp_path / "manifest.json").write_text("{}")
    assert keep() is None
    (tmp_path / "manifest.json").write_text(json.dumps({"calibration": calibration}))
    assert keep() == calibration
    assert keep(draft={"hash": "other"}) is keep(target={"hash": "other"}) is keep(draft={"block_size": 3}) is None


def test_an_export_over_a_calibrated_bundle_keeps_it(tmp_path, pair):
    target, draft = pair
    out = tmp_path / "bundle"
    export(target, draft, out, max_context=64, console=QUIET)
    manifest = json.loads((out / "manifest.json").read_text())
    assert "calibration" not in manifest
    calibration = {"draft_hash": manifest["draft"]["hash"], "target_hash": manifest["target"]["hash"], "sampled": [1.0] * 4, "greedy": [2.0] * 4}
    (out / "manifest.json").write_text(json.dumps({**manifest, "calibration": calibration}))
    export(target, draft, out, dtype="int8", max_context=64, console=QUIET)
    assert json.loads((out / "manifest.json").read_text())["calibration"] == calibration
    export(target, make_draft(tmp_path / "other", target, seed=9), out, max_context=64, console=QUIET)
    assert "calibration" not in json.loads((out / "manifest.json").read_text())


def test_int8_has_no_kernels_on_a_gpu(tmp_path):
    line = [sys.executable, "-m", "export", "--target", "t", "--draft", "d", "--out", str(tmp_path / "b")]
    done = subprocess.run([*line, "--dtype", "int8", "--device", "cuda"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "export: dtype is 'int8'; on cuda ONNX Runtime has no kernels for its products, use fp32.\n"
