import hashlib
import os
import shutil

import pytest

from engines.bundle import Bundle, BundleError
from engines.hashes import HashCache


@pytest.fixture
def cache_file(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    return HashCache().file


def test_remembered_until_size_or_time_change(tmp_path, cache_file):
    file = tmp_path / "x"
    file.write_bytes(b"one")
    hashes = HashCache()
    assert hashes.sha256(file) == hashlib.sha256(b"one").hexdigest()
    hashes.save()
    key = next(iter(HashCache().known))
    again = HashCache()
    again.known[key] = "remembered"
    assert again.sha256(file) == "remembered"
    file.write_bytes(b"three")
    assert again.sha256(file) == hashlib.sha256(b"three").hexdigest()


@pytest.mark.parametrize("content", ["{", "[]", "null"])
def test_a_spoilt_cache_file_is_an_empty_one(cache_file, content):
    cache_file.write_text(content)
    assert HashCache().known == {}


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path, cache_file):
    file = tmp_path / "x"
    file.write_bytes(b"one")
    hashes = HashCache()
    hashes.file = tmp_path / "nowhere" / "hashes.json"
    hashes.sha256(file)
    hashes.save()


def test_a_remembered_hash_does_not_hide_a_change(bundle, tmp_path):
    copy = shutil.copytree(bundle, tmp_path / "copy")
    Bundle.load(copy)
    file = copy / "onnx" / "verify" / "model.onnx"
    stat = file.stat()
    file.write_bytes(file.read_bytes() + b"x")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(BundleError, match="sha256 differs"):
        Bundle.load(copy)
