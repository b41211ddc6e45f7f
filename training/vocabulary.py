"""A trained head's draft vocabulary made larger: tokens that it could not draft, with rows made from the target's.

Knows: where the rows of lm_head and of the Markov head come from, how they lie among the old ones. Refuses to know:
which tokens are worth it (data.py counts), how a new head begins (initialisation.py), files, training.

Legend: V / V_d target / draft vocabulary, N added tokens, d hidden size, r Markov rank.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from training.autoregressive import ArConfig, ArDraft
from training.checkpoint import draft_module
from training.draft import DraftConfig, DraftModel
from training.target import TargetModel


def check_room(config: DraftConfig | ArConfig, count: int) -> None:
    """Raises ValueError, one sentence, when the target does not have `count` tokens beside the head's."""
    V, left = config.decoder.vocab_size, config.decoder.vocab_size - config.vocab_out
    if count and not left:
        raise ValueError(f"draft_vocab_add is {count}; the head drafts from all {V} tokens already, so it must be 0.")
    if not 0 <= count <= left:
        raise ValueError(
            f"draft_vocab_add is {count}; it must lie in 0..{left}, what the target has beside the head's "
            f"{config.vocab_out} tokens."
        )


def extended(draft: DraftModel | ArDraft, target: TargetModel, added: Tensor) -> DraftModel | ArDraft:
    """The head (in eval mode, without gradients, as load_draft gives it) with the target ids `added` [N] int64 in its
    vocabulary, which stays sorted. Every old row is what it was, so are the logits of the old tokens; the Markov head
    has no say in the new ones yet (rows of markov_w2 are 0, as at a head's beginning). Raises ValueError for a token
    that is there already."""
    old = draft.draft_to_target()
    ids, order = torch.cat([old, added]).sort()
    if bool((ids[1:] == ids[:-1]).any()):
        raise ValueError("the tokens to add must differ, and none of them may be in the draft vocabulary already.")
    V = draft.config.decoder.vocab_size
    wide = draft_module(replace(draft.config, draft_vocab_size=len(ids) if len(ids) < V else None))
    state = {name: tensor for name, tensor in draft.state_dict().items() if name != "d2t"}
    for name, rows in (
        ("lm_head.weight", new_rows(draft.lm_head.weight, target.lm_head.weight.float(), old, added)),
        ("markov_head.markov_w2.weight", torch.zeros(len(added), draft.config.markov_rank)),
    ):
        if name in state:
            state[name] = torch.cat([state[name], rows])[order]
    if len(ids) < V:
        state["d2t"] = ids - torch.arange(len(ids))
    wide.load_state_dict(state)
    return wide.eval().requires_grad_(False)


def new_rows(head: Tensor, target: Tensor, old: Tensor, added: Tensor) -> Tensor:
    """lm_head's rows [N, d] of the tokens `added`; head [V_d, d] are those of the tokens `old`, target [V, d].

    A new head's rows are the target's without their mean (initialisation.py). Training then moves all of them in
    common: the mean, and a linear map that the old rows tell of (least squares, drawn towards "not at all" where they
    say nothing). The new ones go the same way. The target's rows as they are would be drafted nearly everywhere.
    """
    mean = target[old].mean(0)
    known, moved = (target[old] - mean).double(), (head - head.mean(0)).double()
    gram = known.t() @ known
    gram.diagonal().add_(1e-6 * gram.diagonal().mean() + 1e-12)
    change = torch.linalg.solve(gram, known.t() @ (moved - known))
    rows = (target[added] - mean).double()
    return (rows + rows @ change).float() + head.mean(0)
