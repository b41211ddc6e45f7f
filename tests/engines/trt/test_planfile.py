"""A plan's file is whole or not there."""

from __future__ import annotations

import hashlib

import pytest

from engines.trt.planfile import PlanFile


def test_what_is_kept_is_counted_and_hashed(tmp_path):
    path = tmp_path / "x.plan"
    with PlanFile(path) as file:
        assert [file.write(b"ab"), file.write(memoryview(b"cde"))] == [2, 3] and not path.exists()
        file.keep()
    assert path.read_bytes() == b"abcde" and file.size == 5 and file.error is None
    assert file.sha256 == hashlib.sha256(b"abcde").hexdigest() and list(tmp_path.iterdir()) == [path]


def test_what_is_not_kept_leaves_the_old_one(tmp_path):
    path = tmp_path / "x.plan"
    path.write_bytes(b"old")
    with PlanFile(path) as file:
        file.write(b"new")
    with pytest.raises(KeyboardInterrupt):
        with PlanFile(path) as file:
            file.keep()
            raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("size", [1, 1 << 20])
def test_a_piece_that_the_disk_refuses_is_an_answer_not_an_exception(tmp_path, size):
    file = PlanFile(tmp_path / "x.plan")
    file._beside.symlink_to("/dev/full")
    with file:
        taken = file.write(bytes(size))
        file.keep()
    assert taken == (0 if size > 1 else 1) and file.error.strerror == "No space left on device"  # one byte waits
    assert list(tmp_path.iterdir()) == []
