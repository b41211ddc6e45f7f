"""The draft's operators of engines/kernels: the Markov head's greedy slots against numpy, a block's attention in any company."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from onnx import helper

from export.backbone import build_backbone
from export.graph import DSPARK, Graph
from export.lower_native import pack_panels
from export.lower_onnxruntime import lower
from export.quantize import quantize, quantize_blocks
from export.runner import MASKED
from tests.export.test_lower_native import expected
from tests.kernels import kernels, runner_of
from tests.tiny import make_draft, make_target
from training.checkpoint import load_draft

RANK, VOCAB = 64, 90


def greedy_runner(folder, weight: np.ndarray, embeddings: np.ndarray, to_target: np.ndarray, G: int):
    g = Graph("markov")
    base = g.input("base_logits", "float32", ("R", G, weight.shape[1]))
    anchors = g.input("anchor_ids", "int64", ("R",))
    q, steps = quantize_blocks(weight)
    places = [g.weight("w1", embeddings), g.weight("w2", pack_panels(q, steps)), g.weight("to_target", to_target)]
    names = ["draft_tokens", "draft_indices", "markov_embeddings"]
    g.nodes.append(helper.make_node("GreedyMarkov", [base, anchors, *places], names, domain=DSPARK))
    g.output("draft_tokens", "int64", ("R", G)), g.output("draft_indices", "int64", ("R", G))
    g.output("markov_embeddings", "float32", ("R", G, embeddings.shape[1]))
    g.save(folder)
    return runner_of(folder, g)


@pytest.mark.parametrize("V_d", [5, 70, 1100])
@pytest.mark.parametrize("trimmed", [False, True])
def test_each_slot_takes_the_largest_of_base_and_bias(tmp_path, V_d, trimmed):
    rng, G, R = np.random.default_rng(V_d), 4, 9
    vocab = max(VOCAB, V_d)
    weight, embeddings = (rng.standard_normal(shape, dtype=np.float32) for shape in ((RANK, V_d), (vocab, RANK)))
    to_target = rng.permutation(vocab)[:V_d] if trimmed else np.zeros(0, np.int64)
    run = greedy_runner(tmp_path, weight, embeddings, to_target, G)
    base, anchors = rng.standard_normal((R, G, V_d), dtype=np.float32), rng.integers(0, vocab, R)
    got, previous = run(base_logits=base, anchor_ids=anchors), anchors
    for k in range(G):
        np.testing.assert_array_equal(got["markov_embeddings"][:, k], embeddings[previous])
        logits = base[:, k] + expected(embeddings[previous].astype(np.float64), weight)
        index = got["draft_indices"][:, k]
        assert (logits[np.arange(R), index] >= logits.max(1) - 1e-4).all()
        previous = got["draft_tokens"][:, k]
        np.testing.assert_array_equal(previous, to_target[index] if trimmed else index)
    alone = [run(base_logits=base[r : r + 1], anchor_ids=anchors[r : r + 1])["draft_tokens"][0] for r in range(R)]
    np.testing.assert_array_equal(got["draft_tokens"], alone)


def test_of_equal_logits_the_first_is_taken_wherever_the_row_is_cut(tmp_path):
    V_d = 1100  # 35 panels, in 16 pieces
    run = greedy_runner(tmp_path, np.zeros((RANK, V_d), np.float32), np.ones((VOCAB, RANK), np.float32), np.arange(V_d) % VOCAB, 1)
    base = np.zeros((3, 1, V_d), np.float32)
    base[1, 0, [1099, 700, 65]], base[2, 0, 1099] = 1, 1
    got = run(base_logits=base, anchor_ids=np.zeros(3, np.int64))
    assert got["draft_indices"].tolist() == [[0], [65], [1099]] and got["draft_tokens"].tolist() == [[0], [65], [1099 % VOCAB]]
    none = run(base_logits=base[:0], anchor_ids=np.zeros(0, np.int64))
    assert none["draft_tokens"].shape == (0, 1) and none["markov_embeddings"].shape == (0, 1, RANK)
    with pytest.raises(Exception, match=r"GreedyMarkov: the token before slot 0 is 90; it must lie in 0\.\.89\."):
        run(base_logits=base[:1], anchor_ids=np.array([VOCAB]))


SCRIPT = """
import sys, numpy as np, onnxruntime as ort
from pathlib import Path
from engines.native import register
options = ort.SessionOptions()
register(options, Path(sys.argv[1]))
session = ort.InferenceSession(sys.argv[2], options, providers=["CPUExecutionProvider"])
np.savez(sys.argv[4], *session.run(None, dict(np.load(sys.argv[3]))))
"""


def test_both_instruction_sets_draft_the_same_tokens(tmp_path):
    """On a CPU without AVX-512 VNNI the two are one."""
    rng, V_d = np.random.default_rng(0), 1100
    shapes = (RANK, V_d), (V_d, RANK), (9, 4, V_d)
    weight, embeddings, base = (rng.standard_normal(shape, dtype=np.float32) for shape in shapes)
    greedy_runner(tmp_path, weight, embeddings, np.zeros(0, np.int64), 4)
    np.savez(tmp_path / "feeds.npz", base_logits=base, anchor_ids=rng.integers(0, V_d, 9))
    results = []
    for name, env in (("wide", {}), ("narrow", {"DSPARK_KERNELS_AVX2": "1"})):
        files = (kernels(), tmp_path / "model.onnx", tmp_path / "feeds.npz", tmp_path / f"{name}.npz")
        subprocess.run([sys.executable, "-c", SCRIPT, *map(str, files)], env=os.environ | env, check=True)
        results.append(np.load(files[-1]))
    assert len(results[0].files) == 3
    for name in results[0].files:
        np.testing.assert_array_equal(results[0][name], results[1][name])


def backbone(folder, R: int, C: int):
    target = make_target(folder / "target", head_dim=32)
    draft = load_draft(make_draft(folder / "draft", target, layers=2))
    graph = build_backbone(draft, 256, native=True)
    quantize(graph, blocks=True)
    lower(graph, native=True)
    graph.save(folder / f"graph{R}x{C}")
    return runner_of(folder / f"graph{R}x{C}", graph, R, C), graph.inputs[0].shape[1], draft.config.block_slots


def feeds(features: list[np.ndarray], anchors: list[int], done: list[int], B: int, C: int) -> dict:
    counts = [len(f) for f in features]
    R, F, Q = len(counts), sum(counts), max(counts) + B
    pad, first = np.zeros((R, Q), np.int64), 0
    for r, k in enumerate(counts):
        pad[r, : k + B] = [*range(first, first + k), *range(F + r * B, F + r * B + B)]
        first += k
    ends = np.add(done, counts)
    mask = np.where(np.arange(C) < (ends + B)[:, None, None, None], np.float32(0), MASKED)
    return dict(
        features=np.concatenate(features), anchor_ids=np.array(anchors), pad_index=pad,
        position_ids=np.array(done)[:, None] + np.arange(Q), write_index=np.array(done),
        mask=np.broadcast_to(mask, (R, 1, B, C)),
    )  # fmt: skip


def test_a_block_has_the_same_bits_in_any_company(tmp_path):
    """Alone and beside others, with its context in one piece or two, in a small cache or a large one."""
    rng, C = np.random.default_rng(0), 40
    (small, width, B), (large, _, _), (crowd, _, _) = backbone(tmp_path, 1, C), backbone(tmp_path, 1, 64), backbone(tmp_path, 3, C)
    rows = rng.standard_normal((7, width), dtype=np.float32)
    want = small(**feeds([rows], [5], [0], B, C))
    for run, length in ((small, C), (large, 64)):
        run.reset()
        run(**feeds([rows[:4]], [9], [0], B, length))
        got = run(**feeds([rows[4:]], [5], [4], B, length))
        np.testing.assert_array_equal(got["base_logits"], want["base_logits"])
    others = [rng.standard_normal((k, width), dtype=np.float32) for k in (0, 9)]
    got = crowd(**feeds([others[0], rows, others[1]], [3, 5, 8], [0, 0, 0], B, C))
    np.testing.assert_array_equal(got["base_logits"][1:2], want["base_logits"])
    np.testing.assert_array_equal(got["hidden"][1:2], want["hidden"])


def test_rows_that_are_nowhere_are_refused(tmp_path):
    run, width, B = backbone(tmp_path, 2, 40)
    good = feeds([np.zeros((2, width), np.float32)] * 2, [1, 2], [0, 0], B, 40)
    for r, j, row, message in (
        (1, 2, 0, "BlockAttention: pad_index has no block of request 1."),
        (0, 1, 0, "BlockAttention: token 1 has no slot in pad_index."),
    ):
        pad = good["pad_index"].copy()
        pad[r, j] = row
        with pytest.raises(Exception, match=message):
            run(**good | {"pad_index": pad})
    with pytest.raises(Exception, match=r"BlockAttention: token \d+ would lie at cache position 40; it must lie in 0\.\.39\."):
        run(**good | {"write_index": np.array([0, 40 - 2 - B + 1])})
