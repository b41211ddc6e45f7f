"""The draft backbone's graph: new context features are projected and injected into the draft's caches, and the block
[anchor, mask x (B-1)] attends them and itself (paper section 3.1); what comes out of its last G slots drafts.

Knows: DraftModel.backbone with caches, as docs/structures.md packs it. Refuses to know: sampling, precision, backends.
Legend: F packed feature rows, R requests, Q slots written a request (its context rows, then its block), C draft cache
positions, G tokens drafted, B slots of a block (G or G + 1), V_d draft vocabulary, d hidden size.
"""

from __future__ import annotations

import numpy as np

from training.draft import DraftModel

from .decoder import Weights, attention, cache_write, group_mask, head_rows, rms_norm, rope_tables
from .graph import Graph
from .layers import embedded, finish, head
from .slots import bare_norm
from .target import fix_cache_length, slice_cache


def build_backbone(model: DraftModel, max_context: int, *, static_cache: int | None = None) -> Graph:
    """The graph of docs/structures.md, "backbone". static_cache as in build_target."""
    c, g = model.config.decoder, Graph("backbone")
    w = Weights(g, model.state_dict())
    G, B = model.config.block_size, model.config.block_slots
    d, shape = c.hidden_size, c.layer(0)  # all layers are alike
    H, KV, D = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
    features = g.input("features", "float32", ("F", len(model.config.target_layer_ids) * d))
    anchor_ids = g.input("anchor_ids", "int64", ("R",))
    pad_index = g.input("pad_index", "int64", ("R", "Q"))
    position_ids = g.input("position_ids", "int64", ("R", "Q"))
    block_position_ids = g.input("block_position_ids", "int64", ("R", B))
    write_index = g.input("write_index", "int64", ("R",))
    mask = g.input("mask", "float32", ("R", 1, B, "C"))
    cos, sin, _ = rope_tables(g, shape.rope, D, max_context)
    kinds = ("k_proj", "v_proj") if shape.own_values else ("k_proj",)  # else values are keys before norm and rotation
    total = len(kinds) * KV
    k_rows, v_rows = (head_rows(g, pad_index, KV, first, total) for first in (0, total - KV))  # [R, H_kv, Q]
    groups = group_mask(g, shape, mask)

    context = rms_norm(w, w.linear(features, "fc", int8="block"), "hidden_norm", c.rms_norm_eps)  # [F, d]
    is_anchor = g.const((np.arange(B) == 0)[None, :], "bool")
    ids = g.op("Where", is_anchor, g.op("Unsqueeze", anchor_ids, g.const([1])), g.const(model.config.mask_token_id))
    x = g.reshape(embedded(w, c, ids), -1, d)  # [R * B, d]
    for i in range(c.num_hidden_layers):
        layer, attn = f"layers.{i}", f"layers.{i}.self_attn"
        h = rms_norm(w, x, f"{layer}.input_layernorm", c.rms_norm_eps)
        rows = g.op("Concat", context, h, axis=0)  # [F + R * B, d]
        kv = g.reshape(w.linear(rows, *(f"{attn}.{kind}" for kind in kinds)), -1, D)
        q = g.reshape(w.linear(h, f"{attn}.q_proj"), -1, B, H, D)
        k, v = g.op("Gather", kv, k_rows), g.op("Gather", kv, v_rows)
        q = g.op("Transpose", q, perm=[0, 2, 1, 3])  # [R, H, B, D]
        if c.qk_norm:
            q, k = rms_norm(w, q, f"{attn}.q_norm", c.rms_norm_eps), rms_norm(w, k, f"{attn}.k_norm", c.rms_norm_eps)
        if c.gemma4:
            v = bare_norm(g, v, D, c.rms_norm_eps)
        q = g.op("RotaryEmbedding", q, cos, sin, block_position_ids)
        k = g.op("RotaryEmbedding", k, cos, sin, position_ids)
        k, v = cache_write(g, shape, i, k, v, write_index)
        if static_cache is not None:
            k, v = (slice_cache(g, cache, mask) for cache in (k, v))
        o = g.reshape(attention(g, shape, q, k, v, groups), 0, H, B, D)
        o = g.op("Transpose", o, perm=[0, 2, 1, 3])
        x = finish(w, c, layer, x, g.reshape(o, -1, H * D))
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
