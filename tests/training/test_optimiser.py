"""Which optimiser takes which matrix, and that the two together are what torch's are."""

import torch

from tests.training.answered import SETTINGS, SHAPE
from training.initialisation import new_draft
from training.optimiser import Optimiser


def stepped(draft, optimiser, steps=3):
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for p in draft.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimiser.step()
    return {name: p.detach().clone() for name, p in draft.named_parameters()}


def test_muon_takes_the_matrices_between_hidden_states(target, sequences):
    draft = new_draft(target, sequences, SHAPE, SETTINGS.seed)
    parameters = list(draft.parameters())
    names = [name for name, _ in draft.named_parameters()]
    both, adam = (Optimiser(kind, draft, parameters, 1e-2) for kind in ("muon", "adamw"))
    assert len(adam.parts) == 1 and len(both.parts) == 2
    taken = {names[i] for i in both.parts[1][0]}
    assert "fc.weight" in taken and "layers.0.mlp.down_proj.weight" in taken
    assert not {n for n in names if "norm" in n or "markov" in n or "lm_head" in n or "embed" in n} & taken
    assert sorted(i for places, _ in both.parts for i in places) == list(range(len(parameters)))
    before = {name: p.detach().clone() for name, p in draft.named_parameters()}
    mixed = stepped(draft, both)
    draft.load_state_dict(before, strict=False)
    pure = stepped(draft, adam)
    for name in names:
        assert torch.equal(mixed[name], pure[name]) == (name not in taken), name


def test_a_muon_step_is_orthogonal(target, sequences):
    draft = new_draft(target, sequences, SHAPE, SETTINGS.seed)
    optimiser = Optimiser("muon", draft, list(draft.parameters()), 1e-2)
    before = draft.layers[0].self_attn.q_proj.weight.detach().clone()
    moved = stepped(draft, optimiser, 1)["layers.0.self_attn.q_proj.weight"] - before
    values = torch.linalg.svdvals(moved)
    assert values.min() > 0.3 * values.max()  # AdamW: 0.02


def test_the_state_goes_from_one_to_the_other(target, sequences):
    draft = new_draft(target, sequences, SHAPE, SETTINGS.seed)
    parameters = list(draft.parameters())
    first = Optimiser("muon", draft, parameters, 1e-2)
    stepped(draft, first)
    state = first.state_dict()
    assert sorted(state["state"]) == list(range(len(parameters)))
    assert sorted(p for group in state["param_groups"] for p in group["params"]) == list(range(len(parameters)))
    second = Optimiser("muon", draft, parameters, 1e-2)
    second.load_state_dict(state)
    again = second.state_dict()
    assert all(torch.equal(v, again["state"][i][k]) for i, kept in state["state"].items() for k, v in kept.items())
