"""The optimiser of a run: AdamW, or Muon for the matrices between hidden states and AdamW for the rest.

Knows: which parameters each takes, one state for both. Refuses to know: learning-rate schedules, gradients, files.

Muon (torch.optim.Muon: momentum, orthogonalised by Newton-Schulz) is scaled so that its updates have AdamW's size
("match_rms_adamw"): one learning rate serves both. Vocabulary-wide matrices (lm_head, Markov), norms and biases stay
with AdamW.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

OPTIMISERS = ("adamw", "muon")
ADAM_BETAS = (0.9, 0.95)
HIDDEN = ("layers.", "fc.", "eh_proj.")  # names of the matrices that map hidden states to hidden states begin so


class Optimiser:
    """Steps `parameters`, which are draft's. The state names a parameter by its place among them, as torch's do."""

    def __init__(self, kind: str, draft: nn.Module, parameters: Sequence[nn.Parameter], lr: float):
        names = {id(p): name for name, p in draft.named_parameters()}
        inner = [kind == "muon" and p.dim() == 2 and names[id(p)].startswith(HIDDEN) for p in parameters]
        mine = lambda muon: [i for i, own in enumerate(inner) if own == muon]
        adamw = lambda group: torch.optim.AdamW(group, lr, ADAM_BETAS, weight_decay=0.0, fused=True)
        muon = lambda group: torch.optim.Muon(group, lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        parts = [(mine(False), adamw), (mine(True), muon)]
        self.parts = [(places, make([parameters[i] for i in places])) for places, make in parts if places]

    @property
    def param_groups(self) -> list[dict]:
        return [group for _, part in self.parts for group in part.param_groups]

    def step(self) -> None:
        for _, part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for _, part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        """{"state": {place: what is kept of that parameter}, "param_groups": a group each, `params` its places}."""
        state, groups = {}, []
        for places, part in self.parts:
            kept = part.state_dict()
            state |= {places[i]: kept["state"][i] for i in sorted(kept["state"])}
            groups += [{**group, "params": [places[i] for i in group["params"]]} for group in kept["param_groups"]]
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state: dict) -> None:
        for (places, part), group in zip(self.parts, state["param_groups"], strict=True):
            at = {place: i for i, place in enumerate(places)}
            own = {at[place]: kept for place, kept in state["state"].items() if place in at}
            part.load_state_dict({"state": own, "param_groups": [{**group, "params": [at[p] for p in group["params"]]}]})
