"""Attention as one operator of engines/kernels: packed rows in, packed rows out, caches written on the way.

Knows: the operators' inputs. Refuses to know: precision, how they compute.
Legend as in slots.py; P positions of the rope tables; F context rows of a draft, B slots of its block.
"""

from __future__ import annotations

import numpy as np

from training.decoder_config import DecoderConfig

from .decoder import Weights, cache_names, rope_tables
from .graph import DSPARK, Graph

ATTENTION = "CachedAttention", "BlockAttention"
LANES, MOST = 16, 512  # what the kernels take: half a head in whole vectors, a normed head in a buffer


class PackedSlots:
    """Of a target: CachedAttention(qkv [N, (H + 2 H_kv) * D], cos and sin [P, D / 2], norms of q and k [D] or [0], position_ids [R, Q],
    write_index [R], pad_index [R, Q], pack_index [N], mask [R, 1, Q, C], past key and value [R, H_kv, C, D])
    -> [N, H * D], present key and value.

    Of a draft (block = B): BlockAttention, the same without pack_index, with qkv of [F + R * B] rows and mask [R, 1, B, C]
    -> [R * B, H * D]: the blocks alone attend."""

    def __init__(self, g: Graph, c: DecoderConfig, max_context: int, *places: str, block: int | None = None):
        """places: the inputs from position_ids to mask."""
        self.graph, self.config, self.places = g, c, places
        self.tables = rope_tables(g, c.rope, c.head_dim, max_context)[:2]
        self.kind = (ATTENTION[0], {}) if block is None else (ATTENTION[1], {"block": block})

    @staticmethod
    def fits(c: DecoderConfig) -> bool:
        """Whether every layer attends its own keys and values, all of them, with whole heads turned."""
        return c.gemma4 is None and all(s.window is None and s.source == i for i, s in enumerate(c.layers)) and (
            c.head_dim % (2 * LANES) == 0 and c.head_dim <= MOST
        )

    def attend(self, w: Weights, qkv: str, i: int) -> str:
        """qkv of layer i -> what its rows attend."""
        g, c, (kind, block) = self.graph, self.config, self.kind
        shape = c.layer(i)
        past_key, past_value, present_key, present_value = cache_names(i)
        caches = "R", shape.num_key_value_heads, "C", shape.head_dim
        for past in (past_key, past_value):
            g.input(past, "float32", caches)
        norms = [w.plain(f"layers.{i}.self_attn.{x}_norm.weight") if c.qk_norm else g.const(np.zeros(0), "float32") for x in "qk"]
        attended = f"layers.{i}.attended"
        g.op(
            kind, qkv, *self.tables, *norms, *self.places, past_key, past_value, domain=DSPARK,
            out=(attended, present_key, present_value), heads=shape.num_attention_heads,
            scale=float(shape.attention_scale), epsilon=float(c.rms_norm_eps), **block,
        )  # fmt: skip
        for present in (present_key, present_value):
            g.output(present, "float32", caches)
        return attended
