"""Every kind of head on the same data with the same trainer: it runs, reports, learns, resumes; processes share it."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.tiny import make_target
from tests.training.answered import SETTINGS, SHAPE, Answered
from training.batch_pass import BatchPass
from training.checkpoint import load_draft
from training.data import TargetPass, make_batches
from training.evaluate import acceptance, speculate
from training.initialisation import KINDS, new_draft, stream_size
from training.loss import named_losses
from training.target import TargetModel
from training.train import train
from training.trainer import Trainer

ROOT = Path(__file__).parents[2]
AUTOREGRESSIVE = ("eagle3", "mtp")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_target(tmp_path_factory.mktemp("target"), vocab=64, layers=3)


def trainer_for(folder, kind, sequences, out, **changes):
    shape = replace(SHAPE, kind=kind)
    target = TargetModel.from_pretrained(folder, shape.layers_of(3))
    settings = replace(SETTINGS, loss=named_losses("", kind), **changes)
    return Trainer(target, new_draft(target, sequences, shape, 1), lambda: sequences, out, settings)


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_all_kinds_train_on_the_same_data_and_report(folder, sequences, tmp_path):
    held = {}
    for kind in KINDS:
        settings = replace(SETTINGS, steps=4, evaluate_steps=4, loss=named_losses("", kind), bf16=True)
        train(folder, lambda: sequences, tmp_path / kind, replace(SHAPE, kind=kind, draft_vocab=50), settings)
        last = log(tmp_path / kind)[-1]
        assert last["step"] == 4 and last["tau"] > 1 and len(last["acceptance"]) == SHAPE.block_size
        held[kind] = last["held_out"]
        assert held[kind]["tau"] > 1 and held[kind]["greedy_tau"] > 1
        assert (held[kind]["soft"] > 0) == (kind in AUTOREGRESSIVE)
        draft = load_draft(tmp_path / kind / "latest", folder)
        assert draft.config.kind == (kind if kind in AUTOREGRESSIVE else "parallel")
        assert (draft.markov_head is not None, draft.confidence_head is not None) == (kind == "dspark",) * 2
        assert draft.config.vocab_out == 50 and draft.config.target_layer_ids == replace(SHAPE, kind=kind).layers_of(3)
    assert len({(h["blocks"], h["greedy_blocks"]) for h in held.values()}) == 1  # judged on the same blocks


@pytest.mark.parametrize("factor", [1.0, 30.0])
def test_mtp_begins_with_a_stream_as_large_as_the_targets(folder, sequences, factor):
    """A target whose stream is 30 times as large: what its layer adds must not drown what eh_proj puts in."""
    shape, d = replace(SHAPE, kind="mtp", depth=1), 32
    target = TargetModel.from_pretrained(folder, (2,))
    with torch.no_grad():
        target.embed_tokens.weight.mul_(factor)
        for layer in target.layers:
            layer.self_attn.o_proj.weight.mul_(factor), layer.mlp.down_proj.weight.mul_(factor)
    size = stream_size(target, sequences)
    assert size == stream_size(target, sequences[::-1]) and 0.5 * factor < size < 5 * factor
    draft = new_draft(target, sequences, shape, 1)
    fed = torch.randn(50, d)
    normed = fed * fed.pow(2).mean(-1, keepdim=True).rsqrt()
    stream = draft.eh_proj(torch.cat([torch.zeros(50, d), normed], dim=-1))
    assert float(stream.detach().pow(2).mean().sqrt()) == pytest.approx(size, rel=0.05)
    settings = replace(SETTINGS, loss=named_losses("", "mtp"))
    ids, batch = draft.draft_to_target(), make_batches(sequences, 400, 1024)[0]
    losses = []
    for weight in (draft.eh_proj.weight.clone(), draft.eh_proj.weight / torch.tensor([1.0, size]).repeat_interleave(d)):
        draft.eh_proj.weight.data = weight.detach()
        run = BatchPass(target, draft, TargetPass(target, ids, 10**8), settings)
        losses.append(float(run(batch, 0, torch.Generator().manual_seed(0))[1].total.detach()))
    assert losses[0] < losses[1] - 0.2 or factor == 1


@pytest.mark.parametrize("kind", AUTOREGRESSIVE)
def test_a_short_run_lowers_the_loss_and_the_head_then_drafts_better(kind, folder, sequences, tmp_path):
    run = trainer_for(folder, kind, sequences, tmp_path, steps=40, evaluate_steps=40)
    evaluate = lambda: run.held_out.evaluate(run.batch_pass, run.workers)
    played = lambda draft: acceptance(
        [speculate(run.target, draft, s.tokens[: s.prompt_length].tolist(), 20) for s in sequences[:8]], 4
    )
    before, untrained = evaluate(), played(run.draft.eval()).length
    run.draft.train()
    run.run()
    after = evaluate()
    assert after["total"] == after["soft"] < before["soft"] - 0.3 and after["tau"] > before["tau"] + 0.2
    draft = load_draft(tmp_path / "latest", folder)
    assert played(draft).length > untrained + 0.3 and not draft.training


@pytest.mark.parametrize("kind", AUTOREGRESSIVE)
def test_a_resumed_run_equals_one_that_never_stopped(kind, folder, sequences, tmp_path):
    make = lambda name: trainer_for(folder, kind, sequences, tmp_path / name, steps=6, unroll=3, ema=0.5)
    whole, first = make("whole"), make("cut")
    whole.run()
    first.run(report=lambda line: setattr(first, "stop_requested", line["step"] == 3))
    second = make("cut")
    second.resume()
    second.run()
    ours = second.draft.state_dict()
    assert first.progress.step == 3 and all(torch.equal(v, ours[k]) for k, v in whole.draft.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(whole.average.values, second.average.values))


def test_two_processes_have_the_loss_curve_of_one(folder, sequences, tmp_path):
    torch.save(sequences, tmp_path / "sequences.pt")
    target = TargetModel.from_pretrained(folder, (0, 1))
    settings = replace(SETTINGS, batches_per_step=3, loss=named_losses("", "eagle3"))
    draft = new_draft(target, sequences, replace(SHAPE, kind="eagle3"), 1)
    alone = Trainer(target, draft, lambda: sequences, tmp_path / "one", settings)
    alone.run()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    done = subprocess.run(
        [*command, "tests.training.one_rank", str(folder), str(tmp_path / "sequences.pt"), str(tmp_path / "two")],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "KIND": "eagle3"},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    ours, theirs = log(tmp_path / "one"), log(tmp_path / "two")
    assert len(ours) == len(theirs) == 12
    for a, b in zip(ours, theirs):
        assert (a["step"], a["blocks"], a["tokens"]) == (b["step"], b["blocks"], b["tokens"])
        assert all(abs(a[name] - b[name]) <= 1.01e-5 for name in ("total", "ce", "l1", "soft", "tau")), a["step"]
    state = torch.load(tmp_path / "two" / "state.pt", weights_only=True)["draft"]
    for name, value in state.items():
        torch.testing.assert_close(value, alone.draft.state_dict()[name], atol=2e-5, rtol=1e-4)


def test_training_may_unroll_fewer_steps_and_evaluation_sees_all(folder, sequences):
    shape = replace(SHAPE, kind="eagle3")
    target = TargetModel.from_pretrained(folder, shape.layers_of(3))
    draft = new_draft(target, sequences, shape, 1)
    passes = TargetPass(target, draft.draft_to_target(), 0)
    run = BatchPass(target, draft, passes, replace(SETTINGS, unroll=2, loss=named_losses("both", "eagle3")))
    batch = make_batches(sequences, 200, 1024)[0]
    forward = lambda: run(batch, 0, torch.Generator().manual_seed(0))
    draft.train()
    short, losses, _ = forward()
    draft.eval()
    long, _, _ = forward()
    assert (short.valid.shape[-1], long.valid.shape[-1]) == (2, SHAPE.block_size)
    assert torch.equal(short.valid, long.valid[..., :2]) and torch.equal(short.x, long.x[long.slot < 2])
    assert losses.soft > 0 and losses.ce > 0
    assert losses.total.item() == pytest.approx(float(losses.soft + 0.1 * losses.ce + 0.9 * losses.l1), rel=1e-5)


def test_no_block_begins_where_no_row_lies_before(folder, sequences):
    """An answer that begins the sequence: position 0 is an anchor of a parallel head alone."""
    whole = [Answered(s.tokens, 0) for s in sequences[:2]]
    batch = make_batches(whole, 200, 1024)[0]
    for kind, least in (("dspark", 0), ("mtp", 1)):
        shape = replace(SHAPE, kind=kind)
        target = TargetModel.from_pretrained(folder, shape.layers_of(3))
        draft = new_draft(target, whole, shape, 1)
        settings = replace(SETTINGS, anchor_share=1.0)
        run = BatchPass(target, draft, TargetPass(target, draft.draft_to_target(), 0), settings)
        _, losses, keep = run(batch, 0, torch.Generator().manual_seed(0))
        anchors, kept = run.anchors(batch, torch.Generator().manual_seed(0))
        assert int(anchors[kept].min()) == least and bool(losses.total.isfinite())


def test_what_does_not_fit_is_one_sentence(folder, sequences, tmp_path):
    settings = replace(SETTINGS, steps=1, evaluate_steps=9)
    train(folder, lambda: sequences, tmp_path / "mtp", replace(SHAPE, kind="mtp"), settings)
    with pytest.raises(ValueError, match="holds a draft of kind 'mtp', and kind is 'dspark'."):
        train(folder, lambda: sequences, tmp_path / "x", SHAPE, settings, init=tmp_path / "mtp" / "latest")
    with pytest.raises(ValueError, match="kind is 'medusa'; it must be one of dspark, dflash, eagle3, mtp."):
        replace(SHAPE, kind="medusa")
    with pytest.raises(ValueError, match="unroll is -1"):
        replace(SETTINGS, unroll=-1)
