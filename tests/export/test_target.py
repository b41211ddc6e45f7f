"""The target graph against TargetModel, and that a token's logits depend on nothing but its own request."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from export.graph import DSPARK
from export.lower_onnxruntime import lower
from export.quantize import quantize
from export.runner import MASKED, Runner
from export.target import build_target
from tests.kernels import runner_of
from tests.tiny import GEMMA4, make_target
from training.target import PackedBatch, TargetModel

C = 48
FORMS = ["fp32", "int8", "int8-block64", "native"]


def graph_of(model: TargetModel, folder, form: str = "fp32"):
    """form "native-fp32": attention alone is engines/kernels' own."""
    native = form.startswith("native")
    graph = build_target(model, 256, native=native)
    if not form.endswith("fp32"):
        quantize(graph, blocks=form in ("int8-block64", "native"))
    lower(graph, native=native)
    graph.save(folder)
    return graph


def run(runner: Runner, batch: PackedBatch, logit_rows: np.ndarray | None = None) -> dict[str, np.ndarray]:
    names = ("token_ids", "pad_index", "pack_index", "position_ids", "write_index")
    feeds = {name: getattr(batch, name).numpy() for name in names}
    mask = np.where(batch.mask.numpy(), np.float32(0), MASKED)
    rows = np.arange(batch.token_ids.numel()) if logit_rows is None else logit_rows
    return runner(**feeds, mask=mask, logit_rows=rows)


@pytest.mark.parametrize(
    "family, options, layer_ids",
    [
        ("llama", {}, (0, 2)),
        ("llama", {"tied": True, "bias": True}, (-1, 1)),
        ("llama", {"kv_heads": 4}, (2,)),
        ("llama", {"kv_heads": 1}, (2,)),
        ("qwen3", {}, (-1, 0, 1, 2)),
        ("qwen3", {"tied": True, "bias": True}, (1,)),
        ("gemma4-12b", {}, (-1, 0, 1, 2)),
        ("gemma4-12b", {"kv_heads": 4, "layers": 6}, (4,)),
        ("gemma4-e", {}, (-1, 0, 1, 2)),
        ("gemma4-e", {"kv_heads": 1, "layers": 6}, (4,)),
    ],
)
def test_two_ragged_steps_equal_pytorch(tmp_path, family, options, layer_ids):
    model = TargetModel.from_pretrained(make_target(tmp_path / "target", family=family, **options), layer_ids)
    runner = Runner(tmp_path / "graph", graph_of(model, tmp_path / "graph"), 3, C)
    caches, done = model.new_caches(3, C), [0, 0, 0]
    rng = np.random.default_rng(0)
    for counts in ((9, 4, 13), (2, 11, 1)):  # past the sliding window of tests/tiny.py
        batch = PackedBatch.build([rng.integers(0, 64, n).tolist() for n in counts], done, C)
        want = model(batch, torch.arange(batch.token_ids.numel()), caches)
        got = run(runner, batch)
        atol = 5e-5 if family in GEMMA4 else 2e-5  # scores are not divided: they round more coarsely
        np.testing.assert_allclose(got["logits"], want.logits.numpy(), atol=atol)
        np.testing.assert_allclose(got["features"], want.features.numpy(), atol=atol)
        done = [a + b for a, b in zip(done, counts)]


@pytest.mark.parametrize("head_dim", [32, 64, 96, 160])
@pytest.mark.parametrize(
    "family, options", [("llama", {}), ("llama", {"kv_heads": 4}), ("llama", {"kv_heads": 1, "bias": True}), ("qwen3", {}), ("qwen3", {"bias": True})]
)
def test_the_kernels_attention_equals_pytorch(tmp_path, family, options, head_dim):
    """Ragged steps, one of more than sixteen tokens; groups of 1, 2 and 4 heads; heads of one to five pairs of vectors."""
    model = TargetModel.from_pretrained(make_target(tmp_path / "target", family=family, head_dim=head_dim, **options), (0, 2))
    graph = graph_of(model, tmp_path / "graph", "native-fp32")
    assert sum(node.op_type == "CachedAttention" for node in graph.nodes) == model.config.num_hidden_layers
    runner, caches, done = runner_of(tmp_path / "graph", graph, 3, C), model.new_caches(3, C), [0, 0, 0]
    rng = np.random.default_rng(0)
    for counts in ((9, 4, 13), (2, 11, 1), (1, 1, 1)):
        batch = PackedBatch.build([rng.integers(0, 64, n).tolist() for n in counts], done, C)
        want = model(batch, torch.arange(batch.token_ids.numel()), caches)
        got = run(runner, batch)
        np.testing.assert_allclose(got["logits"], want.logits.numpy(), atol=3e-5)
        np.testing.assert_allclose(got["features"], want.features.numpy(), atol=3e-5)
        done = [a + b for a, b in zip(done, counts)]
    for (name, cache), own in zip(runner.caches.items(), (c for layer in caches for c in layer)):
        for r, length in enumerate(done):
            np.testing.assert_allclose(cache.numpy()[r, :, :length], own.numpy()[r, :, :length], atol=3e-5, err_msg=name)


def one_pass(folder: Path) -> np.ndarray:
    """The logits of the target in folder/target, attention by the kernels."""
    model = TargetModel.from_pretrained(folder / "target", (1,))
    runner = runner_of(folder / "graph", graph_of(model, folder / "graph", "native-fp32"), 2, C)
    rng = np.random.default_rng(0)
    return run(runner, PackedBatch.build([rng.integers(0, 64, n).tolist() for n in (21, 5)], [0, 0], C))["logits"]


@pytest.mark.parametrize("head_dim", [32, 96])
def test_the_kernels_attention_is_the_same_with_the_narrower_instruction_set(tmp_path, head_dim):
    """On a CPU without AVX-512 VNNI the two are one."""
    make_target(tmp_path / "target", family="qwen3", head_dim=head_dim)
    wide = one_pass(tmp_path)
    script = "import sys, numpy as np; from pathlib import Path; from tests.export.test_target import one_pass; f = Path(sys.argv[1])"
    command = [sys.executable, "-c", f"{script}; np.save(f / 'narrow.npy', one_pass(f))", str(tmp_path)]
    subprocess.run(command, env=os.environ | {"DSPARK_KERNELS_AVX2": "1"}, cwd=Path(__file__).parents[2], check=True)
    np.testing.assert_allclose(np.load(tmp_path / "narrow.npy"), wide, atol=2e-5)


@pytest.mark.parametrize("options", [{"family": "gemma4-12b"}, {"head_dim": 16}], ids=["windows", "short heads"])
def test_what_the_kernels_attention_does_not_do_is_built_of_standard_operators(tmp_path, options):
    model = TargetModel.from_pretrained(make_target(tmp_path / "target", **options), (0,))
    ops = {node.op_type for node in build_target(model, 256, native=True).nodes}
    assert "CachedAttention" not in ops and "Attention" in ops


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(write_index=np.array([C - 2, 0])), f"token 2 would lie at cache position {C}; it must lie in 0..{C - 1}"),
        (dict(pack_index=np.array([0, 1, 2, 3, 5])), "pack_index holds 5 for token 4, which is not its slot in pad_index"),
        (dict(position_ids=np.full((2, 3), 5000)), "position_ids holds 5000; it must lie in 0..319"),
    ],
)
def test_the_kernels_attention_refuses_what_lies_outside(tmp_path, change, message):
    model = TargetModel.from_pretrained(make_target(tmp_path / "target", head_dim=32), (1,))
    runner = runner_of(tmp_path / "graph", graph_of(model, tmp_path / "graph", "native"), 2, C)
    batch = PackedBatch.build([[1, 2, 3], [4, 5]], [0, 0], C)
    names = ("token_ids", "pad_index", "pack_index", "position_ids", "write_index")
    feeds = {name: getattr(batch, name).numpy() for name in names} | change
    mask = np.where(batch.mask.numpy(), np.float32(0), MASKED)
    with pytest.raises(Exception, match=re.escape(message)):
        runner(**feeds, mask=mask, logit_rows=np.arange(5))


def test_logit_rows_select_packed_rows(tmp_path):
    model = TargetModel.from_pretrained(make_target(tmp_path / "target"), (1,))
    graph = graph_of(model, tmp_path / "graph")
    batch = PackedBatch.build([[1, 2, 3], [4, 5]], [0, 0], C)
    everything = run(runner_of(tmp_path / "graph", graph, 2, C), batch)["logits"]
    names = ("token_ids", "pad_index", "pack_index", "position_ids", "write_index")
    feeds = {name: getattr(batch, name).numpy() for name in names}
    mask = np.where(batch.mask.numpy(), np.float32(0), MASKED)
    some = runner_of(tmp_path / "graph", graph, 2, C)(**feeds, mask=mask, logit_rows=np.array([4, 2]))["logits"]
    np.testing.assert_array_equal(some, everything[[4, 2]])


@pytest.mark.parametrize("form", FORMS)
def test_a_pass_may_want_no_logits(tmp_path, form):
    """A chunk of a prompt that is not its last: M = 0; the features and the caches are as ever."""
    model = TargetModel.from_pretrained(make_target(tmp_path / "target", vocab=256), (1,))
    graph = graph_of(model, tmp_path / "graph", form)
    batch = PackedBatch.build([[1, 2, 3], [4, 5]], [0, 0], C)
    runner, other = (runner_of(tmp_path / "graph", graph, 2, C) for _ in range(2))
    want = run(other, batch)
    got = run(runner, batch, logit_rows=np.zeros(0, np.int64))
    assert got["logits"].shape == (0, 256)
    np.testing.assert_array_equal(got["features"], want["features"])
    for name, cache in runner.caches.items():
        np.testing.assert_array_equal(cache.numpy(), other.caches[name].numpy())


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_pass_may_fill_the_context(tmp_path, kv_heads):
    """As many slots as the bundle's max_context and the room past it: ONNX Runtime's RotaryEmbedding checks its tables."""
    model = TargetModel.from_pretrained(make_target(tmp_path / "target", kv_heads=kv_heads), (1,))
    tokens = np.random.default_rng(0).integers(0, 64, 256).tolist()
    batch = PackedBatch.build([tokens], [0], 256)
    got = run(Runner(tmp_path / "graph", graph_of(model, tmp_path / "graph"), 1, 256), batch)
    want = model(batch, torch.arange(256), model.new_caches(1, 256))
    np.testing.assert_allclose(got["logits"], want.logits.numpy(), atol=2e-5)


@pytest.mark.parametrize("kv_heads, qk_norm", [(2, False), (4, False), (2, True)])
def test_grouped_and_separate_slots_agree(tmp_path, kv_heads, qk_norm):
    """ONNX Runtime's form turns q, k and v together; TensorRT's (and Qwen3's) gathers v apart."""
    family = "qwen3" if qk_norm else "llama"
    model = TargetModel.from_pretrained(make_target(tmp_path / "target", family=family, kv_heads=kv_heads), (1,))
    batch, results = PackedBatch.build([[1, 2, 3, 9, 7], [4, 5]], [0, 0], C), []
    graphs = build_target(model, 256), build_target(model, 256, static_cache=C)
    for folder, graph in zip(("grouped", "separate"), graphs):
        graph.save(tmp_path / folder)
        runner = Runner(tmp_path / folder, graph, 2, C)
        results.append((run(runner, batch), {name: cache.numpy().copy() for name, cache in runner.caches.items()}))
    gathers = [sum(node.op_type == "Gather" for node in graph.nodes) for graph in graphs]
    layers = model.config.num_hidden_layers
    assert gathers[1] - gathers[0] == (0 if qk_norm else 2 * layers)  # v's own, and the one that packs attention's result
    (a, caches), (b, others) = results
    np.testing.assert_allclose(a["logits"], b["logits"], atol=1e-5)
    for name in caches:
        np.testing.assert_allclose(caches[name], others[name], atol=1e-5)
    first = "past_key_values.0.value"  # no layer before it: turning by nothing leaves every bit
    np.testing.assert_array_equal(caches[first], others[first])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "family, kv_heads", [("llama", 1), ("llama", 2), ("llama", 4), ("gemma4-12b", 2), ("gemma4-e", 1), ("gemma4-e", 4)]
)
def test_logits_do_not_depend_on_the_pass(tmp_path, form, family, kv_heads):
    """Bit for bit the same: in a batch, alone, token by token, in blocks of 7, in a larger cache."""
    head_dim = {"head_dim": 32} if form == "native" else {}  # else it would not fit the kernels' attention
    folder = make_target(tmp_path / "target", family=family, vocab=256, kv_heads=kv_heads, **head_dim)
    model = TargetModel.from_pretrained(folder, (1,))
    graph = graph_of(model, tmp_path / "graph", form)
    assert graph.calls(DSPARK) == (form == "native")
    rng = np.random.default_rng(1)
    sequences = [rng.integers(0, 256, n).tolist() for n in (20, 13, 31)]

    def chunks(sequence: list[int], size: int, cache: int) -> np.ndarray:
        runner = runner_of(tmp_path / "graph", graph, 1, cache)
        parts = [PackedBatch.build([sequence[i : i + size]], [i], cache) for i in range(0, len(sequence), size)]
        return np.concatenate([run(runner, part)["logits"] for part in parts])

    batched = run(runner_of(tmp_path / "graph", graph, 3, 64), PackedBatch.build(sequences, [0, 0, 0], 64))["logits"]
    for sequence, rows in zip(sequences, np.split(batched, np.cumsum([len(s) for s in sequences])[:-1])):
        for size, cache in ((31, 64), (1, 64), (7, 64), (7, 192), (7, 256)):
            np.testing.assert_array_equal(chunks(sequence, size, cache), rows)


@pytest.mark.parametrize("family, caches", [("llama", 6), ("gemma4-12b", 6), ("gemma4-e", 4)])
def test_static_cache_form_slices_to_the_mask(tmp_path, family, caches):
    """TensorRT's form: caches of a fixed length, C from the mask; the same logits. A layer that shares has no caches."""
    model = TargetModel.from_pretrained(make_target(tmp_path / "target", family=family), (0,))
    graph_of(model, tmp_path / "dynamic")
    static = build_target(model, 256, static_cache=128)
    static.save(tmp_path / "static")
    assert [s.shape[2] for s in static.inputs if s.name.startswith("past_key_values.")] == [128] * caches
    batch = PackedBatch.build([[1, 2, 3, 4], [9, 8]], [0, 0], C)
    a = run(Runner(tmp_path / "dynamic", build_target(model, 256), 2, C), batch)
    b = run(Runner(tmp_path / "static", static, 2, 128), batch)
    np.testing.assert_allclose(a["logits"], b["logits"], atol=1e-5)


def test_caches_are_updated_in_place(tmp_path, capfd):
    model = TargetModel.from_pretrained(make_target(tmp_path / "target"), (0,))
    runner = Runner(tmp_path / "graph", graph_of(model, tmp_path / "graph"), 1, C)
    run(runner, PackedBatch.build([[1, 2, 3]], [0], C))
    key = runner.caches["past_key_values.0.key"].numpy()
    assert np.abs(key[:, :, :3]).min() > 0 and not key[:, :, 3:].any()
    assert "in-place optimization not activated" not in capfd.readouterr().err
