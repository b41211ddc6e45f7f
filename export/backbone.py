"""The draft backbone's graph: new context features are projected and injected into the draft's caches, and the block
[anchor, mask x (G-1)] attends them and itself (paper section 3.1).

Knows: DraftModel.backbone with caches, as docs/structures.md packs it. Refuses to know: sampling, precision, backends.
Legend: F packed feature rows, R requests, Q slots written a request (its context rows, then its block), C draft cache
positions, G block size, V_d draft vocabulary, d hidden size.
"""

from __future__ import annotations

import numpy as np

from training.draft import DraftModel

from .decoder import Weights, attention, cache_write, group_mask, head_rows, mlp, rms_norm, rope_tables
from .graph import Graph
from .target import fix_cache_length, slice_cache


def build_backbone(model: DraftModel, max_context: int, *, static_cache: int | None = None) -> Graph:
    """The graph of docs/structures.md, "backbone". static_cache as in build_target."""
    c, g = model.config.decoder, Graph("backbone")
    w = Weights(g, model.state_dict())
    G, d, H, KV, D = model.config.block_size, c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
    features = g.input("features", "float32", ("F", len(model.config.target_layer_ids) * d))
    anchor_ids = g.input("anchor_ids", "int64", ("R",))
    pad_index = g.input("pad_index", "int64", ("R", "Q"))
    position_ids = g.input("position_ids", "int64", ("R", "Q"))
    block_position_ids = g.input("block_position_ids", "int64", ("R", G))
    write_index = g.input("write_index", "int64", ("R",))
    mask = g.input("mask", "float32", ("R", 1, G, "C"))
    cos, sin, _ = rope_tables(g, c.rope, D, max_context)
    k_rows, v_rows = (head_rows(g, pad_index, KV, first, 2 * KV) for first in (0, KV))  # [R, H_kv, Q]
    groups = group_mask(g, c, mask)

    context = rms_norm(w, w.linear(features, "fc", int8="block"), "hidden_norm", c.rms_norm_eps)  # [F, d]
    is_anchor = g.const((np.arange(G) == 0)[None, :], "bool")
    ids = g.op("Where", is_anchor, g.op("Unsqueeze", anchor_ids, g.const([1])), g.const(model.config.mask_token_id))
    x = g.reshape(g.op("Gather", w.plain("embed_tokens.weight"), ids), -1, d)  # [R * G, d]
    for i in range(c.num_hidden_layers):
        layer, attn = f"layers.{i}", f"layers.{i}.self_attn"
        h = rms_norm(w, x, f"{layer}.input_layernorm", c.rms_norm_eps)
        rows = g.op("Concat", context, h, axis=0)  # [F + R * G, d]
        kv = g.reshape(w.linear(rows, f"{attn}.k_proj", f"{attn}.v_proj"), -1, D)
        q = g.reshape(w.linear(h, f"{attn}.q_proj"), -1, G, H, D)
        k, v = g.op("Gather", kv, k_rows), g.op("Gather", kv, v_rows)
        q = g.op("Transpose", q, perm=[0, 2, 1, 3])  # [R, H, G, D]
        if c.qk_norm:
            q, k = rms_norm(w, q, f"{attn}.q_norm", c.rms_norm_eps), rms_norm(w, k, f"{attn}.k_norm", c.rms_norm_eps)
        q = g.op("RotaryEmbedding", q, cos, sin, block_position_ids)
        k = g.op("RotaryEmbedding", k, cos, sin, position_ids)
        k, v = cache_write(g, c, i, k, v, write_index)
        if static_cache is not None:
            k, v = (slice_cache(g, cache, mask) for cache in (k, v))
        o = g.reshape(attention(g, c, q, k, v, groups), 0, H, G, D)
        o = g.op("Transpose", o, perm=[0, 2, 1, 3])
        x = g.op("Add", x, w.linear(g.reshape(o, -1, H * D), f"{attn}.o_proj"))
        x = g.op("Add", x, mlp(w, rms_norm(w, x, f"{layer}.post_attention_layernorm", c.rms_norm_eps), f"{layer}.mlp"))
    last = rms_norm(w, x, "norm", c.rms_norm_eps)
    w.linear(g.reshape(last, -1, G, d, out="hidden"), "lm_head", out="base_logits")
    g.output("hidden", "float32", ("R", G, d))
    g.output("base_logits", "float32", ("R", G, model.config.vocab_out))
    if static_cache is not None:
        fix_cache_length(g, static_cache)
    g.prune()
    return g
