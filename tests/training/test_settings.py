"""Settings of a run that cannot be are refused."""

from dataclasses import replace

import pytest

from tests.training.answered import SETTINGS


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 3, "minutes": 2.0}, {"steps": None}, {"anchor_share": 0.0}, {"ema": 1.0}, {"patience": -1},
        {"device": "tpu"}, {"sharding": "zero"}, {"optimiser": "sgd"},
        {"optimiser": "muon", "sharding": "fsdp2"},
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(change):
    with pytest.raises(ValueError):
        replace(SETTINGS, **change)
