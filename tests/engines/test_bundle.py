import json
import shutil
import subprocess
import sys

import pytest

import engines
from engines.bundle import ENGINE_NAMES, Bundle, BundleError, contract
from tests.bundles import tiny_bundle


@pytest.fixture
def copy(bundle, tmp_path):
    return shutil.copytree(bundle, tmp_path / "copy")


def change(folder, edit):
    raw = json.loads((folder / "manifest.json").read_text())
    edit(raw)
    (folder / "manifest.json").write_text(json.dumps(raw))


def test_reads_what_export_wrote(bundle):
    b = Bundle.load(bundle)
    assert (b.target.vocab_size, b.target.num_layers, b.draft.block_size) == (64, 3, 4)
    assert b.target.eos_token_ids == (63,)
    assert tuple(b.engines) == ENGINE_NAMES == tuple(contract(b.target, b.draft))
    assert b.engines["target"].inputs[0].name == "token_ids"
    assert b.tokenizer_file is None


def test_a_manifest_without_sample_from_anchor_means_that_it_does(bundle):
    """Bundles made before the key was there."""
    assert "sample_from_anchor" not in json.loads((bundle / "manifest.json").read_text())["draft"]
    draft = Bundle.load(bundle).draft
    assert draft.sample_from_anchor and draft.block_slots == draft.block_size == 4


EDITS = {
    "sample_from_anchor is 'no', it must be": lambda m: m["draft"].update(sample_from_anchor="no"),
    "input 'block_position_ids' is ['R', 4], expected ['R', 5]": lambda m: m["draft"].update(sample_from_anchor=False),
    "format_version is 1": lambda m: m.update(format_version=1),
    "lacks the key 'max_context'": lambda m: m.pop("max_context"),
    "lacks the key 'vocab_size'": lambda m: m["draft"].pop("vocab_size"),
    "vocab_size is '64', it must be an integer": lambda m: m["target"].update(vocab_size="64"),
    "eos_token_ids holds 'x', each must be an integer": lambda m: m["target"].update(eos_token_ids=["x"]),
    "inputs holds 1, each must be an object": lambda m: m["engines"]["verify"].update(inputs=[1]),
    "shape holds None, each must be an integer or a string": lambda m: m["engines"]["verify"]["outputs"][0].update(
        shape=[None]
    ),
    "backend is 'cuda'": lambda m: m.update(backend="cuda"),
    "dtype is 'int3'": lambda m: m.update(dtype="int3"),
    "confidence_temperatures is [1.0]": lambda m: m.update(confidence_temperatures=[1]),
    "lacks the key 'verify'": lambda m: m["engines"].pop("verify"),
    "output 'logits' is ['M', 64], expected ['M', 65]": lambda m: m["target"].update(vocab_size=65),
    "lacks the input 'past_key_values.3.key'": lambda m: m["target"].update(num_layers=4),
    "unknown input 'past_key_values.2.key'": lambda m: m["target"].update(num_layers=2),
    "input 'token_ids' is int32": lambda m: m["engines"]["target"]["inputs"][0].update(dtype="int32"),
    "sha256 differs": lambda m: m["engines"]["markov"].update(sha256="0" * 64),
    "is missing although": lambda m: m["engines"]["markov"].update(path="onnx/other/model.onnx"),
}


@pytest.mark.parametrize("message", EDITS)
def test_a_manifest_that_does_not_fit_is_refused_in_one_sentence(copy, message):
    change(copy, EDITS[message])
    with pytest.raises(BundleError) as error:
        engines.load(copy)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).endswith(".") and "export" in str(error.value)


def test_refuses_a_changed_weight_file(copy):
    data = copy / "onnx" / "target" / "model.onnx.data"
    changed = data if data.is_file() else data.with_suffix("")
    content = bytearray(changed.read_bytes())
    content[-1] ^= 1
    changed.write_bytes(content)
    with pytest.raises(BundleError, match="sha256 differs"):
        engines.load(copy)


def test_refuses_graphs_of_another_bundle(copy, tmp_path):
    """Hashes right, names right, but the graph itself has other dimensions than the manifest says."""
    other = tiny_bundle(tmp_path / "other", vocab=96)
    shutil.copytree(other / "onnx" / "markov", copy / "onnx" / "markov", dirs_exist_ok=True)
    theirs = json.loads((other / "manifest.json").read_text())["engines"]["markov"]
    change(copy, lambda m: m["engines"]["markov"].update({k: v for k, v in theirs.items() if "sha256" in k}))
    with pytest.raises(BundleError, match="the manifest says"):
        engines.load(copy)


def test_load_refuses_an_unknown_backend(bundle):
    with pytest.raises(BundleError, match="tensorrt"):
        engines.load(bundle, backend="tensorrt")
    with pytest.raises(ValueError, match="threads is 0"):
        engines.load(bundle, threads=0)


def test_info_prints_and_fails(bundle, tmp_path):
    run = lambda folder: subprocess.run(
        [sys.executable, "-m", "engines", "info", "--bundle", str(folder)], capture_output=True, text=True
    )
    good, bad = run(bundle), run(tmp_path)
    assert good.returncode == 0 and "block 4" in good.stdout and "onnx/verify/model.onnx" in good.stdout
    assert bad.returncode == 1 and bad.stderr.count("\n") == 1 and "manifest.json" in bad.stderr
