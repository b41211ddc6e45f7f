"""Settings of a run that cannot be are refused."""

from dataclasses import replace

import pytest

from tests.training.answered import SETTINGS


@pytest.mark.parametrize("change", [{"steps": 3, "minutes": 2.0}, {"steps": None}, {"anchor_share": 0.0}])
def test_settings_that_cannot_be_are_refused(change):
    with pytest.raises(ValueError):
        replace(SETTINGS, **change)
