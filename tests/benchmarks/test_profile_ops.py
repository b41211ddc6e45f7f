"""The profile's sums, and that both engines of a bundle can be profiled."""

from __future__ import annotations

import pytest

from benchmarks.profile_ops import aggregate, parse_case


def event(name: str, op: str, microseconds: int) -> dict:
    return {"cat": "Node", "name": f"{name}_kernel_time", "dur": microseconds, "args": {"op_name": op}}


def test_a_pass_is_the_sum_of_its_nodes_medians():
    events = [{"cat": "Session", "name": "model_run", "dur": 999}]
    for add, first, second in ((100, 500, 900), (1, 10, 20), (3, 10, 20), (2, 10, 20)):  # the first pass is a warm-up
        events += [event("a", "Add", add), event("m1", "MatMul", first), event("m2", "MatMul", second)]
    assert aggregate(events, "op", skip=1) == [("MatMul", 2, 30.0), ("Add", 1, 2.0)]
    assert aggregate(events, "node", skip=1) == [("MatMul m2", 1, 20.0), ("MatMul m1", 1, 10.0), ("Add a", 1, 2.0)]


def test_cases():
    assert parse_case("16x4@128") == (16, 4, 128)
    for text in ("0x1@3", "1x0@3", "4@128", "1x1"):
        with pytest.raises(ValueError, match="must be RxQ@C"):
            parse_case(text)
