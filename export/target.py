"""The target engine's graph: packed tokens in, logits and context features out, caches updated in place.

Knows: TargetModel's forward in the packed form of docs/structures.md. Refuses to know: drafts, precision, backends.
Legend: N packed tokens, R requests, Q padded slots a request, C cache positions, M rows with logits, V vocabulary,
d hidden size, H / H_kv heads, D head size, L feature layers.
"""

from __future__ import annotations

import numpy as np

from training.target import TargetModel

from .decoder import Weights, attention, cache_write, group_mask, head_rows, mlp, rms_norm, rope_tables
from .graph import Graph

# int8 form of QKV, o_proj and down_proj: a few of their input channels are huge, and one 8-bit step a row would be too coarse.
OUTLIERS = "block"


def build_target(model: TargetModel, max_context: int, *, static_cache: int | None = None) -> Graph:
    """The graph of docs/structures.md, "target". `model` gives the weights and the feature layer ids.

    static_cache: TensorRT's form, whose caches have this fixed length and are sliced to the mask's C positions before
    attention. None: the caches' length is the mask's C (ONNX Runtime, where the slice would copy the cache).
    """
    c, g = model.config, Graph("target")
    w = Weights(g, model.state_dict())
    H, KV, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    token_ids = g.input("token_ids", "int64", ("N",))
    pad_index = g.input("pad_index", "int64", ("R", "Q"))
    pack_index = g.input("pack_index", "int64", ("N",))
    position_ids = g.input("position_ids", "int64", ("R", "Q"))
    write_index = g.input("write_index", "int64", ("R",))
    mask = g.input("mask", "float32", ("R", 1, "Q", "C"))
    logit_rows = g.input("logit_rows", "int64", ("M",))
    cos, sin = rope_tables(g, c.rope, D, max_context)
    qk_rows = head_rows(g, pad_index, H + KV, 0, H + 2 * KV)  # [R, H + H_kv, Q]
    v_rows = head_rows(g, pad_index, KV, H + KV, H + 2 * KV)  # [R, H_kv, Q]
    out_rows = packed_head_rows(g, pad_index, pack_index, H)  # [N, H]
    groups = group_mask(g, c, mask)

    x = g.op("Gather", w.plain("embed_tokens.weight"), token_ids)
    features = {-1: x}
    for i in range(c.num_hidden_layers):
        layer = f"layers.{i}"
        h = rms_norm(w, x, f"{layer}.input_layernorm", c.rms_norm_eps)
        qkv = w.linear(h, *(f"{layer}.self_attn.{p}_proj" for p in "qkv"), int8=OUTLIERS)
        heads = g.reshape(qkv, -1, D)  # [N * (H + 2 H_kv), D]
        qk, v = g.op("Gather", heads, qk_rows), g.op("Gather", heads, v_rows)
        if c.qk_norm:
            qk = qk_norm(w, qk, f"{layer}.self_attn", H, KV, c.rms_norm_eps)
        qk = g.op("RotaryEmbedding", qk, cos, sin, position_ids)
        q, k = g.op("Split", qk, g.const([H, KV]), out=2, axis=1)
        k, v = cache_write(g, c, i, k, v, write_index)
        if static_cache is not None:
            k, v = (slice_cache(g, cache, mask) for cache in (k, v))
        o = g.reshape(attention(g, c, q, k, v, groups), -1, D)  # [R * H * Q, D]
        o = g.reshape(g.op("Gather", o, out_rows), -1, H * D)  # [N, H * D]
        x = g.op("Add", x, w.linear(o, f"{layer}.self_attn.o_proj", int8=OUTLIERS))
        h = rms_norm(w, x, f"{layer}.post_attention_layernorm", c.rms_norm_eps)
        x = g.op("Add", x, mlp(w, h, f"{layer}.mlp", down_int8=OUTLIERS))
        features[i] = x
    last = rms_norm(w, g.op("Gather", x, logit_rows), "norm", c.rms_norm_eps)
    w.linear(last, "lm_head", out="logits")
    g.op("Concat", *(features[i] for i in model.layer_ids), out="features", axis=-1)
    g.output("logits", "float32", ("M", c.vocab_size))
    g.output("features", "float32", ("N", len(model.layer_ids) * c.hidden_size))
    if static_cache is not None:
        fix_cache_length(g, static_cache)
    g.prune()
    return g


def packed_head_rows(g: Graph, pad_index: str, pack_index: str, heads: int) -> str:
    """Index [N, H] into the [R * H * Q, D] view of [R, H, Q, D]: packed row n = r * Q + j takes (r, h, j)."""
    Q = g.op("Shape", pad_index, start=1, end=2)
    request, slot = g.op("Div", pack_index, Q), g.op("Mod", pack_index, Q)
    first = g.op("Add", g.op("Mul", request, g.op("Mul", Q, g.const([heads]))), slot)  # (r, head 0, j)
    head_offsets = g.op("Mul", g.const(np.arange(heads)[None, :]), Q)
    return g.op("Add", g.op("Unsqueeze", first, g.const([1])), head_offsets)


def qk_norm(w: Weights, qk: str, layer: str, heads: int, kv_heads: int, eps: float) -> str:
    """Qwen3's per-head norms on the joint qk [R, H + H_kv, Q, D]: one norm, then each head's own scale."""
    g = w.graph
    names = (f"{layer}.q_norm.weight", f"{layer}.k_norm.weight")
    q, k = (w.array(name) for name in names)
    scale = np.concatenate([np.tile(q, (heads, 1)), np.tile(k, (kv_heads, 1))])[:, None, :]
    normed = g.op("RMSNormalization", qk, g.const(np.ones(q.shape[0]), "float32"), axis=-1, epsilon=eps)
    return g.op("Mul", normed, g.weight(f"{layer}.qk_norm", scale, names))


def slice_cache(g: Graph, cache: str, mask: str) -> str:
    """The cache's first C positions, C from the mask."""
    return g.op("Slice", cache, g.const([0]), g.op("Shape", mask, start=3, end=4), g.const([2]))


def fix_cache_length(g: Graph, length: int) -> None:
    """Replaces the symbol C of the caches (not of the mask) by a number."""
    is_cache = lambda name: name.startswith(("past_key_values.", "present."))
    fixed = lambda s: type(s)(s.name, s.dtype, tuple(length if n == "C" else n for n in s.shape)) if is_cache(s.name) else s
    g.inputs, g.outputs = [fixed(s) for s in g.inputs], [fixed(s) for s in g.outputs]
