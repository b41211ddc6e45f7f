"""The loop's drafts are the draft module's own, whether or not the anchor's slot drafts: every block of a decode against
PyTorch over the same text."""

import numpy as np
import pytest
import torch

import engines
from decoding.loop import Loop
from decoding.schedule import Fixed
from tests.bundles import exported
from tests.decoding.drive import drive, prompts, requests, tokens
from tests.tiny import make_draft, make_target
from training.checkpoint import load_draft
from training.target import PackedBatch, TargetModel


@pytest.mark.parametrize("rank, from_anchor", [(0, True), (0, False), (16, False)])
def test_every_block_is_pytorchs(tmp_path, monkeypatch, rank, from_anchor):
    target = make_target(tmp_path / "target")
    folder = make_draft(
        tmp_path / "draft", target, rank=rank, confidence=None, sample_from_anchor=from_anchor, layers=2
    )
    draft = load_draft(folder, target)
    model = TargetModel.from_pretrained(target, draft.config.target_layer_ids)
    loaded = engines.load(exported(target, folder, tmp_path / "bundle"), threads=1)
    blocks, markov = [], loaded.markov

    def spied(batch):
        result = markov(batch)
        blocks.append(result.draft_tokens.copy())  # a view until the next call
        return result

    monkeypatch.setattr(loaded, "markov", spied)
    for prompt in prompts(3, low=3, high=20):
        blocks.clear()
        loop = Loop(loaded, Fixed(), max_requests=1)
        outputs = drive(loop, requests([prompt], max_tokens=24))
        text = torch.tensor([*prompt, *tokens(outputs)[0]])
        features = model(PackedBatch.build([text.tolist()], [0], len(text)), torch.zeros(0, dtype=torch.int64)).features
        new = [len(o.token_ids) for o in outputs[0]]
        at = torch.tensor(len(prompt) - 1 + np.cumsum(new[:-1]))  # each round's anchor, the newest token
        hidden = draft.backbone(features[None], text[at][None], at[None])[0]
        want = draft.sample_block(hidden, text[at], torch.zeros(len(at)), torch.zeros(len(at), 4)).tokens
        assert len(blocks) == len(at) > 10
        np.testing.assert_array_equal(np.concatenate(blocks), want)
