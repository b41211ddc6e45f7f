"""Compiling the CPU kernels: what is said where that cannot be done, and what an export makes of it."""

from __future__ import annotations

import hashlib
import io
import json
import os
from dataclasses import replace

import pytest
from rich.console import Console

import engines
from engines import BundleError
from engines.sps import check, hardware
from export import kernels
from export.__main__ import export
from tests.kernels import kernels as compiled
from tests.tiny import make_draft, make_target


@pytest.fixture()
def pair(tmp_path):
    target = make_target(tmp_path / "target", head_dim=32)
    return target, make_draft(tmp_path / "draft", target)


def run(pair, out, **options) -> str:
    if options.get("kernels") == "native" and "CXX" not in os.environ:
        compiled()
    text = io.StringIO()
    export(*pair, out, dtype="int8", max_context=64, parity=False, console=Console(file=text, width=400), **options)
    return text.getvalue()


def test_a_compiler_that_is_not_there_is_named():
    with pytest.raises(kernels.KernelsError, match=r"there is no compiler 'no-such'; the CPU kernels need a C\+\+ compiler"):
        kernels.built("no-such")


def test_a_compiler_that_fails_is_quoted(tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'x.cc:1: error: no such thing' >&2\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(kernels.KernelsError, match=r"broken cannot compile the CPU kernels \(x.cc:1: error: no such thing\)"):
        kernels.built(str(broken))


def test_another_machine_is_named(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(kernels.KernelsError, match="this is Linux aarch64; the CPU kernels need"):
        kernels.built("another")


def test_without_a_compiler_a_bundle_takes_onnxruntimes_operators(tmp_path, pair, monkeypatch):
    monkeypatch.setenv("CXX", "no-such")
    said = run(pair, tmp_path / "bundle")
    assert "kernels: there is no compiler 'no-such'" in said and "ONNX Runtime's own operators" in said
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert "kernels" not in manifest and not (tmp_path / "bundle" / "kernels.so").exists()
    opened = engines.load(tmp_path / "bundle", threads=1)
    assert opened.bundle.library is None and opened.pass_worth == 7 << 10
    with pytest.raises(ValueError, match="there is no compiler 'no-such'"):
        run(pair, tmp_path / "other", kernels="native")
    assert not (tmp_path / "other").exists()


def test_native_kernels_are_of_two_dtypes(pair, tmp_path):
    message = "kernels is 'native'; they are of the backend onnxruntime and dtype int8 or fp32, not onnxruntime int8-block64"
    with pytest.raises(ValueError, match=message):
        export(*pair, tmp_path / "bundle", dtype="int8-block64", kernels="native", console=Console(file=io.StringIO()))


@pytest.mark.parametrize("kernels", ["native", "auto"])
def test_fp32_takes_the_kernels_attention_when_asked(pair, tmp_path, kernels):
    compiled()
    export(*pair, tmp_path / "bundle", dtype="fp32", max_context=64, kernels=kernels, console=Console(file=io.StringIO()))
    bundle = engines.load(tmp_path / "bundle", threads=1).bundle
    assert bool(bundle.library) == (kernels == "native") and bundle.parity


def test_a_bundle_carries_its_kernels(tmp_path, pair):
    run(pair, tmp_path / "bundle", kernels="native")
    opened = engines.load(tmp_path / "bundle", threads=1)
    bundle = opened.bundle
    assert bundle.library == tmp_path / "bundle" / "kernels.so" and set(bundle.hashes) == {*bundle.engines, "kernels"}
    assert opened.pass_worth > 7 << 10
    with pytest.raises(BundleError, match="device is 'cuda'; its kernels run on the CPU only, export with --dtype fp32"):
        engines.load(tmp_path / "bundle", device="cuda")


def test_another_library_is_refused_before_it_is_loaded(tmp_path, pair):
    run(pair, tmp_path / "bundle", kernels="native")
    (tmp_path / "bundle" / "kernels.so").write_bytes(b"not a library")
    with pytest.raises(BundleError, match=r"kernels.so is not the file the manifest describes \(sha256 differs\)"):
        engines.load(tmp_path / "bundle")
    (tmp_path / "bundle" / "kernels.so").unlink()
    with pytest.raises(BundleError, match="kernels.so is missing although the manifest hashes it"):
        engines.load(tmp_path / "bundle")


def test_a_library_that_does_not_load_is_said_in_one_sentence(tmp_path, pair):
    run(pair, tmp_path / "bundle", kernels="native")
    (tmp_path / "bundle" / "kernels.so").write_bytes(b"not a library")
    file = tmp_path / "bundle" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["kernels"]["sha256"] = hashlib.sha256(b"not a library").hexdigest()
    file.write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="kernels.so: .*; export the bundle again") as refused:
        engines.load(tmp_path / "bundle", threads=1)
    assert "\n" not in str(refused.value)


def test_a_profile_holds_for_its_kernels_alone(tmp_path, pair):
    run(pair, tmp_path / "bundle", kernels="native")
    bundle = engines.load(tmp_path / "bundle", threads=1).bundle
    sps = {"hardware": hardware(), "engines": bundle.hashes | {"kernels": "0"}}
    with pytest.raises(BundleError, match="the SPS table was taken with other kernels; run make profile"):
        check(replace(bundle, sps=sps), threads=1, provider="CPUExecutionProvider")
