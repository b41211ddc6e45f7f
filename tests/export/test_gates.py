"""The gates of the parity check. That they catch a damaged graph is in test_precision.py."""

from __future__ import annotations

from export.gates import gate_of


def test_gates_are_of_the_dtype_and_engine():
    assert gate_of("fp32", "target") == gate_of("int8", "verify") == gate_of("fp16", "verify")
    assert gate_of("fp16", "target").cosine > gate_of("bf16", "target").cosine > gate_of("int8", "target").cosine
    assert gate_of("fp16", "target").passes(0.99995, 1.001, 1.0) and not gate_of("fp16", "target").passes(
        0.99995, 1.02, 1.0
    )
    assert not gate_of("fp32", "target").passes(1.0, 1.0, 2e-3) and not gate_of("bf16", "target").passes(0.99, 1.0, 0.0)
