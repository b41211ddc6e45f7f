"""Rows and steps packed, the contract of an autoregressive draft, and bundles that say what they are."""

import json
import shutil

import numpy as np
import pytest

from engines.autoregressive import pack_rows, steps_after
from engines.base import BackboneResult, MarkovBatch
from engines.bundle import Bundle, BundleError
from engines.contract import contract
from tests.bundles import tiny_bundle


def rows_batch(depth=1):
    features = [[np.full((2, 3), 1.0), np.full((1, 3), 2.0)], [], [np.full((1, 3), 3.0)]]
    counts, lengths = np.array([3, 0, 1]), np.array([4, 0, 7])
    return pack_rows(features, [[11, 12, 13], [], [31]], counts, lengths, depth, 12, 100, first_row=2)


def test_rows_layout():
    batch = rows_batch()
    assert batch.features[:, 0].tolist() == [1, 1, 2, 3] and batch.next_ids.tolist() == [11, 12, 13, 31]
    assert batch.pad_index.tolist() == [[0, 1, 2], [0, 0, 0], [3, 0, 0]] and batch.pack_index.tolist() == [0, 1, 2, 6]
    assert batch.position_ids.tolist() == [[4, 5, 6], [0, 1, 2], [7, 8, 9]] and batch.write_index.tolist() == [4, 0, 7]
    assert batch.last_index.tolist() == [2, 0, 3] and batch.last_position_ids.tolist() == [[6], [0], [7]]
    assert batch.mask.shape == (3, 1, 1, 12) and batch.mask.sum(-1).ravel().tolist() == [7, 1, 8]
    assert batch.mask_rows is None and batch.first_row == 2


def test_rows_attend_up_to_themselves_where_they_attend_at_all():
    mask = rows_batch(depth=2).mask_rows
    assert mask.shape == (3, 1, 3, 12) and mask.dtype == bool and mask[0, 0, 0, :5].all()
    assert mask.sum(-1)[:, 0].tolist() == [[5, 6, 7], [1, 2, 3], [8, 9, 10]]


def test_steps_follow_the_newest_rows():
    zeros = np.zeros((3, 1, 4), np.float32)
    newest, draws = BackboneResult(zeros, zeros), MarkovBatch.greedy(None, None, np.zeros(3, np.int64), 64, 5)
    steps = steps_after(rows := rows_batch(), newest, draws)
    assert steps.position_ids.tolist() == [7, 1, 8] and steps.mask is rows.mask and steps.first_row == 2
    assert steps.hidden is zeros and steps.uniforms.shape == (0, 5) and steps.noise.shape == (0, 5, 64)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny_bundle(tmp_path_factory.mktemp("eagle3"), kind="eagle3", layers=2, draft_vocab=40)


def test_a_bundle_says_its_kind(bundle):
    draft = Bundle.load(bundle).draft
    assert draft.kind == "eagle3" and draft.autoregressive and draft.block_slots == 0 and not draft.has_confidence


@pytest.mark.parametrize(
    "options, absent",
    [
        (dict(kind="mtp"), {"pack_index", "mask_rows"}),
        (dict(kind="mtp", block_size=1), {"hidden", "mask", "position_ids"}),
    ],
    ids=["one layer", "one token"],
)
def test_what_a_graph_would_not_use_is_absent(tmp_path, options, absent):
    b = Bundle.load(tiny_bundle(tmp_path, **options))
    wanted = contract(b.target, b.draft)
    assert not absent & wanted["backbone" if "pack_index" in absent else "markov"][0].keys()


def changed(bundle, folder, **draft):
    shutil.copytree(bundle, folder)
    raw = json.loads((folder / "manifest.json").read_text())
    raw["draft"].update(draft)
    (folder / "manifest.json").write_text(json.dumps(raw))
    return folder


def test_another_kind_is_refused(bundle, tmp_path):
    with pytest.raises(BundleError, match="draft.kind is 'medusa', it must be one of parallel, eagle3, mtp; "):
        Bundle.load(changed(bundle, tmp_path / "b", kind="medusa"))
    with pytest.raises(BundleError, match="engine backbone lacks the input 'anchor_ids'"):
        Bundle.load(changed(bundle, tmp_path / "c", kind="parallel"))
