"""The held-out slice: the same for the same sequences, the same figures each time it is evaluated."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.training.answered import SETTINGS, SHAPE
from training.batch_pass import BatchPass
from training.data import TargetPass, is_held_out
from training.held_out import HeldOut
from training.initialisation import new_draft


@pytest.fixture(scope="module")
def held(sequences):
    return [s for s in sequences if is_held_out(s)]


def test_it_is_chosen_again_only_for_other_sequences(held):
    slice_ = HeldOut(SETTINGS)
    assert slice_.choose(held) and len(slice_.keys) == 6 and slice_.batches
    batches = slice_.batches
    assert not slice_.choose(held) and slice_.batches is batches
    assert slice_.choose(held[:3]) and len(slice_.keys) == 3


def test_figures_do_not_change_from_one_evaluation_to_the_next(target, sequences, held):
    draft = new_draft(target, sequences, SHAPE, 1)
    run = BatchPass(target, draft, TargetPass(target, draft.draft_to_target(), 0), SETTINGS)
    slice_ = HeldOut(SETTINGS)
    with ThreadPoolExecutor(2) as workers:
        assert slice_.evaluate(run, workers) == {}
        slice_.choose(held)
        once, twice = slice_.evaluate(run, workers), slice_.evaluate(run, workers)
    assert once == twice and len(once["acceptance"]) == SHAPE.block_size and once["blocks"] > 0
    assert 1 <= once["tau"] <= 1 + SHAPE.block_size and draft.training
