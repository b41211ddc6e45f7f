"""The trainer on a tiny target: it learns, it resumes exactly, it notices data that grew or changed."""

import json
from dataclasses import replace

import pytest
import torch

from tests.tiny import make_target
from tests.training.answered import SETTINGS, SHAPE
from training.checkpoint import load_draft
from training.data import is_held_out
from training.evaluate import acceptance, speculate
from training.initialisation import new_draft
from training.optimiser import OPTIMISERS
from training.settings import TrainSettings
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


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_a_resumed_run_equals_one_that_never_stopped(target, sequences, tmp_path, optimiser):
    settings = replace(SETTINGS, optimiser=optimiser)
    whole = trainer_for(target, sequences, tmp_path / "whole", settings)
    whole.run()
    first = trainer_for(target, sequences, tmp_path / "cut", settings)
    first.run(report=lambda line: setattr(first, "stop_requested", line["step"] == 7))
    assert first.progress.step == 7
    second = trainer_for(target, sequences, tmp_path / "cut", settings)
    second.resume()
    second.run()
    assert second.progress.step == 12 and second.progress.blocks == whole.progress.blocks
    for name, value in trained(whole).items():
        assert torch.equal(value, trained(second)[name]), name


def test_the_mean_of_the_weights_is_saved_and_resumed_exactly(target, sequences, tmp_path):
    settings = replace(SETTINGS, ema=0.8)
    whole = trainer_for(target, sequences, tmp_path / "whole", settings)
    whole.run()
    first = trainer_for(target, sequences, tmp_path / "cut", settings)
    first.run(report=lambda line: setattr(first, "stop_requested", line["step"] == 7))
    second = trainer_for(target, sequences, tmp_path / "cut", settings)
    second.resume()
    second.run()
    assert all(torch.equal(a, b) for a, b in zip(whole.average.values, second.average.values))
    assert not torch.equal(whole.average.values[0], whole.parameters[0])
    plain = trainer_for(target, sequences, tmp_path / "plain")
    plain.run()
    assert all(torch.equal(v, trained(whole)[k]) for k, v in trained(plain).items())  # keeping a mean changes no weight
    assert not (tmp_path / "plain" / "latest-ema").exists()
    folder = make_target(tmp_path / "target", vocab=64, layers=3)
    mean = load_draft(tmp_path / "whole" / "latest-ema", folder)
    names = [name for name, p in whole.draft.named_parameters() if p.requires_grad]
    for name, value in zip(names, whole.average.values):
        assert torch.equal(mean.state_dict()[name], value.bfloat16().float()), name
    lines = [json.loads(x) for x in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["held_out_ema"]["l1"] != lines[-1]["held_out"]["l1"]


def test_a_run_ends_when_its_patience_does(target, sequences, tmp_path):
    settings = replace(SETTINGS, lr=0.0, evaluate_steps=2, patience=3)  # nothing is learnt: the first is the best
    run = trainer_for(target, sequences, tmp_path, settings)
    run.run()
    assert run.progress.step == 8 and run.progress.waited == 3 and run.tired
    again = trainer_for(target, sequences, tmp_path, settings)
    again.resume()
    assert again.tired and again.progress.best == run.progress.best
    again.run()
    assert again.progress.step == 8
    again = trainer_for(target, sequences, tmp_path, replace(settings, patience=5))
    again.resume()
    again.run()
    assert again.progress.step == 12


def held_out_taus(out, name="held_out"):
    lines = [json.loads(x) for x in (out / "log.jsonl").read_text().splitlines()]
    return {x["step"]: x[name]["tau"] for x in lines if name in x}


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_the_best_head_is_kept_beside_the_last(target, sequences, tmp_path, ema, monkeypatch):
    """The weights of the evaluation with the highest tau, bit for bit, though the run went on; the mean where there is one."""
    settings = replace(SETTINGS, evaluate_steps=2, ema=ema, patience=3)
    run, seen = trainer_for(target, sequences, tmp_path, settings), {}
    real, after = run.held_out.evaluate, {2: 1.5, 4: 1.9, 6: 1.7, 8: 1.9, 10: 1.8}

    def evaluate(*given):
        seen[run.progress.step] = trained(run)
        return {**real(*given), "tau": after[run.progress.step]}

    monkeypatch.setattr(run.held_out, "evaluate", evaluate)
    run.run()
    assert run.progress.step == 10 and run.tired and not run.best
    folder = make_target(tmp_path / "target", vocab=64, layers=3)
    best, last = load_draft(tmp_path / "best", folder).state_dict(), load_draft(tmp_path / "latest", folder).state_dict()
    for name in run.names:
        assert torch.equal(best[name], seen[4][name].bfloat16().float()), name
    assert not torch.equal(best["lm_head.weight"], last["lm_head.weight"])


def test_the_best_head_survives_a_stop_and_a_kill(target, sequences, tmp_path):
    """What was best when the run was last saved is what it goes on from: a run killed later makes its best anew."""
    settings = replace(SETTINGS, steps=16, evaluate_steps=2)
    weights = lambda name: (tmp_path / name / "best" / "model.safetensors").read_bytes()
    whole = trainer_for(target, sequences, tmp_path / "whole", settings)
    whole.run()
    taus = held_out_taus(tmp_path / "whole")
    assert whole.progress.best == max(taus.values()) > taus[2]
    cut = trainer_for(target, sequences, tmp_path / "cut", settings)
    cut.run(report=lambda line: setattr(cut, "stop_requested", line["step"] == 4))
    early = weights("cut")
    lost = trainer_for(target, sequences, tmp_path / "cut", settings)
    lost.resume()
    for _ in range(4):
        lost.step()
    lost.evaluate()
    assert lost.best and weights("cut") == early, "not before state.pt says so"
    again = trainer_for(target, sequences, tmp_path / "cut", settings)
    again.resume()
    again.run()
    assert weights("cut") == weights("whole") != early and again.progress.best == whole.progress.best
    worse = trainer_for(target, sequences, tmp_path / "cut", settings)
    worse.resume()
    worse.evaluate()
    worse.save()  # an evaluation that is no better leaves it
    assert weights("cut") == weights("whole")


def test_a_state_from_before_a_setting_existed_is_resumed(target, sequences, tmp_path):
    run = trainer_for(target, sequences, tmp_path, replace(SETTINGS, steps=3))
    run.run()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    for name in set(state["settings"]) - {"seed", "steps", "lr", "tokens_per_batch", "bf16", "evaluate_steps", "loss"}:
        if state["settings"][name] == getattr(TrainSettings(steps=1), name):
            del state["settings"][name]
    assert "ema" not in state["settings"] and "sharding" not in state["settings"]
    del state["settings"]["loss"]["decay"]
    for name in ("best", "waited"):
        del state["progress"][name]
    torch.save(state, tmp_path / "state.pt")
    again = trainer_for(target, sequences, tmp_path, replace(SETTINGS, steps=3))
    again.resume()
    assert again.progress.step == 3 and all(torch.equal(v, trained(again)[k]) for k, v in trained(run).items())
    with pytest.raises(ValueError, match="another ema"):
        trainer_for(target, sequences, tmp_path, replace(SETTINGS, steps=3, ema=0.5)).resume()


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
    """In memory, in files, in both, and where a file was damaged."""
    gigabytes = {"none": (0.0, 0.0), "memory": (1.0, 1.0), "disk": (0.0, 1.0), "some": (1e-4, 1.0)}
    settings = {k: replace(SETTINGS, feature_cache_gb=m, feature_disk_gb=d) for k, (m, d) in gigabytes.items()}
    runs = {name: trainer_for(target, sequences, tmp_path / name, s) for name, s in settings.items()}
    lines = {}
    for name, run in runs.items():
        lines[name] = [run.step()["total"] for _ in range(len(run.batches))]
        for file in (tmp_path / name).rglob("features-1.safetensors"):
            file.write_bytes(file.read_bytes()[:-1] + b"?")
        lines[name] += [run.step()["total"] for _ in range(3)]
    assert lines["none"] == lines["memory"] == lines["disk"] == lines["some"]
    passes = {name: run.target_pass for name, run in runs.items()}
    held = {name: (len(p.cache), len(p.files.sums)) for name, p in passes.items() if p.files}
    n = len(runs["none"].batches)
    assert not runs["none"].target_pass.cache and held["memory"] == (n, 0) and held["disk"] == (0, n)
    assert 0 < held["some"][0] < n and sum(held["some"]) == n


def test_the_disk_it_used_is_reported_and_given_back(target, sequences, tmp_path):
    run = trainer_for(target, sequences, tmp_path, replace(SETTINGS, feature_cache_gb=0.0, feature_disk_gb=1.0))
    run.run()
    assert not list(tmp_path.glob("features*"))
    said = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["disk"]
    tokens = sum(len(s.tokens) for s in sequences if not is_held_out(s))
    assert said["tokens"] == 4 * tokens and said["features"] > tokens * 32 * 3 * 4 and said == run.disk
    assert said["cached_recipe"] == tokens * (6 + 2 * 32 * 3) + 56 * 42


def test_a_damaged_state_is_one_sentence(target, sequences, tmp_path):
    run = trainer_for(target, sequences, tmp_path, replace(SETTINGS, steps=1))
    run.run()
    (tmp_path / "state.pt").write_bytes((tmp_path / "state.pt").read_bytes()[:3000])
    with pytest.raises(ValueError, match="state.pt is corrupt"):
        trainer_for(target, sequences, tmp_path, replace(SETTINGS, steps=1)).resume()
