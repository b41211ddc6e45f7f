"""An autoregressive draft in the loop: every block is the draft module's own, whatever shares its passes."""

import numpy as np
import pytest
import torch

import engines
from decoding.drafter import Drafter
from decoding.loop import Loop
from decoding.request import Request, SamplingParams
from decoding.schedule import Fixed, NoDraft
from engines.base import PassLimits
from engines.profile import measure
from tests.bundles import exported
from tests.decoding.drive import drive, prompts, requests, tokens
from tests.decoding.test_drafter import Few
from tests.tiny import make_draft, make_target
from training.checkpoint import load_draft
from training.target import PackedBatch, TargetModel

TEXTS = [*prompts(7, low=1, high=30, seed=3), *prompts(1, low=150, high=151)]


class Models:
    """A bundle and the two PyTorch models that it was made of."""

    def __init__(self, folder, **options):
        target = make_target(folder / "target")
        draft = make_draft(folder / "draft", target, **options)
        self.draft = load_draft(draft, target)
        self.target = TargetModel.from_pretrained(target, self.draft.config.target_layer_ids)
        self.engines = engines.load(exported(target, draft, folder / "bundle"), threads=1)

    def blocks(self, text, anchors):
        """[A, G] greedy draft tokens behind the anchors' positions in `text`, over the whole context at once."""
        batch = PackedBatch.build([text], [0], len(text))
        features, ids = self.target(batch, torch.zeros(0, dtype=torch.int64)).features, torch.tensor(text)
        G, found = self.draft.config.block_size, []
        for p in anchors:
            rows = self.draft.rows(features[None, :p], ids[None, 1 : p + 1])
            bias, zero = torch.zeros(1, p), torch.zeros(1)
            block = self.draft.sample_block(
                rows.hidden[:, -1], torch.tensor([p]), rows.caches, bias, zero, torch.zeros(1, G)
            )
            found.append(block.tokens[0])
        return torch.stack(found).numpy()


@pytest.fixture(scope="module", params=["eagle3", "mtp"])
def models(request, tmp_path_factory):
    """eagle3 with one layer and a trimmed vocabulary, mtp with two layers."""
    options = dict(draft_vocab=40) if request.param == "eagle3" else dict(layers=2)
    return Models(tmp_path_factory.mktemp(request.param), kind=request.param, **options)


def mixed():
    """Requests that leave at different times; one decodes without drafts."""
    return [
        Request(i, tuple(text), SamplingParams(8 + 5 * (i % 3), speculative=i != 4, ignore_eos=True))
        for i, text in enumerate(TEXTS)
    ]


@pytest.mark.parametrize("scheduler", [Fixed, lambda: Few(lambda t: (2, 3, 0, 1)[t % 4])], ids=["all", "probes"])
@pytest.mark.parametrize("max_requests, budget", [(1, 512), (4, 24)])
def test_every_block_is_pytorchs(models, monkeypatch, scheduler, max_requests, budget):
    """Prompts in chunks, rows that are moved, windows of rows, rounds that leave context waiting."""
    drafts, make = [], Drafter.draft

    def spied(self, rows, *others):
        draft = make(self, rows, *others)
        if draft is not None:
            real = [(r, s) for r, s in enumerate(rows) if draft.drafted[r]]
            drafts.extend((s.request.id, len(s.tokens) - 1, draft.tokens(r, self.G)) for r, s in real)
        return draft

    monkeypatch.setattr(Drafter, "draft", spied)
    loop = Loop(models.engines, scheduler(), max_requests=max_requests, token_budget=budget)
    todo = mixed()
    got = tokens(drive(loop, todo[:5], join=lambda step: todo[step + 3 : step + 4] if step >= 2 else []))
    plain = tokens(drive(Loop(models.engines, NoDraft(), max_requests=1), todo))
    assert got == plain
    assert len(drafts) > 20 and {i for i, _, _ in drafts} >= {0, 1, 2, 3, 5, 6} and 4 not in {i for i, _, _ in drafts}
    for request in todo:
        mine = [(at, block) for i, at, block in drafts if i == request.id]
        if mine:
            want = models.blocks([*request.prompt_ids, *got[request.id]], [at for at, _ in mine])
            np.testing.assert_array_equal([block for _, block in mine], want)


@pytest.mark.parametrize("tokens_a_pass, rows_a_pass", [(4, 6), (1, 3), (16, 400)])
def test_the_last_pass_has_a_row_of_each(models, tokens_a_pass, rows_a_pass):
    loop = Loop(models.engines, Fixed(), max_requests=3)
    loop.drafter.limits = PassLimits(3, tokens_a_pass, rows_a_pass, 1000)
    for waiting in ([9, 1, 0], [1, 1, 1], [5, 5, 7], [30, 0, 1]):
        waiting = np.array(waiting)
        shares = np.array(loop.drafter._shares(waiting.copy()))
        assert (shares.sum(axis=0) == waiting).all() and ((shares[-1] > 0) == (waiting > 0)).all()
        assert shares.max() <= tokens_a_pass and shares.sum(axis=1).max() <= rows_a_pass


def test_context_in_pieces_changes_no_block(models):
    todo = requests(TEXTS, max_tokens=12)
    want = drive(Loop(models.engines, Fixed(), max_requests=3), todo)
    loop = Loop(models.engines, Fixed(), max_requests=3)
    loop.drafter.limits = PassLimits(3, 4, 6, 1000)
    got = drive(loop, todo)
    assert loop.metrics.engine_calls["backbone"] > 2 * loop.metrics.engine_calls["markov"]
    assert got == want  # the same statistics too: equal drafts


def test_sampled_text_does_not_depend_on_the_batch(models):
    todo = requests(TEXTS, max_tokens=16, temperature=1.0)
    want = tokens(drive(Loop(models.engines, Fixed(), max_requests=1), todo))
    assert tokens(drive(Loop(models.engines, Fixed(), max_requests=4, token_budget=24), todo)) == want


def test_the_profile_measures_it(models):
    table = measure(models.engines, (1, 2), (32,), quick=True, seconds=0.2)
    assert {row["requests"] for row in table["draft"]} == {1, 2} and all(row["ms"] > 0 for row in table["draft"])
