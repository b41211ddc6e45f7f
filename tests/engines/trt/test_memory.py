"""The peak of a stretch of work."""

from __future__ import annotations

import numpy as np
import pytest

from engines.trt.memory import PeakMemory, status_bytes


@pytest.mark.skipif(status_bytes("VmRSS") is None, reason="this system has no /proc/self/status")
def test_the_peak_is_of_what_ran_inside():
    with PeakMemory() as memory:
        np.ones(64 << 20, np.uint8).sum()  # given back before the end
    assert 50 << 20 < memory.peak < 4 << 30


def test_a_missing_field_is_none():
    assert status_bytes("NoSuchField") is None
