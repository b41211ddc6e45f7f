"""A run whose loss stops being a number ends with one sentence, and what was saved stays as it was."""

from dataclasses import replace

import pytest
import torch

from tests.training.answered import SETTINGS, SHAPE
from training.checkpoint import load_draft
from training.initialisation import new_draft
from training.trainer import Trainer


def trainer_for(target, sequences, out, settings=SETTINGS):
    return Trainer(target, new_draft(target, sequences, SHAPE, settings.seed), lambda: sequences, out, settings)


def test_a_loss_that_is_not_a_number_ends_the_run(target, sequences, tmp_path):
    first = trainer_for(target, sequences, tmp_path)
    first.run(report=lambda line: setattr(first, "stop_requested", line["step"] == 2))
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    run = trainer_for(target, sequences, tmp_path)
    run.resume()
    with torch.no_grad():
        run.draft.fc.weight[0, 0] = float("nan")
    words = r"step 3: the loss \(total\) is nan, so the run ends \(.*latest is the last save\); try a lower --lr than 0.003, in"
    with pytest.raises(ValueError, match=words):
        run.run()
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert run.progress.step == 2


def test_a_gradient_that_is_not_finite_changes_no_weight(target, sequences, tmp_path):
    run = trainer_for(target, sequences, tmp_path, replace(SETTINGS, bf16=True))
    weights, made = [p.detach().clone() for p in run.parameters], run.gradients

    class Broken:
        whole = staticmethod(made.whole)

        def __call__(self, jobs):
            seen = made(jobs)
            run.parameters[0].grad[0] = float("inf")
            return seen

    run.gradients = Broken()
    with pytest.raises(ValueError, match="gradient's norm is .*nothing was saved before.* or --fp32, in a new --out."):
        run.step()
    assert all(torch.equal(a, b) for a, b in zip(weights, run.parameters)) and not (tmp_path / "latest").exists()
