"""What the train command says of the disk."""

from dataclasses import replace

import pytest

from tests.training.answered import SETTINGS, SHAPE
from training.initialisation import new_draft
from training.train import disk_line, disk_plan
from training.trainer import Trainer


@pytest.fixture
def trainer_with(target, sequences, tmp_path):
    draft = new_draft(target, sequences, SHAPE, 1)
    return lambda **s: Trainer(target, draft, lambda: sequences, tmp_path / "run", replace(SETTINGS, **s))


def test_the_plan_is_what_the_memory_has_no_room_for_within_the_bound(trainer_with, tmp_path):
    assert disk_plan(trainer_with(), 2.0) == ""
    run = trainer_with(feature_disk_gb=0.02, feature_folder=str(tmp_path))
    assert f"in files under {tmp_path}/features-0 up to 0.02 GB" in disk_plan(run, 2.0)
    assert "up to 0.01 GB" in disk_plan(run, 0.01)


def test_a_disk_without_that_room_is_refused(trainer_with):
    run = trainer_with(feature_disk_gb=1e9)
    with pytest.raises(ValueError, match=r"^feature_disk_gb is 1e\+09; 500000000.00 GB would be used, and .* GB free\.$"):
        disk_plan(run, 5e8)


def test_the_line_has_both_sizes_and_their_ratio():
    said = disk_line({"tokens": 4_000_000, "features": 6_000_000, "cached_recipe": 2_000_000_000})
    assert "token ids 4.0 MB, features 6.0 MB" in said and "2,000.0 MB" in said and "(0.50% of it" in said
