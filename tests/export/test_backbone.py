"""The draft backbone's graph, with its caches filled step by step, against DraftModel over the whole context."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from export.backbone import build_backbone
from export.lower_onnxruntime import lower
from export.runner import MASKED
from tests.kernels import runner_of
from tests.tiny import make_draft, make_target
from training.checkpoint import load_draft

C = 40


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma4-12b", "gemma4-e", "llama, native", "qwen3, native"])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"layer_ids": (-1, 1), "layers": 2, "draft_vocab": 40}, {"rank": 0, "confidence": None},
        {"rank": 0, "confidence": None, "layers": 2, "sample_from_anchor": False}, {"plain": True},
    ],
)  # fmt: skip
def test_steps_equal_pytorch(tmp_path, family, options):
    family, native = family.removesuffix(", native"), "native" in family
    target = make_target(tmp_path / "target", family=family, **({"head_dim": 32} if native else {}))
    draft = load_draft(make_draft(tmp_path / "draft", target, **options))
    graph = build_backbone(draft, 256, native=native)
    lower(graph, native=native)
    assert any(node.op_type == "BlockAttention" for node in graph.nodes) == native
    graph.save(tmp_path / "graph")
    R, B = 2, draft.config.block_slots
    runner = runner_of(tmp_path / "graph", graph, R, C)
    rng = np.random.default_rng(0)
    width = graph.inputs[0].shape[1]
    context, done = [torch.zeros(0, width)] * R, np.zeros(R, np.int64)
    for counts in ((7, 3), (1, 5), (0, 2)):
        new = [torch.tensor(rng.standard_normal((k, width), dtype=np.float32)) for k in counts]
        context = [torch.cat(pair) for pair in zip(context, new)]
        anchors = rng.integers(0, 64, R)
        F, Q = sum(counts), max(counts) + B
        pad, first = np.zeros((R, Q), np.int64), 0
        for r, k in enumerate(counts):
            pad[r, : k + B] = np.concatenate([first + np.arange(k), F + r * B + np.arange(B)])
            first += k
        ends = done + counts
        mask = np.where(np.arange(C) < (ends + B)[:, None, None, None], np.float32(0), MASKED)
        got = runner(
            features=torch.cat(new).numpy(), anchor_ids=anchors, pad_index=pad, position_ids=done[:, None] + np.arange(Q),
            block_position_ids=ends[:, None] + np.arange(B), write_index=done, mask=np.broadcast_to(mask, (R, 1, B, C)),
        )
        for r in range(R):
            want = draft.backbone(context[r][None], torch.tensor([[anchors[r]]]), torch.tensor([[len(context[r])]]))[0, 0]
            np.testing.assert_allclose(got["hidden"][r], want.numpy(), atol=1e-4)
            np.testing.assert_allclose(got["base_logits"][r], draft.base_logits(want).numpy(), atol=1e-4)
        done = ends
