"""When a bundle must be made again."""

import hashlib
import json

import pytest
import typer

from benchmarks.bundle import checkpoint_hash, ensure, stale
from engines.bundle import FORMAT_VERSION


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
