"""A larger draft vocabulary: old logits keep their bits, new rows are the target's, all else goes on as before."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import make_draft, make_target
from tests.training.answered import SETTINGS, SHAPE, Answered
from training.check import OK, check
from training.checkpoint import load_draft, save_draft
from training.data import coverage, is_held_out, lacking_tokens
from training.evaluate import speculate
from training.initialisation import new_draft
from training.target import TargetModel
from training.train import train
from training.vocabulary import check_room, extended

ADDED = torch.tensor([1, 7, 61])  # make_draft's vocabularies hold the even tokens first
KINDS = [{}, {"head": "gated"}, {"head": "rnn"}, {"rank": 0}, {"kind": "eagle3"}, {"kind": "mtp"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_target(tmp_path_factory.mktemp("target"), vocab=64, layers=3)


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_old_tokens_keep_their_logits_to_the_bit(options, folder, tmp_path):
    old = load_draft(make_draft(tmp_path / "old", folder, draft_vocab=20, **options))
    wide = extended(old, TargetModel.from_pretrained(folder, old.config.target_layer_ids), ADDED)
    ids = wide.draft_to_target()
    assert ids.tolist() == sorted([*range(0, 40, 2), *ADDED.tolist()])
    kept = torch.isin(ids, old.draft_to_target())
    g = torch.Generator().manual_seed(0)
    hidden, previous = torch.randn(5, 4, 32, generator=g), torch.randint(0, 64, (5, 4), generator=g)
    if "kind" in options:
        before, after = old.lm_head(hidden), wide.lm_head(hidden)
    else:
        (before, sure), (after, as_sure) = (x.corrected_logits(hidden, previous) for x in (old, wide))
        assert torch.equal(sure, as_sure)
        assert torch.equal(after[..., ~kept], wide.base_logits(hidden)[..., ~kept])  # no Markov bias there
    assert torch.equal(after[..., kept], before) and after[..., ~kept].std() > 0.1
    state, other = old.state_dict(), wide.state_dict()
    grown = {"lm_head.weight", "markov_head.markov_w2.weight", "d2t"}
    assert state.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in state.items() if k not in grown)


def test_new_rows_are_those_that_a_new_head_would_have(target, sequences):
    """And where training moved all rows in common, the new ones go along."""
    head = new_draft(target, sequences, replace(SHAPE, draft_vocab=40), 1).requires_grad_(False)
    rest = torch.tensor([t for t in range(64) if t not in set(head.draft_to_target().tolist())])
    rows = target.lm_head.weight[rest] - target.lm_head.weight[head.draft_to_target()].mean(0)
    kept = lambda wide: torch.isin(wide.draft_to_target(), rest)
    fresh = extended(head, target, rest)
    torch.testing.assert_close(fresh.lm_head.weight[kept(fresh)], rows, atol=1e-5, rtol=1e-4)
    assert not hasattr(fresh, "d2t") and fresh.config.draft_vocab_size is None  # the target's whole vocabulary
    g = torch.Generator().manual_seed(3)
    turn, shift = torch.eye(32) + 0.2 * torch.randn(32, 32, generator=g), torch.randn(32, generator=g)
    head.lm_head.weight.copy_(head.lm_head.weight @ turn + shift)
    moved = extended(head, target, rest)
    torch.testing.assert_close(moved.lm_head.weight[kept(moved)], rows @ turn + shift, atol=1e-3, rtol=1e-3)


def test_the_most_frequent_tokens_that_lack_are_taken():
    answer = [1, 1, 1, 2, 2, 3, 3, 9, 9, 9, 9]
    answered = [Answered(torch.tensor([5, 5, 5, *answer]).numpy(), 3)]
    ids = torch.tensor([0, 9])
    assert lacking_tokens(answered, ids, 2, 12).tolist() == [1, 2]  # 5: a prompt's; 9: there; of 2 and 3 the smaller
    assert lacking_tokens(answered, ids, 10, 12).tolist() == [1, 2, 3]  # no answer has another
    assert lacking_tokens(answered, torch.arange(12), 10, 12).tolist() == []


def test_a_run_says_what_it_added_and_goes_on_with_it(folder, target, sequences, tmp_path, capsys):
    old = load_draft(make_draft(tmp_path / "old", folder, draft_vocab=30), folder)
    trained = [s for s in sequences if not is_held_out(s)]
    lacking = lacking_tokens(trained, old.draft_to_target(), 9, 64)
    ids = sorted([*old.draft_to_target().tolist(), *lacking.tolist()])
    settings = replace(SETTINGS, steps=4, draft_vocab_add=9)
    begin = lambda out, settings=settings, **more: train(folder, lambda: sequences, out, SHAPE, settings, **more)
    begin(tmp_path / "whole", init=tmp_path / "old")
    before, after = coverage(trained, old.draft_to_target(), 64), coverage(trained, torch.tensor(ids), 64)
    said = capsys.readouterr().out
    assert before < after and "9 tokens added to a draft vocabulary of 30" in said
    assert f"{before:.2%} of the training answers' tokens, now {after:.2%}; " in said
    assert "of the held-out answers'" in said
    head = load_draft(tmp_path / "whole/latest", folder)
    assert head.draft_to_target().tolist() == ids and head.config.vocab_out == 39
    again = begin(tmp_path / "whole", resume=True)  # at its end already: not extended once more
    assert again.progress.step == 4 and again.draft.draft_to_target().tolist() == ids
    assert "added to" not in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"made with another draft_vocab_add; resume with the same\.$"):
        begin(tmp_path / "whole", replace(settings, draft_vocab_add=8), resume=True)
    save_draft(extended(old, target, lacking), tmp_path / "wide")  # the same head as a checkpoint, then no option
    begin(tmp_path / "plain", replace(settings, draft_vocab_add=0), init=tmp_path / "wide")
    one, two = (load_file(tmp_path / name / "latest/model.safetensors") for name in ("whole", "plain"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_a_larger_head_drafts_the_new_tokens_and_is_checked_as_any(folder, tmp_path):
    """speculate() verifies against the target: the text is the target's own; the check command reads the folder."""
    target = TargetModel.from_pretrained(folder, (0, 1))
    old = load_draft(make_draft(tmp_path / "old", folder, draft_vocab=20), folder)
    wide = extended(old, target, ADDED)
    save_draft(wide, tmp_path / "wide")
    back = load_draft(tmp_path / "wide", folder)
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in wide.state_dict().items())
    g = torch.Generator().manual_seed(2)
    hidden, n = torch.randn(200, 4, 32, generator=g), torch.zeros(200)
    drafted = back.sample_block(hidden, torch.randint(0, 64, (200,), generator=g), n, torch.zeros(200, 4)).tokens
    assert set(ADDED.tolist()) <= set(drafted.flatten().tolist())
    prompt = [5, 9, 3]
    assert speculate(target, back, prompt, 12).output_ids == speculate(target, old, prompt, 12).output_ids
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"input_ids": [5, 9, 3 + i]}) + "\n" for i in range(4)))
    report = check(folder, tmp_path / "wide", tmp_path / "prompts.jsonl", limit=4, max_tokens=16)
    assert (OK, "draft vocabulary: 23 of 64 tokens.") in report.findings
    assert json.loads((tmp_path / "wide/config.json").read_text())["draft_vocab_size"] == 23


def test_what_cannot_be_is_one_sentence(folder, target, sequences, tmp_path):
    small = load_draft(make_draft(tmp_path / "small", folder, draft_vocab=20), folder)
    whole = load_draft(make_draft(tmp_path / "all", folder), folder)
    check_room(small.config, 44)
    with pytest.raises(ValueError, match=r"^draft_vocab_add is 45; it must lie in 0\.\.44, .* the head's 20 tokens\.$"):
        check_room(small.config, 45)
    with pytest.raises(ValueError, match=r"^draft_vocab_add is 1; the head drafts from all 64 tokens already, .* 0\.$"):
        check_room(whole.config, 1)
    check_room(whole.config, 0)
    with pytest.raises(ValueError, match=r"^draft_vocab_add is -1; it must be 0 or more\.$"):
        replace(SETTINGS, draft_vocab_add=-1)
    with pytest.raises(ValueError, match="may be in the draft vocabulary already"):
        extended(small, target, torch.tensor([3, 4]))
    begin = lambda **more: train(
        folder, lambda: sequences, tmp_path / "run", SHAPE, replace(SETTINGS, draft_vocab_add=45), **more
    )
    with pytest.raises(ValueError, match=r"^draft_vocab_add is 45 and init names no head; .* is draft_vocab\.$"):
        begin()
    with pytest.raises(ValueError, match=r"it must lie in 0\.\.44"):
        begin(init=tmp_path / "small")
    assert not (tmp_path / "run").exists()
