"""The trainer on a tiny target: it learns, it resumes exactly, it notices data that grew or changed."""

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from tests.tiny import make_target
from training.checkpoint import load_draft
from training.data import is_held_out, make_batches
from training.evaluate import acceptance, generate_plain, speculate
from training.initialisation import HeadShape, default_layer_ids, new_draft
from training.target import TargetModel
from training.trainer import Trainer, TrainSettings, block_acceptance

SETTINGS = TrainSettings(steps=12, lr=3e-3, tokens_per_batch=200, bf16=False, evaluate_steps=6, save_minutes=1e9)
SHAPE = HeadShape(depth=1, block_size=4, rank=8, mask_token_id=3, draft_vocab=0)


@dataclass(frozen=True)
class Answered:
    tokens: np.ndarray
    prompt_length: int


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return TargetModel.from_pretrained(make_target(tmp_path_factory.mktemp("target"), vocab=64, layers=3), (0, 1))


@pytest.fixture(scope="module")
def sequences(target):
    """Greedy answers of the target to random prompts; six of the 48 are held out."""
    g = torch.Generator().manual_seed(5)
    made, wanted = [], {True: 6, False: 42}
    while len(made) < 48:
        prompt = torch.randint(4, 64, (3 + len(made) % 5,), generator=g).tolist()
        held = is_held_out(Answered(np.array(prompt), len(prompt)))
        if sum(is_held_out(s) == held for s in made) < wanted[held]:
            made.append(Answered(np.array(generate_plain(target, prompt, 10 + len(made) % 12)), len(prompt)))
    return made


def trainer_for(target, sequences, out, settings=SETTINGS, shape=SHAPE):
    draft = new_draft(target, sequences, shape, settings.seed)
    return Trainer(target, draft, lambda: sequences, out, settings)


def trained(trainer):
    return {k: v.clone() for k, v in trainer.draft.state_dict().items()}


def test_training_lowers_the_loss_and_the_head_then_drafts_better(target, sequences, tmp_path):
    settings = replace(SETTINGS, steps=80)
    trainer = trainer_for(target, sequences, tmp_path, settings)
    before = trainer.evaluate()
    trainer.run()
    after = trainer.evaluate()
    assert after["l1"] < 0.8 * before["l1"] and after["tau"] > before["tau"] + 0.2
    folder = make_target(tmp_path / "target", vocab=64, layers=3)
    draft = load_draft(tmp_path / "latest", folder)
    rounds = acceptance([speculate(target, draft, s.tokens[: s.prompt_length].tolist(), 20) for s in sequences[:8]], 4)
    assert rounds.length > 1.3
    lines = [json.loads(x) for x in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == list(range(1, 81)) and lines[-1]["held_out"]["l1"] == after["l1"]


def test_a_resumed_run_equals_one_that_never_stopped(target, sequences, tmp_path):
    whole = trainer_for(target, sequences, tmp_path / "whole")
    whole.run()
    first = trainer_for(target, sequences, tmp_path / "cut")
    first.run(report=lambda line: setattr(first, "stop_requested", line["step"] == 7))
    assert first.progress.step == 7
    second = trainer_for(target, sequences, tmp_path / "cut")
    second.resume()
    second.run()
    assert second.progress.step == 12 and second.progress.blocks == whole.progress.blocks
    for name, value in trained(whole).items():
        assert torch.equal(value, trained(second)[name]), name


def test_resuming_refuses_other_settings_and_lost_data(target, sequences, tmp_path):
    run = trainer_for(target, sequences, tmp_path, replace(SETTINGS, steps=1))
    run.run()
    with pytest.raises(ValueError, match="another steps"):
        trainer_for(target, sequences, tmp_path, replace(SETTINGS, steps=2)).resume()
    with pytest.raises(ValueError, match="does not hold"):
        trainer_for(target, sequences[:20], tmp_path, replace(SETTINGS, steps=1)).resume()
    with pytest.raises(ValueError, match="another config"):
        trainer_for(target, sequences, tmp_path, replace(SETTINGS, steps=1), replace(SHAPE, rank=4)).resume()


def test_data_that_grew_is_used_from_the_next_epoch_on(target, sequences, tmp_path):
    available = sequences[:24]
    draft = new_draft(target, sequences, SHAPE, 1)
    trainer = Trainer(target, draft, lambda: available, tmp_path, replace(SETTINGS, steps=100))
    n = len(trainer.batches)
    available = sequences
    while trainer.progress.place < n:
        assert trainer.step()["batches"] == n
    grown = trainer.step()
    assert grown["epoch"] == 1 and grown["batches"] > n
    trainer.save()
    again = trainer_for(target, sequences, tmp_path, replace(SETTINGS, steps=100))
    again.resume()
    assert trainer.step()["total"] == again.step()["total"] and again.held_out_keys == trainer.held_out_keys


def test_remembered_features_change_nothing(target, sequences, tmp_path):
    settings = [replace(SETTINGS, feature_cache_gb=gb) for gb in (0.0, 1.0)]
    runs = [trainer_for(target, sequences, tmp_path, s) for s in settings]
    lines = [[r.step()["total"] for _ in range(len(r.batches) + 3)] for r in runs]
    assert lines[0] == lines[1]
    assert not runs[0].target_pass.cache and len(runs[1].target_pass.cache) == len(runs[1].batches)


def test_batches_hold_every_sequence_once_and_stay_in_size(sequences):
    batches = make_batches(sequences, 200, 1024)
    assert sum(len(b.lengths) for b in batches) == len(sequences)
    assert all(b.tokens.numel() <= 200 for b in batches)
    answers = sum(len(s.tokens) - s.prompt_length for s in sequences)
    assert sum(int(b.loss_mask.sum()) for b in batches) == answers
    assert [b.lengths for b in make_batches(sequences[::-1], 200, 1024)] == [b.lengths for b in batches]


def test_long_sequences_are_cut_and_short_answers_left_out():
    tokens = np.arange(30, dtype=np.int32)
    batches = make_batches([Answered(tokens, 10), Answered(tokens, 29), Answered(tokens, 19)], 200, 20)
    assert [b.lengths for b in batches] == [[20]]


def test_held_out_follows_the_prompt_alone():
    prompt = [5, 6, 7]
    a, b = Answered(np.array([*prompt, 1, 2]), 3), Answered(np.array([*prompt, 9, 9, 9]), 3)
    assert is_held_out(a) == is_held_out(b)
    shares = [is_held_out(Answered(np.array([i, i + 1, 0]), 2)) for i in range(4000)]
    assert 0.02 < np.mean(shares) < 0.045


def test_anchors_are_valid_distinct_and_as_many_as_asked(target, sequences, tmp_path):
    trainer = trainer_for(target, sequences, tmp_path)
    batch = trainer.batches[0]
    anchors, keep = trainer.anchors(batch, torch.Generator().manual_seed(0))
    for b, n in enumerate(batch.lengths):
        chosen = anchors[b][keep[b]].tolist()
        first = int(batch.loss_mask[b].nonzero()[0])
        assert len(set(chosen)) == len(chosen) == -(-(n - 1 - first) // 2)
        assert all(first <= p < n - 1 for p in chosen)


def test_block_acceptance_is_the_mean_over_blocks_with_slots():
    valid = torch.tensor([[[1, 1], [1, 0], [0, 0]]]).bool()
    chance, tau = block_acceptance(torch.tensor([0.5, 0.5, 1.0]), valid)
    assert chance == [0.75, 0.5] and tau == pytest.approx(1 + (0.75 + 1.0) / 2, abs=1e-4)


def test_default_layer_ids():
    assert default_layer_ids(30) == (1, 8, 14, 21, 28)
    assert default_layer_ids(3) == (1,) and default_layer_ids(1) == (0,)


@pytest.mark.parametrize("change", [{"steps": 3, "minutes": 2.0}, {"steps": None}, {"anchor_share": 0.0}])
def test_settings_that_cannot_be_are_refused(change):
    with pytest.raises(ValueError):
        replace(SETTINGS, **change)
