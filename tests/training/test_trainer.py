"""The trainer on a tiny target: it learns, it resumes exactly, it notices data that grew or changed."""

import json
from dataclasses import replace

import pytest
import torch

from tests.tiny import make_target
from tests.training.answered import SETTINGS, SHAPE
from training.checkpoint import load_draft
from training.evaluate import acceptance, speculate
from training.initialisation import new_draft
from training.trainer import Trainer


def trainer_for(target, sequences, out, settings=SETTINGS, shape=SHAPE):
    draft = new_draft(target, sequences, shape, settings.seed)
    return Trainer(target, draft, lambda: sequences, out, settings)


def trained(trainer):
    return {k: v.clone() for k, v in trainer.draft.state_dict().items()}


def test_training_lowers_the_loss_and_the_head_then_drafts_better(target, sequences, tmp_path):
    settings = replace(SETTINGS, steps=80)
    trainer = trainer_for(target, sequences, tmp_path, settings)
    evaluate = lambda: trainer.held_out.evaluate(trainer.batch_pass, trainer.workers)
    before = evaluate()
    trainer.run()
    after = evaluate()
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
    assert trainer.step()["total"] == again.step()["total"] and again.held_out.keys == trainer.held_out.keys


def test_remembered_features_change_nothing(target, sequences, tmp_path):
    settings = [replace(SETTINGS, feature_cache_gb=gb) for gb in (0.0, 1.0)]
    runs = [trainer_for(target, sequences, tmp_path, s) for s in settings]
    lines = [[r.step()["total"] for _ in range(len(r.batches) + 3)] for r in runs]
    assert lines[0] == lines[1]
    assert not runs[0].target_pass.cache and len(runs[1].target_pass.cache) == len(runs[1].batches)
