"""The ONNX Runtime form: the leaner ops are there, and the values are those of the standard graph."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch

from export.lower_onnxruntime import lower
from export.parity import MASKED, Runner
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
