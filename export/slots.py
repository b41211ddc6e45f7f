"""From packed rows to attention's slots and back: the target graph's attention, in two forms.

Knows: which head of which packed row goes where; the index tensors, computed once a pass and used by every layer. Refuses
to know: caches, precision. Legend: N packed tokens, R requests, Q padded slots a request, H query heads,
H_kv key-value heads, D head size, G query heads that share a key-value head.

Both forms: spread(w, qkv [N, (H + 2 H_kv) * D], layer) -> rotated q in the form's own layout, rotated k and v
[R, H_kv, Q, D]; attend(q, k, v), k and v the caches [R, H_kv, C, D] -> [N, H * D].
"""

from __future__ import annotations

import numpy as np

from training.decoder_config import DecoderConfig, LayerShape

from .decoder import ROPE_SLACK, Weights, attention, group_mask, head_rows, rms_norm, rope_tables, within
from .graph import Graph

ROPE_BYTES = 64 << 20  # the grouped form's rope tables may take this much


def fits_grouped(c: DecoderConfig, max_context: int) -> bool:
    """Whether a model may take GroupedSlots: no norm of q and k per head, and rope tables of a decent size."""
    rows = (group_size(c) + 3) * (max_context + ROPE_SLACK)
    return not c.qk_norm and rows * c.head_dim * 4 <= ROPE_BYTES


def group_size(c: DecoderConfig) -> int:
    """Query slots a key-value head: at least 2, for the reason given in decoder.attention."""
    return max(c.num_attention_heads // c.num_key_value_heads, 2)


class GroupedSlots:
    """One Gather, one RotaryEmbedding, one Split: the query heads of a group, then its key, then its value, side by side
    as slots of one head [R, H_kv, (G + 2) * Q, D]. The value's slots are positioned at a row of the rope tables that
    turns nothing (x * 1 - y * 0), the queries' at rows that scale by 1 / sqrt(D) as well. ONNX Runtime's form, where
    fits_grouped; its RotaryEmbedding wants tables that are no shorter than its (G + 2) * Q slots, so they are padded."""

    def __init__(
        self, g: Graph, c: DecoderConfig, max_context: int, pad_index: str, pack_index: str, position_ids: str, mask: str
    ):
        self.graph, self.config = g, c
        H, KV, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        queries = np.arange(H).reshape(KV, -1)
        G = group_size(c)
        if H == KV:
            queries = np.tile(queries, G)
        kv = np.arange(KV)[:, None]
        heads = np.concatenate([queries, H + kv, H + KV + kv], axis=1)  # [H_kv, G + 2]
        rows = g.op("Mul", g.op("Unsqueeze", pad_index, g.const([1, 2])), g.const(H + 2 * KV))
        rows = g.op("Add", rows, g.const(heads[None, :, :, None]))
        self.rows = g.reshape(rows, 0, KV, -1)
        spare = (G + 1) * (max_context + ROPE_SLACK)
        tables = rope_tables(g, c.rope, D, max_context, unturned=spare, scale=float(D) ** -0.5)
        self.cos, self.sin, unturned = tables
        still = g.op("Add", g.op("Mul", position_ids, g.const(0)), g.const(unturned))
        scaled = g.op("Add", position_ids, g.const(unturned + spare))
        self.positions = g.op("Concat", *[scaled] * G, position_ids, still, axis=1)
        Q = g.op("Shape", pad_index, start=1, end=2)
        self.sizes = g.op("Mul", Q, g.const([G, 1, 1]))
        self.groups = group_mask(g, c, mask)
        self.packed = self._packed(pack_index, Q)

    def _packed(self, pack_index: str, Q: str) -> str:
        """Index [N, H, 3] into [R, H_kv, G * Q, D]: packed row n = r * Q + j, head h takes (r, h // G, h % G * Q + j)."""
        g, c = self.graph, self.config
        h = np.arange(c.num_attention_heads)
        G = len(h) // c.num_key_value_heads
        column = lambda x: g.op("Unsqueeze", x, g.const([1, 2]))  # [N, 1, 1]
        row = lambda values: g.const(values[None, :, None])  # [1, H, 1]
        request, slot = g.op("Div", pack_index, Q), g.op("Mod", pack_index, Q)
        request = g.op("Add", column(request), row(0 * h))
        head = g.op("Add", g.op("Mul", request, g.const(0)), row(h // G))
        slots = g.op("Add", column(slot), g.op("Mul", row(h % G), Q))
        return g.op("Concat", request, head, slots, axis=2)

    def spread(self, w: Weights, qkv: str, layer: str) -> tuple[str, str, str]:
        g = self.graph
        slots = g.op("Gather", g.reshape(qkv, -1, self.config.head_dim), self.rows)
        turned = g.op("RotaryEmbedding", slots, self.cos, self.sin, self.positions)
        return g.op("Split", turned, self.sizes, out=3, axis=2)

    def attend(self, q: str, k: str, v: str) -> str:
        """q [R, H_kv, G * Q, D], k and v [R, H_kv, C, D] -> [N, H * D]."""
        g, c = self.graph, self.config
        o = g.op("Attention", q, k, v, self.groups, scale=1.0)
        return g.reshape(g.op("GatherND", o, self.packed), -1, c.num_attention_heads * c.head_dim)


class SeparateSlots:
    """q and k together [R, H + H_kv, Q, D], v apart: TensorRT's form, and that of models that do not fit the grouped
    one. One kind of layer, whose shape is that of layer `i`; name: of its rope tables."""

    def __init__(
        self, g: Graph, c: DecoderConfig, max_context: int, pad_index: str, pack_index: str, position_ids: str,
        mask: str, *, i: int = 0, name: str = "rope",
    ):  # fmt: skip
        self.graph, self.config, self.positions, self.shape = g, c, position_ids, (shape := c.layer(i))
        H, KV = shape.num_attention_heads, shape.num_key_value_heads
        total = H + KV + (KV if shape.own_values else 0)  # else values are the keys before norm and rotation
        self.cos, self.sin, _ = rope_tables(g, shape.rope, shape.head_dim, max_context, name=name)
        self.q_rows = head_rows(g, pad_index, H, 0, H)  # [R, H, Q], of a layer that makes queries alone
        self.qk_rows = head_rows(g, pad_index, H + KV, 0, total)  # [R, H + H_kv, Q]
        self.v_rows = head_rows(g, pad_index, KV, total - KV, total)  # [R, H_kv, Q]
        self.packed = packed_head_rows(g, pad_index, pack_index, H)  # [N, H]
        mask = mask if shape.window is None else within(g, mask, position_ids, shape.window)
        self.groups = group_mask(g, shape, mask)

    def spread(self, w: Weights, qkv: str, layer: str) -> tuple[str, str, str]:
        g, c, s = self.graph, self.config, self.shape
        heads = g.reshape(qkv, -1, s.head_dim)  # [N * (H + 2 H_kv), D]
        qk, v = g.op("Gather", heads, self.qk_rows), g.op("Gather", heads, self.v_rows)
        if c.qk_norm:
            qk = qk_norm(w, qk, layer, s, c.rms_norm_eps)
        if c.gemma4:
            v = bare_norm(g, v, s.head_dim, c.rms_norm_eps)
        qk = g.op("RotaryEmbedding", qk, self.cos, self.sin, self.positions)
        q, k = g.op("Split", qk, g.const([s.num_attention_heads, s.num_key_value_heads]), out=2, axis=1)
        return q, k, v

    def queries(self, w: Weights, q: str, layer: str) -> str:
        """q [N, H * D], of a layer that attends another's keys and values -> rotated [R, H, Q, D]."""
        g, c = self.graph, self.config
        q = g.op("Gather", g.reshape(q, -1, self.shape.head_dim), self.q_rows)
        q = rms_norm(w, q, f"{layer}.q_norm", c.rms_norm_eps)
        return g.op("RotaryEmbedding", q, self.cos, self.sin, self.positions)

    def attend(self, q: str, k: str, v: str) -> str:
        """q [R, H, Q, D], k and v [R, H_kv, C, D] -> [N, H * D]."""
        g, s = self.graph, self.shape
        o = g.reshape(attention(g, s, q, k, v, self.groups), -1, s.head_dim)  # [R * H * Q, D]
        return g.reshape(g.op("Gather", o, self.packed), -1, s.num_attention_heads * s.head_dim)


def packed_head_rows(g: Graph, pad_index: str, pack_index: str, heads: int) -> str:
    """Index [N, H] into the [R * H * Q, D] view of [R, H, Q, D]: packed row n = r * Q + j takes (r, h, j)."""
    Q = g.op("Shape", pad_index, start=1, end=2)
    request, slot = g.op("Div", pack_index, Q), g.op("Mod", pack_index, Q)
    first = g.op("Add", g.op("Mul", request, g.op("Mul", Q, g.const([heads]))), slot)  # (r, head 0, j)
    head_offsets = g.op("Mul", g.const(np.arange(heads)[None, :]), Q)
    return g.op("Add", g.op("Unsqueeze", first, g.const([1])), head_offsets)


def qk_norm(w: Weights, qk: str, layer: str, c: LayerShape, eps: float) -> str:
    """The per-head norms of queries and keys on the joint qk [R, H + H_kv, Q, D]: one norm, then each head's scale."""
    g = w.graph
    names = (f"{layer}.q_norm.weight", f"{layer}.k_norm.weight")
    q, k = (np.asarray(w.array(name)) for name in names)
    scale = np.concatenate([np.tile(q, (c.num_attention_heads, 1)), np.tile(k, (c.num_key_value_heads, 1))])[:, None, :]
    return g.op("Mul", bare_norm(g, qk, q.shape[0], eps), g.weight(f"{layer}.qk_norm", scale, names))


def bare_norm(g: Graph, x: str, size: int, eps: float) -> str:
    """x [..., size] / rms(x), without a weight."""
    return g.op("RMSNormalization", x, g.const(np.ones(size), "float32"), axis=-1, epsilon=eps)
