"""Plans of a bundle: kept while nothing changed, and refused before anything opens them where they do not fit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from engines.manifest import BundleError
from engines.specs import EngineSpec
from engines.trt.api import aim, load_api
from engines.trt.build import compile_graph
from engines.trt.plans import Compiler, check_plan, plan_key, plan_path, write_whole
from tests.engines.trt.graphs import LIMITS, PROFILES, WORKSPACE, graph_file, tiny_graphs

VERSION = "1.7.1.116"


@pytest.fixture(scope="module")
def compiler():
    return Compiler(load_api("tensorrt-rtx"), LIMITS, WORKSPACE)


@pytest.fixture(scope="module")
def built(tmp_path_factory, compiler):
    """(graph file, folder with plans/ and a manifest): the confidence engine, which compiles in a blink."""
    folder = tmp_path_factory.mktemp("plans")
    file = graph_file(folder / "graphs", tiny_graphs(folder / "graphs", "fp16", depth=1, layer_ids=(-1,))["confidence"])
    result = compiler.compile(file, "8.9", folder, folder / "nowhere")
    manifest = {"engines": {"confidence": {"plans": {"8.9": result.entry}}}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return file, folder, result


def test_what_is_written_is_what_the_entry_says(built):
    _, folder, result = built
    entry = result.entry
    assert not result.reused and result.unfused == () and entry["path"] == "plans/sm89/confidence.plan"
    assert (folder / entry["path"]).stat().st_size == entry["bytes"] > 100_000
    kernels = json.loads((folder / entry["summary"]).read_text())
    assert len(kernels) == entry["kernels"] > 0 and set(kernels[0]) == {"name", "kind", "tactic", "nodes"}
    assert entry["attention"] == {"nodes": 0, "unfused": []} and entry["seconds"] > 0
    assert not list(folder.rglob("*.partial"))


def test_a_plan_is_kept_while_nothing_changed(tmp_path, built, compiler):
    file, folder, result = built
    again = compiler.compile(file, "8.9", tmp_path, folder)
    assert again.reused and again.entry == result.entry
    assert (tmp_path / again.entry["path"]).read_bytes() == (folder / again.entry["path"]).read_bytes()
    assert (tmp_path / again.entry["summary"]).is_file()


def test_what_changed_is_compiled_again(tmp_path, built, compiler):
    file, folder, _ = built
    other = dataclasses.replace(file, sha256="0" * 64)
    assert not compiler.compile(other, "8.9", tmp_path / "a", folder).reused
    assert not compiler.compile(file, "8.0", tmp_path / "b", folder).reused


def test_tensorrts_timings_are_read_and_written_beside_the_bundles(tmp_path, built, monkeypatch):
    """TensorRT-RTX stands in for TensorRT: its timing cache takes the calls and does nothing."""
    file = built[0]
    rtx = load_api("tensorrt-rtx")
    monkeypatch.setattr("engines.trt.build.aim", lambda api, config, capability: aim(rtx, config, capability))
    api = dataclasses.replace(rtx, backend="tensorrt")
    seen: list[bytes] = []
    monkeypatch.setattr(
        "engines.trt.plans.compile_graph",
        lambda api, job, progress: seen.append(job.timings) or compile_graph(api, job, progress),
    )
    compiler = Compiler(api, LIMITS, WORKSPACE, tmp_path / "timings" / "11.cache")
    for name in ("first", "second"):
        compiler.compile(file, "8.9", tmp_path / name, tmp_path / "nowhere")
    assert seen[0] == b"" and seen[1] == (tmp_path / "timings" / "11.cache").read_bytes() != b""


def test_a_damaged_plan_is_not_kept(tmp_path, built, compiler):
    file, folder, result = built
    damaged = tmp_path / "damaged"
    (damaged / "plans/sm89").mkdir(parents=True)
    (damaged / "manifest.json").write_bytes((folder / "manifest.json").read_bytes())
    (damaged / result.entry["summary"]).write_bytes((folder / result.entry["summary"]).read_bytes())
    (damaged / result.entry["path"]).write_bytes((folder / result.entry["path"]).read_bytes()[:-1])
    assert not compiler.compile(file, "8.9", tmp_path / "new", damaged).reused


def test_the_key_holds_everything_a_plan_is_made_of(built):
    file, _, result = built
    api, profiles = load_api("tensorrt-rtx"), PROFILES["confidence"]
    key = lambda a=api, f=file, c="8.9", p=profiles, w=WORKSPACE: plan_key(a, f, c, p, w)
    others = [
        key(a=dataclasses.replace(api, version="1.8.0")),
        key(a=dataclasses.replace(api, backend="tensorrt")),
        key(f=dataclasses.replace(file, sha256="0" * 64)),
        key(f=dataclasses.replace(file, data_sha256="0" * 64)),
        key(c="8.0"),
        key(p=(dataclasses.replace(profiles[0], sizes={"R": (1, 2, 8)}),)),
        key(w=WORKSPACE * 2),
    ]
    assert key() == result.entry["key"] and len({key(), *others}) == len(others) + 1


def bundle(folder: Path, entry: dict, **changes):
    """What check_plan looks at of a Bundle."""
    spec = EngineSpec("onnx/confidence/model.onnx", "", (), (), plans={"8.9": entry})
    made = {"backend": "tensorrt-rtx", "version": VERSION, **changes}
    return SimpleNamespace(folder=folder, backend="tensorrt-rtx", tensorrt=made, engines={"confidence": spec})


def refusal(bundle, *, version: str = VERSION, capability: str | None = "8.9") -> str:
    with pytest.raises(BundleError) as error:
        check_plan(bundle, "confidence", backend="tensorrt-rtx", version=version, capability=capability)
    assert "\n" not in str(error.value) and "; run python -m export --backend" in str(error.value)
    return str(error.value)


def test_a_plan_that_fits_is_found(built):
    _, folder, result = built
    file = check_plan(
        bundle(folder, result.entry), "confidence", backend="tensorrt-rtx", version=VERSION, capability="8.9"
    )
    assert file == folder / "plans/sm89/confidence.plan"


def test_another_machine_is_refused_in_one_sentence(built):
    _, folder, result = built
    b = bundle(folder, result.entry)
    other = refusal(b, capability="12.0")
    assert "for compute capability 8.9, this GPU has 12.0; run python -m export" in other
    assert other.endswith("--backend tensorrt-rtx --compute-capability 12.0.")
    assert "compiled by tensorrt-rtx 1.7.1.116, this machine has 1.8.0" in refusal(b, version="1.8.0")
    assert "need an NVIDIA GPU, and there is none here; run python -m export --backend onnxruntime." in refusal(
        b, capability=None
    )
    assert "its plans are tensorrt's, this process has tensorrt-rtx" in refusal(
        bundle(folder, result.entry, backend="tensorrt")
    )


def test_a_corrupt_plan_is_refused_in_one_sentence(tmp_path, built):
    _, folder, result = built
    file = tmp_path / result.entry["path"]
    assert "confidence.plan is missing although the manifest names it" in refusal(bundle(tmp_path, result.entry))
    file.parent.mkdir(parents=True)
    whole = (folder / result.entry["path"]).read_bytes()
    for data in (whole[:-1], whole[:-1] + b"x", b""):
        file.write_bytes(data)
        assert "is not the plan the manifest describes (sha256 differs)" in refusal(bundle(tmp_path, result.entry))


def test_nothing_is_half_written(tmp_path, monkeypatch):
    file = tmp_path / "x.plan"
    file.write_bytes(b"old")

    def full(self, data):
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError):
        write_whole(file, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["x.plan"] and file.read_bytes() == b"old"


def test_paths_are_one_a_gpu():
    assert plan_path("target", "12.0") == Path("plans/sm120/target.plan")
