"""Bad lines are named and left out; the others are kept."""

import logging

import pytest

from training.jsonl import records


def number(record):
    if not isinstance(record, int):
        raise ValueError("not a number.")
    return record


def test_every_kind_of_bad_line_is_named(tmp_path, caplog):
    file = tmp_path / "f.jsonl"
    file.write_bytes(b'1\n\n"\xff"\n{\n"two"\n' + b"[" * 100_000 + b"\n2")
    with caplog.at_level(logging.WARNING):
        assert list(records(file, number, "no number.")) == [1, 2]
    said = [record.getMessage().removeprefix(f"{file}:") for record in caplog.records]
    assert said[0] == "2 left out: the line is empty."
    assert said[1] == "3 left out: it is not UTF-8 (byte 2 of the line)."
    assert said[2].startswith("4 left out: it is not JSON (") and said[3] == "5 left out: not a number."
    assert said[4] == "6 left out: it is not JSON (nested too deeply)."
    assert said[5].endswith("5 of 7 lines left out.")


def test_a_file_without_a_good_line_is_an_error(tmp_path):
    (tmp_path / "f.jsonl").write_text("x\n")
    with pytest.raises(ValueError, match="f.jsonl holds no number."):
        list(records(tmp_path / "f.jsonl", number, "no number."))
    with pytest.raises(FileNotFoundError):
        list(records(tmp_path / "g.jsonl", number, "no number."))
