"""`check` on a head that knows its target, whole and broken: in each way that a checkpoint goes wrong, it names the
change.

The head is overfitted in seconds to a tiny target's answers: what it accepts, it accepts because it is read rightly.
"""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import make_target
from tests.training.answered import Answered
from training import check as room
from training.batch_pass import BatchPass
from training.check import FAILED, WARNING, check, table
from training.checkpoint import load_draft, save_draft
from training.data import TargetPass, make_batch
from training.draft import DraftConfig, DraftModel
from training.evaluate import generate_plain
from training.formats.layouts import convert
from training.initialisation import initialise
from training.loss import LossWeights
from training.repairs import readings
from training.settings import TrainSettings
from training.target import TargetModel

VOCAB, LAYERS, IDS, MASK, G, NEW, RANK = 64, 5, (1, 3), 3, 4, 24, 4
PRUNED = 48


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory):
    return make_target(tmp_path_factory.mktemp("target"), vocab=VOCAB, layers=LAYERS, seed=3)


@pytest.fixture(scope="module")
def answers(target_folder):
    target = TargetModel.from_pretrained(target_folder)
    g = torch.Generator().manual_seed(1)
    prompts = [torch.randint(4, VOCAB, (5,), generator=g).tolist() for _ in range(8)]
    return [Answered(torch.tensor(generate_plain(target, p, NEW + G + 2)).numpy(), len(p)) for p in prompts]


@pytest.fixture(scope="module")
def prompts(answers, tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = [json.dumps({"input_ids": a.tokens[: a.prompt_length].tolist()}) for a in answers]
    file.write_text("\n".join(lines) + "\n")
    return file


def overfitted(target_folder, answers, head="vanilla", from_anchor=True, pruned=None, steps=160):
    target = TargetModel.from_pretrained(target_folder, IDS)
    common = sorted({int(t) for a in answers for t in a.tokens[a.prompt_length :]})
    ids = (
        torch.tensor(sorted([*common, *[i for i in range(VOCAB) if i not in common]][:pruned]))
        if pruned
        else torch.arange(VOCAB)
    )
    config = DraftConfig(
        decoder=target.config.__class__(**{**vars(target.config), "num_hidden_layers": 1}),
        block_size=G,
        mask_token_id=MASK,
        target_layer_ids=IDS,
        num_target_layers=LAYERS,
        markov_rank=RANK,
        markov_head_type=head,
        enable_confidence_head=True,
        confidence_head_with_markov=True,
        draft_vocab_size=pruned,
        sample_from_anchor=from_anchor,
    )
    draft = DraftModel(config)
    initialise(draft, target, ids, seed=0)
    draft.requires_grad_(True)
    draft.embed_tokens.requires_grad_(False)
    draft.lm_head.requires_grad_(False)  # as in public trainers
    settings = TrainSettings(steps=steps, bf16=False, anchor_share=1.0, loss=LossWeights())
    run = BatchPass(target, draft, TargetPass(target, draft.draft_to_target(), 10**9), settings)
    batch, g = make_batch(answers), torch.Generator().manual_seed(0)
    trained = [p for p in draft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-2, weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        _, losses, _ = run(batch, 0, g)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
    return draft.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def whole(target_folder, answers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    save_draft(overfitted(target_folder, answers), folder)
    return folder


@pytest.fixture(scope="module")
def pruned(target_folder, answers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pruned")
    save_draft(overfitted(target_folder, answers, pruned=PRUNED), folder)
    return folder


@pytest.fixture
def broken(tmp_path):
    """broken(folder, weights=None, **config keys) -> a copy with these changes."""

    def made(folder, weights=None, **keys):
        shutil.copytree(folder, tmp_path / "broken")
        raw = json.loads((folder / "config.json").read_text())
        (tmp_path / "broken" / "config.json").write_text(json.dumps(raw | keys))
        if weights is not None:
            save_file(weights(load_file(folder / "model.safetensors")), tmp_path / "broken" / "model.safetensors")
        return tmp_path / "broken"

    return made


def run(target, draft, prompts):
    return check(target, draft, prompts, limit=8, max_tokens=NEW)


def test_a_whole_head_passes(target_folder, whole, prompts):
    report = run(target_folder, whole, prompts)
    assert not report.failed and report.repair is None, table(report)
    assert report.length > report.chance + 1, table(report)
    assert "no single change does better" in table(report)


@pytest.mark.parametrize(
    "keys, repair",
    [
        ({"target_layer_ids": [0, 2]}, r"layer offset +1: target_layer_ids [1, 3] instead of [0, 2]"),
        ({"mask_token_id": 40}, "wrong mask id: mask_token_id 3 instead of 40"),
        ({"sample_from_anchor": False}, "anchor slot: sample_from_anchor true"),
    ],
)
def test_a_wrong_key_is_named(keys, repair, target_folder, whole, prompts, broken):
    report = run(target_folder, broken(whole, **keys), prompts)
    assert report.failed and report.repair and report.repair.startswith(repair), table(report)


def test_layers_are_moved_both_ways_but_not_onto_the_last(whole):
    config = load_draft(whole).config
    moved = lambda ids: [r.config.target_layer_ids for r in readings(replace(config, target_layer_ids=ids), {})][:2]
    assert moved((1, 2)) == [(2, 3), (0, 1)]
    assert moved((1, 3))[0] == (0, 2) and moved((-1, 2))[0] == (0, 3), "4 is the last, -1 the first"


def test_the_anchor_slot_the_other_way_round(target_folder, answers, prompts, tmp_path):
    """A head whose masks predict their own positions, said to draft from the anchor's slot."""
    draft = overfitted(target_folder, answers, from_anchor=False)
    save_draft(draft, tmp_path / "z")
    assert run(target_folder, tmp_path / "z", prompts).repair is None
    raw = json.loads((tmp_path / "z" / "config.json").read_text())
    del raw["sample_from_anchor"]
    (tmp_path / "z" / "config.json").write_text(json.dumps(raw))
    report = run(target_folder, tmp_path / "z", prompts)
    assert report.repair and report.repair.startswith("anchor slot: sample_from_anchor false"), table(report)


@pytest.mark.parametrize("step", [1, -1])
def test_a_block_in_the_wrong_place_is_named(step, target_folder, whole, prompts, monkeypatch):
    """Code that puts the block one position beside where training had it."""
    right = DraftModel.backbone
    moved = lambda self, f, a, at, keep=None, offset=0: right(self, f, a, at, keep, offset + step)
    monkeypatch.setattr(DraftModel, "backbone", moved)
    report = run(target_folder, whole, prompts)
    assert report.repair == f"block shifted by one: its positions begin at p{-step:+d} instead of p", table(report)


def test_a_missing_vocabulary_map_is_found_in_the_head(target_folder, pruned, prompts, broken):
    assert run(target_folder, pruned, prompts).repair is None
    report = run(target_folder, broken(pruned, lambda w: {n: t for n, t in w.items() if n != "d2t"}), prompts)
    assert "d2t is missing: which 48 of the target's 64 tokens the draft knows is not said." in table(report)
    assert report.repair and report.repair.startswith("d2t missing or not this draft's: by the rows of lm_head"), table(
        report
    )


def test_a_map_of_nothing_loads_and_is_named(target_folder, pruned, prompts, broken):
    report = run(target_folder, broken(pruned, lambda w: w | {"d2t": torch.zeros_like(w["d2t"])}), prompts)
    assert report.repair and report.repair.startswith("d2t missing or not this draft's"), table(report)


def test_a_map_of_ids_is_told_from_one_of_offsets(target_folder, pruned, prompts, broken):
    report = run(target_folder, broken(pruned, lambda w: w | {"d2t": w["d2t"] + torch.arange(PRUNED)}), prompts)
    assert "d2t must be 48 offsets" in table(report)
    assert report.repair and report.repair.startswith("d2t missing or not this draft's"), table(report)


def test_speculators_t2d_gives_the_map_back(target_folder, pruned, prompts, broken, tmp_path):
    convert(pruned, tmp_path / "s", "speculators")
    folder = broken(tmp_path / "s", lambda w: {n: t for n, t in w.items() if n != "d2t"})
    report = run(target_folder, folder, prompts)
    assert report.repair and "t2d says which tokens" in report.repair + table(report), table(report)


@pytest.mark.parametrize("said", ["vanilla", "rnn"])
def test_a_wrong_head_type_is_named(said, target_folder, answers, prompts, broken, tmp_path):
    save_draft(overfitted(target_folder, answers, head="gated"), tmp_path / "gated")
    report = run(target_folder, broken(tmp_path / "gated", markov_head_type=said), prompts)
    sentence = f"wrong head type: markov_head_type is '{said}', and the weights are of a gated head."
    assert (FAILED, sentence) in report.findings and report.length > 2.5, table(report)


def test_a_markov_head_of_something_else_is_named(target_folder, whole, prompts, broken):
    g = torch.Generator().manual_seed(0)
    noise = lambda w: w | {"markov_head.markov_w2.weight": 3 * torch.randn(VOCAB, RANK, generator=g)}
    report = run(target_folder, broken(whole, noise), prompts)
    assert report.repair and "without the Markov head" in report.repair, table(report)


def test_a_head_that_was_never_trained_is_near_chance(target_folder, prompts, whole, broken):
    g = torch.Generator().manual_seed(0)
    noise = lambda w: {n: torch.randn(t.shape, generator=g) * 0.1 for n, t in w.items()}
    report = run(target_folder, broken(whole, noise), prompts)
    assert report.failed and report.repair is None and "is near chance" in table(report), table(report)


def test_a_pair_that_cannot_be_is_refused_before_a_weight_is_read(target_folder, whole, prompts, tmp_path, broken):
    other = make_target(tmp_path / "other", vocab=80, layers=4)
    report = check(other, whole, prompts)
    assert "its vocab_size is 64, the target's is 80." in table(report)
    assert "its num_target_layers is 5, the target's is 4." in table(report) and report.length is None


def test_the_last_layer_as_a_feature_is_refused(target_folder, whole, prompts, broken):
    with pytest.raises(ValueError) as error:
        check(target_folder, broken(whole, target_layer_ids=[1, 4]), prompts)
    message = str(error.value)
    assert "[1, 4]; 4 is the target's last layer" in message and "in -1..3." in message and "\n" not in message


def test_what_is_odd_but_may_be_meant_is_a_warning(target_folder, whole, prompts, broken, monkeypatch, tmp_path):
    monkeypatch.setattr(room, "smoke_test", lambda *a: None)
    said = lambda report: [sentence for level, sentence in report.findings if level == WARNING]
    odd = broken(whole, mask_token_id=63)
    (only,) = said(check(target_folder, odd, prompts))
    assert "63 is an end-of-sequence token" in only
    shutil.copytree(target_folder, tmp_path / "target")
    tokens = {"added_tokens": [{"id": 3}], "model": {"vocab": {"a": 3, "b": 40}}}
    (tmp_path / "target" / "tokenizer.json").write_text(json.dumps(tokens))
    assert not said(check(tmp_path / "target", whole, prompts))
    raw = json.loads((whole / "config.json").read_text()) | {"mask_token_id": 40}
    (odd / "config.json").write_text(json.dumps(raw))
    assert said(check(tmp_path / "target", odd, prompts)) == [
        "mask_token_id 40 is an ordinary token of the target's tokenizer, not a special one."
    ]
