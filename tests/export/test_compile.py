"""python -m export --backend tensorrt-rtx, end to end on a tiny model: no GPU needed to compile, and refused where
there is none."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

import engines
from engines.__main__ import app as info
from engines.bundle import Bundle, BundleError
from engines.trt.build import compile_graph
from engines.trt.device import gpu_capability
from engines.trt.plans import check_plan
from export.__main__ import export
from export.compile import PlanOptions
from tests.tiny import make_draft, make_target

ROOT = Path(__file__).parents[2]
OPTIONS = PlanOptions(("8.9",), max_requests=4, chunk=16)
ENGINES = ["target", "backbone", "markov", "confidence", "verify"]


def run(folder: Path, out: Path, *, options: PlanOptions = OPTIONS, **more) -> str:
    """What the export prints."""
    text = io.StringIO()
    console = Console(file=text, width=140)
    more = {"backend": "tensorrt-rtx", "dtype": "fp16", "max_context": 64, **more}
    export(folder / "target", folder / "draft", out, options=options, console=console, **more)
    return text.getvalue()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder of the checkpoints, bundle, what was printed)."""
    folder = tmp_path_factory.mktemp("compile")
    target = make_target(folder / "target", family="qwen3", head_dim=16, layers=2)
    make_draft(folder / "draft", target, head="gated")
    return folder, folder / "bundle", run(folder, folder / "bundle")


def test_the_manifest_pins_what_was_compiled(made):
    _, out, printed = made
    bundle, raw = Bundle.load(out), json.loads((out / "manifest.json").read_text())
    assert bundle.backend == "tensorrt-rtx" and bundle.dtype == "fp16" and list(bundle.engines) == ENGINES
    settings = bundle.tensorrt
    assert settings["backend"] == "tensorrt-rtx" and settings["version"] == "1.7.1.116"
    sizes = {"requests": 4, "chunk": 16, "block": 4, "vocab": 64, "cache": 128}
    assert settings["limits"] == {**sizes, "sample_from_anchor": True, "autoregressive": False}
    assert [p["name"] for p in settings["profiles"]["target"]] == ["decode", "verify", "prefill"]
    for name, spec in bundle.engines.items():
        assert list(spec.plans) == ["8.9"] and raw["engines"][name]["plans"] == spec.plans
        check_plan(bundle, name, backend="tensorrt-rtx", version="1.7.1.116", capability="8.9")
    caches = [s for s in bundle.engines["target"].inputs if s.name.startswith("past_key_values.")]
    assert {(s.dtype, s.shape[2]) for s in caches} == {("float16", 128)}
    assert "2 of 2 fused" in printed and "1 of 1 fused" in printed and "warning" not in printed
    assert "compiling 5 graphs with tensorrt-rtx 1.7.1.116 for 8.9: about " in printed


def test_info_lists_the_plans(made):
    done = CliRunner().invoke(info, ["info", "--bundle", str(made[1])])
    assert done.exit_code == 0 and "compiled by tensorrt-rtx 1.7.1.116" in done.output
    assert "plans/sm89/target.plan" in done.output and "2 of 2 attentions fused" in done.output


@pytest.mark.skipif(gpu_capability() == "8.9", reason="its plans fit this machine's GPU")
def test_loading_it_here_is_refused_in_one_sentence(made):
    with pytest.raises(BundleError) as error:
        engines.load(made[1])
    expected = "its plans need an NVIDIA GPU, and there is none here" if gpu_capability() is None else "run"
    assert expected in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(
        BundleError, match="backend is 'tensorrt-rtx', not 'onnxruntime'; run python -m export --backend onnxruntime"
    ):
        engines.load(made[1], backend="onnxruntime")


def test_a_tensorrt_bundle_needs_its_settings(made, tmp_path):
    raw = json.loads((made[1] / "manifest.json").read_text())
    for change, words in (
        ({"tensorrt": None}, "it must be an object"), ({"dtype": "fp32"}, "it must be one of fp16, bf16, int8"),
        ({"backend": "x"}, "it must be one of onnxruntime"),
    ):  # fmt: skip
        (tmp_path / "manifest.json").write_text(json.dumps({**raw, **change}))
        with pytest.raises(BundleError, match=words):
            Bundle.load(tmp_path)
    del raw["tensorrt"]
    (tmp_path / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(BundleError, match="the key 'tensorrt' does not go with it"):
        Bundle.load(tmp_path)


def test_an_export_again_compiles_only_what_changed(made, monkeypatch):
    """Another draft: the target's plan stays, what holds the draft's weights is compiled."""
    folder, out, _ = made
    monkeypatch.setattr("engines.trt.plans.compile_graph", lambda *a: pytest.fail("nothing changed, and it compiled"))
    before = {p.name: p.read_bytes() for p in (out / "plans/sm89").glob("*.plan")}
    assert run(folder, out).count(" kept ") == 5
    assert {p.name: p.read_bytes() for p in (out / "plans/sm89").glob("*.plan")} == before
    names = []
    monkeypatch.setattr(
        "engines.trt.plans.compile_graph",
        lambda api, job, progress: names.append(job.name) or compile_graph(api, job, progress),
    )
    make_draft(folder / "draft", folder / "target", head="gated", seed=9)
    run(folder, out)
    assert names == ["backbone", "markov", "confidence"]


def test_ctrl_c_leaves_what_was_there(made, tmp_path, monkeypatch):
    folder, out, _ = made
    before = (out / "manifest.json").read_bytes()

    def interrupted(api, job, progress):
        return compile_graph(api, job, lambda share: signal.raise_signal(signal.SIGINT))

    monkeypatch.setattr("engines.trt.plans.compile_graph", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(folder, out, options=PlanOptions(("8.0",), max_requests=4, chunk=16))
    assert (out / "manifest.json").read_bytes() == before
    assert not [p for p in out.parent.iterdir() if ".partial-" in p.name or ".old-" in p.name]


def test_int8_is_weights_alone(made):
    """The same engines, tensors and caches as fp16; 8-bit weights in the graphs, attention fused."""
    folder, out, _ = made
    printed = run(folder, folder / "int8", dtype="int8")
    bundle, fp16 = Bundle.load(folder / "int8"), Bundle.load(out)
    assert bundle.dtype == "int8" and "2 of 2 fused" in printed and "1 of 1 fused" in printed and "warning" not in printed
    for name, spec in bundle.engines.items():
        assert (spec.inputs, spec.outputs) == (fp16.engines[name].inputs, fp16.engines[name].outputs)
    size = lambda b: (b.folder / "onnx/target/model.onnx.data").stat().st_size
    assert size(bundle) < 0.8 * size(fp16)


def test_attention_that_is_not_fused_is_a_warning(tmp_path):
    """head_dim 8 has no fused kernel."""
    target = make_target(tmp_path / "target", head_dim=8, layers=2)
    make_draft(tmp_path / "draft", target)
    printed = run(tmp_path, tmp_path / "bundle")
    assert printed.count("no fused attention kernel for 8.9; it is decomposed") == 3 and "0 of 2 fused" in printed
    assert "warning: target, layer Attention_" in printed
    bundle = Bundle.load(tmp_path / "bundle")
    assert len(bundle.engines["target"].plans["8.9"]["attention"]["unfused"]) == 2


@pytest.mark.parametrize(
    "more, words",
    [
        ({"dtype": "fp32"}, "dtype is 'fp32'; for the backend tensorrt-rtx it must be one of fp16, bf16, int8."),
        ({"backend": "onnxruntime"}, "dtype is 'fp16'; for the backend onnxruntime it must be one of fp32, int8, int8-block64."),
        ({"backend": "auto", "dtype": "fp32"}, "for the backend tensorrt-rtx it must be one of fp16, bf16, int8."),
        ({"backend": "tensorrt"}, "install it with pip install tensorrt-cu13, or use --backend tensorrt-rtx."),
        ({"options": PlanOptions(("9.0",))}, "does not compile for compute capability 9.0"),
        ({"options": PlanOptions(("8.9",), max_requests=0)}, "max_requests is 0; it must lie in 1..4096."),
        ({"options": PlanOptions(("8.9",), workspace=5)}, "workspace is 5 bytes; it must be 1 MB or more."),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_read(tmp_path, monkeypatch, more, words):
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # as where it is not installed
    with pytest.raises(ValueError) as error:
        run(tmp_path, tmp_path / "bundle", **more)
    assert words in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "bundle").exists()


def test_command_line(made, tmp_path):
    folder = made[0]
    command = [
        sys.executable, "-m", "export", "--target", folder / "target", "--draft", folder / "draft",
        "--out", tmp_path / "bundle", "--backend", "tensorrt-rtx", "--compute-capability", "8.9,9.9",
    ]  # fmt: skip
    done = subprocess.run([str(c) for c in command], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1 and done.stderr.startswith(
        "export: tensorrt-rtx 1.7.1.116 does not compile for compute capability 9.9"
    )
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "bundle").exists()
