"""Feature files: bounded, removed, never believed when they are damaged; and what the cached recipe would write."""

import pytest
import torch

from training.feature_files import FeatureFiles, cached_recipe_bytes


def tensors(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {"features": torch.randn(2, 3, 8, generator=g).bfloat16(), "outside": torch.randn(2, 3, generator=g)}


def same(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def test_what_is_put_is_got_bit_for_bit_and_removed_at_the_end(tmp_path):
    files = FeatureFiles(tmp_path / "f", 10_000)
    assert files.get(1) is None and files.put(1, tensors()) and files.put(-2, tensors(1))
    assert same(files.get(1), tensors()) and same(files.get(-2), tensors(1))
    on_disk = sum(f.stat().st_size for f in (tmp_path / "f").iterdir())
    assert files.used == files.peak == on_disk
    files.forget(lambda key: key < 0)
    assert files.get(-2) is None and same(files.get(1), tensors()) and files.used == on_disk / 2
    files.remove()
    assert not (tmp_path / "f").exists() and files.used == 0 and files.peak == on_disk


def test_the_bound_holds(tmp_path):
    files = FeatureFiles(tmp_path, 700)
    kept = [files.put(key, tensors(key)) for key in range(4)]
    assert kept[0] and not all(kept) and files.used <= 700
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) == files.used
    assert files.get(3) is None


def flip(data: bytes) -> bytes:
    return data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]


@pytest.mark.parametrize("harm", [flip, lambda data: data[:50], lambda data: b"", lambda data: data + b"more"])
def test_a_damaged_file_is_not_there(harm, tmp_path):
    files = FeatureFiles(tmp_path, 10_000)
    files.put(1, tensors())
    files.file(1).write_bytes(harm(files.file(1).read_bytes()))
    assert files.get(1) is None and files.used == 0 and not files.file(1).exists()
    assert files.put(1, tensors()) and same(files.get(1), tensors())


def test_a_file_that_somebody_removed_is_not_there(tmp_path):
    files = FeatureFiles(tmp_path, 10_000)
    files.put(1, tensors())
    files.file(1).unlink()
    assert files.get(1) is None and files.used == 0


def test_what_a_killed_run_left_is_removed_and_not_believed(tmp_path):
    FeatureFiles(tmp_path, 10_000).put(1, tensors())
    (tmp_path / "mine.txt").write_text("not a feature file")
    files = FeatureFiles(tmp_path, 10_000)
    assert files.get(1) is None and [f.name for f in tmp_path.iterdir()] == ["mine.txt"]
    files.put(1, tensors())
    files.remove()
    assert (tmp_path / "mine.txt").exists()


def test_a_folder_that_cannot_be_written_ends_the_writing_not_the_run(tmp_path):
    (tmp_path / "f").write_text("a file where the folder should be")
    files = FeatureFiles(tmp_path / "f", 10_000)
    assert not files.put(1, tensors()) and not files.put(1, tensors()) and files.used == files.limit == 0


def test_the_cached_recipes_size_is_the_references():
    """Qwen3-4B: hidden size 2560, 5 feature layers; 4096 tokens a sample, as the reference's own estimator has it."""
    sample = 4096 * 4 + 4096 + 4096 + 4096 * 5 * 2560 * 2 + 4096 * 2560 * 2 + 56
    assert cached_recipe_bytes([4096], 2560, 5) == sample
    assert cached_recipe_bytes([3, 5], 16, 2) == 8 * (6 + 2 * 16 * 3) + 2 * 56
