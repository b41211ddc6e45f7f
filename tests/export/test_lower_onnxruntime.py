"""The ONNX Runtime form: the leaner ops are there, and the values are those of the standard graph."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from export.lower_onnxruntime import lower, pack_blocks
from export.quantize import quantize
from export.runner import MASKED, Runner
from export.target import build_target
from tests.tiny import make_target
from training.target import PackedBatch, TargetModel


def test_lowered_equals_standard(tmp_path):
    model = TargetModel.from_pretrained(make_target(tmp_path / "target", family="qwen3"), (0, 2))
    batch = PackedBatch.build([[1, 2, 3], [4]], [0, 0], 16)
    names = ("token_ids", "pad_index", "pack_index", "position_ids", "write_index")
    feeds = {name: getattr(batch, name).numpy() for name in names}
    results, ops = [], []
    for lowered in (False, True):
        graph = build_target(model, 64)
        if lowered:
            lower(graph)
        graph.save(tmp_path / str(lowered))
        mask = np.where(batch.mask.numpy(), np.float32(0), MASKED)
        results.append(Runner(tmp_path / str(lowered), graph, 2, 16)(**feeds, mask=mask, logit_rows=torch.arange(4).numpy()))
        ops.append(Counter(node.op_type for node in graph.nodes))
    for name in ("logits", "features"):
        np.testing.assert_allclose(results[0][name], results[1][name], atol=1e-5)
    assert ops[1]["QuickGelu"] == 3 and ops[1]["Swish"] == 0
    assert ops[1]["SkipSimplifiedLayerNormalization"] == 5  # two a layer; the first has no sum before it


def test_attention_takes_one_query_row_at_a_time(tmp_path):
    """The kernel for single rows, whatever the pass holds: no factor in the product, and no Attention is left."""
    model = TargetModel.from_pretrained(make_target(tmp_path / "target"), (0,))
    graph = build_target(model, 64)
    lower(graph)
    ops = Counter(node.op_type for node in graph.nodes)
    products = [node for node in graph.nodes if node.op_type == "FusedMatMul"]
    assert ops["Attention"] == 0 and len(products) == ops["Softmax"] == 3
    assert {a.name for node in products for a in node.attribute} == {"transB"}


def test_int8_blocks_become_one_op_each(tmp_path):
    """QKV, o_proj and down_proj of every layer; no scaled weight is left for a float32 product."""
    model = TargetModel.from_pretrained(make_target(tmp_path / "target"), (0,))
    graph = build_target(model, 64)
    quantize(graph)
    scaled = [n for n in graph.nodes if n.op_type == "DequantizeLinear"]
    lower(graph)
    ops = Counter(node.op_type for node in graph.nodes)
    assert ops["MatMulNBits"] == len(scaled) == 9 and ops["DequantizeLinear"] == 0
    assert ops["MatMul"] == 3  # attention's
    assert ops["MatMulIntegerToFloat"] == 4  # gate and up side by side, three layers, and the head


def test_int8_block64_has_one_op_a_product(tmp_path):
    """Blocks throughout: nothing quantises activations beside the product, and all of the checkpoint is used."""
    model = TargetModel.from_pretrained(make_target(tmp_path / "target"), (0,))
    graph = build_target(model, 64)
    quantize(graph, blocks=True)
    lower(graph)
    ops = Counter(node.op_type for node in graph.nodes)
    assert ops["MatMulNBits"] == 13 and not ops["MatMulIntegerToFloat"] and not ops["QuantizeLinear"] and not ops["TopK"]
    assert graph.used_sources() == set(model.state_dict())


@pytest.mark.parametrize("inputs", [128, 96], ids=["whole blocks", "a part of a block"])
def test_packed_blocks_hold_the_weights_by_column(inputs):
    weight = np.random.default_rng(0).integers(-127, 128, (inputs, 5)).astype(np.int8)
    packed = pack_blocks(weight, 2, 64)
    assert packed.shape == (5, 2, 64) and packed.dtype == np.uint8
    flat = packed.reshape(5, -1).astype(np.int16) - 128
    np.testing.assert_array_equal(flat[:, :inputs], weight.T)
    assert not flat[:, inputs:].any()
