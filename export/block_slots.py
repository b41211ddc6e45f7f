"""A draft block's attention over its context and itself, in two forms: standard operators, or one of engines/kernels.

Knows: which row of [context, blocks] lies in which slot of a request. Refuses to know: where the rows come from, precision.
Legend: F packed context rows, R requests, Q slots a request (its context rows, then its block), B slots of a block, C draft
cache positions, d hidden size, H / H_kv heads, D head size.

Both forms: attended(w, context [F, d], h [R * B, d] (normed), layer) -> [R * B, H * D]; the layer's caches are declared and
written. The context's rows are the same in every layer: only keys and values are made of them.
"""

from __future__ import annotations

from training.decoder_config import DecoderConfig

from .decoder import Weights, attention, cache_write, group_mask, head_rows, rms_norm, rope_tables
from .graph import Graph
from .packed_slots import PackedSlots
from .slots import bare_norm
from .target import slice_cache


class BlockSlots:
    """Standard operators. static_cache as in build_target."""

    def __init__(
        self, g: Graph, c: DecoderConfig, B: int, max_context: int, position_ids: str, write_index: str, pad_index: str, mask: str,
        static_cache: int | None,
    ):  # fmt: skip
        self.graph, self.config, self.B, self.static_cache = g, c, B, static_cache
        self.shape = shape = c.layer(0)  # all layers are alike
        KV = shape.num_key_value_heads
        self.block_position_ids = g.input("block_position_ids", "int64", ("R", B))
        self.position_ids, self.write_index, self.mask = position_ids, write_index, mask
        self.cos, self.sin, _ = rope_tables(g, shape.rope, shape.head_dim, max_context)
        self.kinds = ("k_proj", "v_proj") if shape.own_values else ("k_proj",)  # else values are keys before norm and rotation
        total = len(self.kinds) * KV
        self.k_rows, self.v_rows = (head_rows(g, pad_index, KV, first, total) for first in (0, total - KV))  # [R, H_kv, Q]
        self.groups = group_mask(g, shape, mask)

    def attended(self, w: Weights, context: str, h: str, i: int) -> str:
        g, c, shape, B, attn = self.graph, self.config, self.shape, self.B, f"layers.{i}.self_attn"
        H, D = shape.num_attention_heads, shape.head_dim
        rows = g.op("Concat", context, h, axis=0)  # [F + R * B, d]
        kv = g.reshape(w.linear(rows, *(f"{attn}.{kind}" for kind in self.kinds)), -1, D)
        q = g.reshape(w.linear(h, f"{attn}.q_proj"), -1, B, H, D)
        k, v = g.op("Gather", kv, self.k_rows), g.op("Gather", kv, self.v_rows)
        q = g.op("Transpose", q, perm=[0, 2, 1, 3])  # [R, H, B, D]
        if c.qk_norm:
            q, k = rms_norm(w, q, f"{attn}.q_norm", c.rms_norm_eps), rms_norm(w, k, f"{attn}.k_norm", c.rms_norm_eps)
        if c.gemma4:
            v = bare_norm(g, v, D, c.rms_norm_eps)
        q = g.op("RotaryEmbedding", q, self.cos, self.sin, self.block_position_ids)
        k = g.op("RotaryEmbedding", k, self.cos, self.sin, self.position_ids)
        k, v = cache_write(g, shape, i, k, v, self.write_index)
        if self.static_cache is not None:
            k, v = (slice_cache(g, cache, self.mask) for cache in (k, v))
        o = g.reshape(attention(g, shape, q, k, v, self.groups), 0, H, B, D)
        return g.reshape(g.op("Transpose", o, perm=[0, 2, 1, 3]), -1, H * D)


class PackedBlocks:
    """engines/kernels' operator. The context's rows have queries here, which nobody asks for: one product instead of two."""

    def __init__(self, g: Graph, c: DecoderConfig, B: int, max_context: int, *places: str):
        self.graph, self.packed = g, PackedSlots(g, c, max_context, *places, block=B)

    def attended(self, w: Weights, context: str, h: str, i: int) -> str:
        rows = self.graph.op("Concat", context, h, axis=0)
        return self.packed.attend(w, w.linear(rows, *(f"layers.{i}.self_attn.{x}_proj" for x in "qkv")), i)
