import os

import pytest

from triton_repo import ledger
from triton_repo.ledger import INSTANCES, SLOTS, Ledger, life_of

UID = 2**60


def test_both_ends_see_the_same_counts(tmp_path):
    file = tmp_path / "ledger"
    file.write_bytes(b"of an old server")
    maker = Ledger(file, make=True)
    reader = Ledger(file, make=False)
    assert maker.read(UID) == 0 and maker.owns(UID)
    reader.write(UID, 7)
    reader.write(UID + INSTANCES, 9)
    reader.write(UID + 1, 11)
    assert [maker.read(UID + k) for k in (0, INSTANCES, 1, INSTANCES * SLOTS)] == [7, 9, 11, 7]
    reader.close()
    assert file.exists()
    maker.close()
    assert not file.exists()


def test_instances_number_themselves_and_the_last_takes_the_file_along(tmp_path):
    file = tmp_path / "ledger"
    first, second = Ledger(file, make=True), Ledger(file, make=True)
    assert (first.instance, second.instance) == (0, 1)
    first.close()
    third = Ledger(file, make=True)
    assert third.instance == 0 and file.exists()
    third.close()
    second.close()
    assert not file.exists()


def test_instances_know_of_each_other(tmp_path):
    first, second = (Ledger(tmp_path / "ledger", make=True) for _ in range(2))
    first.tell(3, 1)
    second.tell(2, 0)
    assert first.counts() == second.counts() == (5, 1)
    second.drain(True)
    assert first.draining
    uid = UID + first.instance
    assert not second.owns(uid)
    second.stop(uid)
    assert first.stopped(uid) and not first.stopped(uid + INSTANCES)
    first.begin(uid)
    assert not first.stopped(uid)
    first.close()
    assert second.counts() == (2, 0)
    second.close()


def test_another_life_of_the_server_starts_afresh(tmp_path):
    file = tmp_path / "ledger"
    old = Ledger(file, make=True, life=5)
    old.write(UID, 7)
    again = Ledger(file, make=True, life=5)
    assert again.read(UID) == 7 and again.instance == 1
    new = Ledger(file, make=True, life=6)
    assert new.read(UID) == 0 and new.instance == 0 and not new.draining
    new.close()


def test_a_life_is_the_processes_own():
    assert life_of(os.getpid()) > life_of(1) >= 0
    assert life_of(2**30) == 0


def test_no_more_instances_than_a_uid_can_name(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "INSTANCES", 1)
    one = Ledger(tmp_path / "ledger", make=True)
    with pytest.raises(RuntimeError, match="at most 1 instances of dspark"):
        Ledger(tmp_path / "ledger", make=True)
    one.close()


def test_only_the_maker_makes_it(tmp_path):
    with pytest.raises(FileNotFoundError):
        Ledger(tmp_path / "none", make=False)
    (tmp_path / "target").write_bytes(bytes(ledger.SIZE))
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for make in (False, True):
        with pytest.raises(OSError):
            Ledger(tmp_path / "link", make=make)
