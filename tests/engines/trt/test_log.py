"""What a build log says about a plan."""

from __future__ import annotations

from engines.trt.log import BuildLog, kernels, unfused

IO = "Inputs: [ { Name: a, Dimensions: [-1,64] }], Outputs: [], "
MESSAGE = [
    "Layers:",
    f"Name: MatMul_1/MatMul_myl1_2, LayerType: gemm, {IO}TacticName: sm80_x, StreamId: 0, "
    "Metadata: [ONNX Layer: MatMul_1/MatMul]",
    f"Name: _gemm_mha_v2_myl1_7, LayerType: kgen, {IO}TacticName: _gemm_mha_v2_0xf5, StreamId: 0, "
    "Metadata: [ONNX Layer: A/Attention][ONNX Layer: Mul_3/Mul]",
    f"Name: __myl_Soft_9, LayerType: kgen, {IO}TacticName: , StreamId: 0, Metadata: [ONNX Layer: B/Attention]",
    "",
    "I/O Tensors:",
    " Name: token_ids, IOMode: Input, DataType: Int64, LayerType: none, Metadata: ",
]
LAYERS = "\n".join(MESSAGE)


def test_kernels_are_read():
    first, mha, other = kernels(LAYERS)
    assert (first.name, first.kind, first.tactic, first.nodes) == (
        "MatMul_1/MatMul_myl1_2",
        "gemm",
        "sm80_x",
        ("MatMul_1/MatMul",),
    )
    assert (
        mha.fused_attention
        and mha.nodes == ("A/Attention", "Mul_3/Mul")
        and not other.fused_attention
        and other.tactic == ""
    )


def test_an_attention_is_fused_in_every_profile_or_not():
    plan, names = kernels(LAYERS), ("A/Attention", "B/Attention")
    assert unfused(plan, names, 1) == ("B/Attention",)
    assert unfused(plan, names, 2) == names and unfused(plan * 2, names, 2) == ("B/Attention",)


def test_messages_are_sorted():
    log = BuildLog()
    log.add("VERBOSE", LAYERS)
    log.add("INFO", "Total Activation Memory: 8730624 bytes")
    log.add("INFO", "Total Weights Memory: 172672 bytes")
    log.add("WARNING", "careful")
    log.add("VERBOSE", "anything else")
    assert (
        len(log.kernels) == 3
        and log.memory == {"activation": 8730624, "weights": 172672}
        and log.warnings == ["careful"]
    )
    assert log.reason() == "the builder gave no reason" and not log.no_attention_kernel()


def test_the_reason_is_the_last_error_in_one_line():
    log = BuildLog()
    log.add("ERROR", "first")
    log.add(
        "INTERNAL_ERROR",
        "IBuilder::buildSerializedNetwork: Error Code 1:\n Attention operation was "
        "not supported by a dedicated kernel. ",
    )
    assert (
        log.reason() == "Error Code 1: Attention operation was not supported by a dedicated kernel"
        and log.no_attention_kernel()
    )
