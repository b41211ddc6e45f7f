"""`check` on autoregressive drafts that know their target, whole and broken."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import make_target
from tests.training.answered import Answered
from training.batch_pass import BatchPass
from training.check import FAILED, OK, WARNING, check, table
from training.checkpoint import save_draft
from training.data import TargetPass, make_batch
from training.evaluate import generate_plain
from training.initialisation import HeadShape, new_draft
from training.loss import EAGLE3
from training.settings import TrainSettings
from training.target import TargetModel

VOCAB, KNOWN, LAYERS, G, NEW, STEPS = 64, 52, 6, 4, 24, 90
KINDS = {"eagle3": (1, 3), "mtp": (LAYERS - 1,)}


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory):
    """Tokens say little and context much: a head that is shown every token must read the features all the same."""
    folder = make_target(tmp_path_factory.mktemp("target"), vocab=VOCAB, layers=LAYERS, seed=3)
    gain = lambda name: 0.5 if "embed_tokens" in name else 2.0 if "o_proj" in name else 1.0
    weights = {name: gain(name) * t for name, t in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


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


@pytest.fixture(scope="module")
def trained(target_folder, answers, tmp_path_factory):
    """kind -> the folder of a head overfitted to the answers, its lm_head as it began."""
    folders = {}
    for kind, ids in KINDS.items():
        target = TargetModel.from_pretrained(target_folder, ids)
        draft = new_draft(target, answers, HeadShape(1, G, draft_vocab=KNOWN, layer_ids=ids, kind=kind), 0)
        draft.lm_head.requires_grad_(False)
        draft.embed_tokens.requires_grad_(False)
        settings = TrainSettings(steps=STEPS, bf16=False, anchor_share=1.0, loss=EAGLE3)
        run = BatchPass(target, draft, TargetPass(target, draft.draft_to_target(), 10**9), settings)
        batch, g = make_batch(answers), torch.Generator().manual_seed(0)
        optimizer = torch.optim.AdamW([p for p in draft.parameters() if p.requires_grad], 1e-2, weight_decay=0.0)
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / STEPS)
            optimizer.zero_grad()
            run(batch, 0, g)[1].total.backward()
            optimizer.step()
        folders[kind] = tmp_path_factory.mktemp(kind)
        save_draft(draft.eval().requires_grad_(False), folders[kind])
    return folders


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


def run(target_folder, draft_folder, prompts):
    return check(target_folder, draft_folder, prompts, limit=8, max_tokens=NEW)


def moved(kind, ids):
    if kind == "mtp":
        return {"target_layer_ids": ids}
    return {"eagle_config": {"eagle_aux_hidden_state_layer_ids": ids}}


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_head_passes(kind, target_folder, trained, prompts):
    report = run(target_folder, trained[kind], prompts)
    said = table(report)
    assert not report.failed and report.repair is None and report.tried[0][1] > 1.2 * report.chance, said
    assert (OK, f"layout {kind}: 1 layers, 4 tokens a round.") in report.findings and "52 of 64 tokens" in said
    assert not any(level == WARNING for level, _ in report.findings), said


OFFSETS = [("eagle3", [2, 4], [1, 3]), ("eagle3", [0, 2], [1, 3]), ("mtp", [4], [5])]


@pytest.mark.parametrize("kind, ids, right", OFFSETS)
def test_a_layer_offset_is_named(kind, ids, right, target_folder, trained, prompts, broken):
    report = run(target_folder, broken(trained[kind], **moved(kind, ids)), prompts)
    step = right[0] - ids[0]
    assert report.repair == f"layer offset {step:+d}: target_layer_ids {right} instead of {ids}", table(report)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_the_other_way_round_are_named(kind, target_folder, trained, prompts, broken):
    """As code would store them that puts the feature first."""

    def turned(weights):
        names = ("eh_proj",) if kind == "mtp" else ("q_proj", "k_proj", "v_proj")
        wide = [n for n in weights if any(f"{name}.weight" in n for name in names)]
        return weights | {n: weights[n].roll(weights[n].shape[1] // 2, 1).contiguous() for n in wide}

    report = run(target_folder, broken(trained[kind], turned), prompts)
    assert report.repair == "inputs the other way round: the feature before the embedding", table(report)


def test_a_missing_vocabulary_map_is_found_in_the_head(target_folder, trained, prompts, broken):
    without = lambda w: {n: t for n, t in w.items() if n not in ("d2t", "t2d")}
    report = run(target_folder, broken(trained["eagle3"], without), prompts)
    missing = "d2t is missing: which 52 of the target's 64 tokens the draft knows is not said."
    assert (FAILED, missing) in report.findings
    assert report.repair and report.repair.startswith("d2t missing or not this draft's: by the rows of lm_head"), table(
        report
    )


def test_a_head_that_was_never_trained_is_near_chance(target_folder, trained, prompts, broken):
    g = torch.Generator().manual_seed(0)
    random = lambda t: torch.randn(t.shape, generator=g) * 0.1 if t.is_floating_point() else t
    report = run(target_folder, broken(trained["eagle3"], lambda w: {n: random(t) for n, t in w.items()}), prompts)
    assert report.failed and report.repair is None and "is near chance" in table(report), table(report)


def test_another_targets_draft_and_other_weights_are_refused(target_folder, trained, prompts, broken, tmp_path):
    other = make_target(tmp_path / "other", vocab=80, layers=4)
    report = check(other, trained["mtp"], prompts)
    assert "its vocab_size is 64, the target's is 80." in table(report) and report.length is None
    cut = lambda w: {n: t for n, t in w.items() if "hidden_norm" not in n}
    with pytest.raises(ValueError, match="does not fit: missing layers.0.hidden_norm.weight."):
        run(target_folder, broken(trained["eagle3"], cut), prompts)
