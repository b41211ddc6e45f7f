"""When a bundle must be made again."""

import hashlib
import json
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import typer

import engines
from benchmarks.bundle import checkpoint_hash, ensure, ensure_profile, stale, unprofiled
from engines.bundle import FORMAT_VERSION, update_manifest
from engines.profile import profile


@pytest.fixture
def folders(tmp_path):
    """(target, draft, bundle): checkpoints of a few bytes and a manifest that fits them."""
    target, draft, bundle = (tmp_path / name for name in ("target", "draft", "bundle"))
    for folder in (target, draft, bundle):
        folder.mkdir()
    (target / "b.safetensors").write_bytes(b"two")
    (target / "a.safetensors").write_bytes(b"one")
    (draft / "model.safetensors").write_bytes(b"head")
    manifest = {"format_version": FORMAT_VERSION, "dtype": "int8"}
    manifest |= {"target": {"hash": checkpoint_hash(target)}, "draft": {"hash": checkpoint_hash(draft)}}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    return target, draft, bundle


def test_hash_is_over_the_files_in_name_order(folders):
    assert checkpoint_hash(folders[0]) == hashlib.sha256(b"onetwo").hexdigest()


def test_hash_is_the_one_that_export_writes(folders):
    checkpoint = pytest.importorskip("training.checkpoint")
    assert checkpoint.checkpoint_hash(folders[0]) == checkpoint_hash(folders[0])


def test_a_fitting_bundle_is_kept(folders):
    assert stale(*folders, "int8") is None
    assert ensure(*folders, "int8")["format_version"] == FORMAT_VERSION


@pytest.mark.parametrize("name, index", [("target", 0), ("draft", 1)])
def test_another_checkpoint_makes_it_stale(folders, name, index):
    next(folders[index].glob("*.safetensors")).write_bytes(b"other")
    assert stale(*folders, "int8") == f"it was made from another {name}"


def test_other_reasons(folders):
    target, draft, bundle = folders
    assert "int8, not fp32" in stale(target, draft, bundle, "fp32")
    assert stale(target, draft, bundle / "none", "int8") == "there is no bundle yet"
    (bundle / "manifest.json").write_text("{}")
    assert stale(target, draft, bundle, "int8") == "its manifest cannot be read"
    (bundle / "manifest.json").write_text(
        json.dumps({"format_version": 99, "dtype": "int8", "target": {"hash": ""}, "draft": {"hash": ""}})
    )
    assert "format version 99" in stale(target, draft, bundle, "int8")


def test_a_missing_checkpoint_is_one_sentence(folders, capsys):
    target, draft, bundle = folders
    with pytest.raises(typer.Exit):
        ensure(target, draft / "none", bundle, "int8")
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "draft folder" in error


def test_a_bundle_without_a_profile_gets_one_and_says_why(bundle, tmp_path, monkeypatch, capsys):
    own = tmp_path / "own"
    shutil.copytree(bundle, own)
    update_manifest(own, sps=None)
    assert "no SPS table" in unprofiled(own)
    commands, real = [], subprocess.run

    def measured(command, **options):
        if command[1:3] != ["-m", "engines"]:
            return real(command, **options)
        commands.append(command[1:])
        opened = engines.load(own)
        profile(opened, requests=(1,), contexts=(64,), seconds=0.1)
        opened.close()
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", measured)
    ensure_profile(own)
    assert commands == [["-m", "engines", "profile", "--bundle", str(own), "--quick"]]
    said = capsys.readouterr().out
    assert said.startswith("profile: ") and said.count("\n") == 1
    ensure_profile(own)
    assert len(commands) == 1 and unprofiled(own) is None


def test_a_profile_that_fails_is_one_sentence(bundle, tmp_path, monkeypatch, capsys):
    shutil.copytree(bundle, tmp_path / "own")
    update_manifest(tmp_path / "own", sps=None)
    for code, sentence in ((1, "failed; its message is above"), (0, "is refused: ")):
        monkeypatch.setattr(subprocess, "run", lambda command, code=code: SimpleNamespace(returncode=code))
        with pytest.raises(typer.Exit):
            ensure_profile(tmp_path / "own")
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1
