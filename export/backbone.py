"""The draft backbone's graph: new context features are projected and injected into the draft's caches, and the block
[anchor, mask x (B-1)] attends them and itself (paper section 3.1); what comes out of its last G slots drafts.

Knows: DraftModel.backbone with caches, as docs/structures.md packs it. Refuses to know: sampling, precision, backends.
Legend: F packed feature rows, R requests, Q slots written a request (its context rows, then its block), C draft cache
positions, G tokens drafted, B slots of a block (G or G + 1), V_d draft vocabulary, d hidden size.
"""

from __future__ import annotations

import numpy as np

from training.draft import DraftModel

from .block_slots import BlockSlots, PackedBlocks
from .decoder import Weights, rms_norm
from .graph import Graph
from .layers import embedded, finish, head
from .packed_slots import PackedSlots
from .target import fix_cache_length


def build_backbone(
    model: DraftModel, max_context: int, *, static_cache: int | None = None, native: bool = False
) -> Graph:
    """The graph of docs/structures.md, "backbone". static_cache, native: as in build_target; a native graph has no
    block_position_ids."""
    c, g = model.config.decoder, Graph("backbone")
    w = Weights(g, model.state_dict())
    G, B = model.config.block_size, model.config.block_slots
    d = c.hidden_size
    features = g.input("features", "float32", ("F", len(model.config.target_layer_ids) * d))
    anchor_ids = g.input("anchor_ids", "int64", ("R",))
    pad_index = g.input("pad_index", "int64", ("R", "Q"))
    position_ids = g.input("position_ids", "int64", ("R", "Q"))
    write_index = g.input("write_index", "int64", ("R",))
    mask = g.input("mask", "float32", ("R", 1, B, "C"))
    places = (position_ids, write_index, pad_index, mask)
    if native and PackedSlots.fits(c):
        form = PackedBlocks(g, c, B, max_context, *places)
    else:
        form = BlockSlots(g, c, B, max_context, *places, static_cache)

    context = rms_norm(w, w.linear(features, "fc", int8="block"), "hidden_norm", c.rms_norm_eps)  # [F, d]
    is_anchor = g.const((np.arange(B) == 0)[None, :], "bool")
    ids = g.op("Where", is_anchor, g.op("Unsqueeze", anchor_ids, g.const([1])), g.const(model.config.mask_token_id))
    x = g.reshape(embedded(w, c, ids), -1, d)  # [R * B, d]
    for i in range(c.num_hidden_layers):
        h = rms_norm(w, x, f"layers.{i}.input_layernorm", c.rms_norm_eps)
        x = finish(w, c, f"layers.{i}", x, form.attended(w, context, h, i))
    last = rms_norm(w, x, "norm", c.rms_norm_eps)
    hidden = g.reshape(last, -1, B, d, out="hidden" if B == G else 1)
    if B > G:  # the anchor's slot drafts nothing
        hidden = g.op("Slice", hidden, g.const([B - G]), g.const([B]), g.const([1]), out="hidden")
    head(w, c, hidden, "base_logits")
    g.output("hidden", "float32", ("R", G, d))
    g.output("base_logits", "float32", ("R", G, model.config.vocab_out))
    if static_cache is not None:
        fix_cache_length(g, static_cache)
    g.prune()
    return g
