from dataclasses import replace

import numpy as np
import pytest

from engines.base import additive_mask
from engines.bundle import Bundle
from engines.onnxruntime import OnnxRuntimeEngines, physical_cores
from engines.pack import pack_target
from engines.session import LASTING_ROWS, OFTEN, Binding
from tests.engines.test_engines import decode_round, feed, random_ids


def test_caches_are_updated_in_place(bundle, capfd):
    opened = OnnxRuntimeEngines(Bundle.load(bundle), threads=1, log_severity=2)
    for temperature in (0.0, 1.0):
        decode_round(opened, temperature)
    opened.ensure_capacity(4, 600)
    feed(opened, [[1, 2]], [3], first_row=2)
    assert "in-place" not in capfd.readouterr().err
    graph = opened._graphs["target"]  # the same graph without the binding does warn: the assertion above can fail
    batch, _, _ = pack_target([[1]], np.array([0]), np.array([1]), opened.target_capacity, opened.bundle.max_context)
    feeds = {n: batch.__dict__[n] for n, _, _ in graph.inputs} | {"mask": additive_mask(batch.mask, "float32")}
    caches = {n: opened.target_caches.view(i, 0, 1) for i, n in enumerate(graph.cache_inputs)}
    graph.session.run(None, feeds | caches)
    assert "in-place" in capfd.readouterr().err


def test_masks_take_the_dtype_of_the_graph():
    mask = np.array([True, False])
    assert additive_mask(mask, "bool") is mask
    for dtype in ("float32", "float16"):
        got = additive_mask(mask, dtype)
        assert got.dtype == dtype and got[0] == 0 and np.isfinite(got).all() and got[1] < -1e4
    bits = additive_mask(mask, "bfloat16").astype(np.uint32) << 16
    np.testing.assert_allclose(bits.view(np.float32), [0, -1e30], rtol=0.01)


def test_at_least_one_core():
    assert physical_cores() >= 1


def test_sizes_that_come_again_are_bound_once(loaded, monkeypatch):
    ids = random_ids(5)
    first, _ = feed(loaded, [ids], [0])
    for _ in range(OFTEN):
        feed(loaded, [ids], [0])
    bound, bind = [], Binding._bind
    monkeypatch.setattr(Binding, "_bind", lambda self, call, name, array: bound.append(name) or bind(self, call, name, array))
    again, _ = feed(loaded, [ids[::-1]], [0])
    assert bound == ["features"] and np.abs(first - again).max() > 0  # other tokens, wherever they lay
    feed(loaded, [ids[:4]], [0])  # the assertion above can fail
    assert len(bound) > 2
    np.testing.assert_array_equal(feed(loaded, [ids], [0])[0], first)


def test_features_of_few_rows_are_the_callers_to_keep(loaded):
    def run(tokens):
        loaded.ensure_capacity(1, len(tokens))
        at = np.zeros(1, np.int64), np.array([1]), loaded.target_capacity, loaded.bundle.max_context
        return loaded.target(pack_target([tokens], *at)[0])

    for n in (1, 5, LASTING_ROWS):
        first = run(random_ids(n))
        kept = first.features.copy()
        run(random_ids(n, seed=1)), run(random_ids(LASTING_ROWS + 1, seed=2))
        assert first.lasting and len(first.features) == n
        np.testing.assert_array_equal(first.features, kept)
    many = run(random_ids(LASTING_ROWS + 1))
    kept = many.features.copy()
    run(random_ids(LASTING_ROWS + 1, seed=1))
    assert not many.lasting and np.abs(many.features - kept).max() > 0


def test_passes_of_changing_sizes_do_not_see_each_others_inputs(loaded):
    """Small inputs are copied to places that stay bound, large ones bound where they lie: whatever came before, a pass
    reads its own."""
    texts = [random_ids(n, seed=n) for n in (1, 6, 1, 3, 6, 1)]
    want = []
    for text in texts:
        opened = OnnxRuntimeEngines(loaded.bundle, threads=1)
        want.append(feed(opened, [text], [0]))
        opened.close()
    own = OnnxRuntimeEngines(loaded.bundle, threads=1)
    for turn in range(2 * OFTEN + 2):  # until each size has a binding of its own, and longer
        for text, (logits, features) in zip(texts, want):
            got = feed(own, [text], [0])
            np.testing.assert_array_equal(got[0], logits)
            np.testing.assert_array_equal(got[1], features)
        if turn == OFTEN + 1:  # outputs' buffers and caches move
            feed(own, [random_ids(30)] * 3, [0, 0, 0])
            own.ensure_capacity(5, 700)
    own.close()


def test_a_constant_is_bound_where_it_lies_and_another_is_seen(loaded):
    """Read-only arrays with memory of their own are not copied: a new one of the same shape must not be taken for the old."""
    batch, _, _ = pack_target([[1, 2]], np.array([0]), np.array([2]), loaded.target_capacity, loaded.bundle.max_context)
    fixed = lambda *ids: (array := np.array(ids), array.setflags(write=False))[0]
    ids, others = fixed(1, 2), fixed(2, 1)
    want = [loaded.target(replace(batch, token_ids=np.array(x))).logits.copy() for x in ([1, 2], [2, 1])]
    for _ in range(OFTEN + 2):
        for array, logits in zip((ids, others, ids.copy(), others[:]), (*want, *want)):
            np.testing.assert_array_equal(loaded.target(replace(batch, token_ids=array)).logits, logits)


def test_a_crowd_of_sizes_is_served_too(loaded, monkeypatch):
    monkeypatch.setattr("engines.session.MANY", 2)
    own = OnnxRuntimeEngines(loaded.bundle, threads=1)
    bound = own._graphs["target"]._often
    for sizes in ((1, 2, 3), (4, 5), (6,)):  # later ones find room
        for _ in range(OFTEN + 2):
            for n in sizes:
                text = random_ids(n, seed=n)
                np.testing.assert_array_equal(feed(own, [text], [0])[0], feed(loaded, [text], [0])[0])
                assert len(bound) <= 2
    assert any(("l", (6,)) == (dtype, shape) for call in bound for shape, dtype in call[1:])
    own.close()


@pytest.mark.parametrize("kept", [0, 100, 1 << 20])
def test_large_and_small_inputs_give_the_same(loaded, monkeypatch, kept):
    monkeypatch.setattr("engines.session.KEPT_BYTES", kept)
    opened = OnnxRuntimeEngines(loaded.bundle, threads=1)
    for text in ([3, 1, 4], [1, 5, 9], [2]):
        np.testing.assert_array_equal(feed(opened, [text], [0])[0], feed(loaded, [text], [0])[0])
    opened.close()


def test_a_bad_array_is_refused_after_good_ones(loaded):
    feed(loaded, [[1, 2]], [0])
    feed(loaded, [[1, 2]], [0])
    batch, _, _ = pack_target([[1, 2]], np.array([0]), np.array([2]), loaded.target_capacity, loaded.bundle.max_context)
    bad = {"token_ids": batch.token_ids.astype(np.int32), "logit_rows": np.zeros((1, 1), np.int64), "pack_index": np.arange(3)}
    for name, array in bad.items():
        with pytest.raises(ValueError, match=name):
            loaded.target(replace(batch, **{name: array}))
    np.testing.assert_array_equal(loaded.target(batch).logits, feed(loaded, [[1, 2]], [0])[0])
