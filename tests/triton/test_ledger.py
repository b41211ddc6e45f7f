import pytest

from triton_repo.ledger import SLOTS, Ledger


def test_both_ends_see_the_same_counts(tmp_path):
    file = tmp_path / "ledger"
    file.write_bytes(b"of an old server")
    maker = Ledger(file, make=True)
    reader = Ledger(file, make=False)
    assert maker.read(2**60 + 5) == 0
    reader.write(2**60 + 5, 7)
    reader.write(2**60 + 6, 9)
    assert (maker.read(2**60 + 5), maker.read(2**60 + 6), maker.read(2**60 + 5 + SLOTS)) == (7, 9, 7)
    reader.close()
    assert file.exists()
    maker.close()
    assert not file.exists()


def test_only_the_maker_makes_it(tmp_path):
    with pytest.raises(FileNotFoundError):
        Ledger(tmp_path / "none", make=False)
    (tmp_path / "target").write_bytes(bytes(SLOTS * 8))
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(OSError):
        Ledger(tmp_path / "link", make=False)
