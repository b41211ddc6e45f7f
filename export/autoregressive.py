"""The two graphs of an autoregressive draft (EAGLE-3, MTP): the backbone runs the rows of newly committed context, the
markov engine the steps of a block, unrolled.

Knows: training/autoregressive.py's rows, step and sample_block, as docs/structures.md packs them. Refuses to know:
precision, backends, which draft tokens are verified.
Legend: F packed feature rows, R requests, Q padded slots a request, C draft cache positions, T steps so far, G tokens
drafted, V_d draft vocabulary, d hidden size, L feature layers, H / H_kv heads, D head size.
"""

from __future__ import annotations

from training.autoregressive import ArDraft

from .decoder import Weights, attention, cache_names, cache_write, group_mask, head_rows, rms_norm, rope_tables
from .graph import Graph
from .heads import Picks
from .layers import embedded, finish
from .slots import packed_head_rows
from .target import fix_cache_length, slice_cache

TO_END = 2**62
NORMS = {  # of the embedding, of the feature
    "eagle3": ("layers.0.input_layernorm", "layers.0.hidden_norm"),
    "mtp": ("enorm", "hnorm"),
}
# int8 form of every matrix: a step feeds the next one, so errors add up, and one 8-bit step a row is too coarse for them.
INT8 = "block"


class Layers:
    """ArDraft's layers without their attention: [.., d] stands for packed rows or for a step's requests."""

    def __init__(self, graph: Graph, model: ArDraft, max_context: int):
        self.graph, self.kind, self.c = graph, model.config.kind, model.config.decoder
        self.depth, self.eps = self.c.num_hidden_layers, self.c.rms_norm_eps
        self.w = Weights(graph, model.state_dict())
        self.cos, self.sin, _ = rope_tables(graph, self.c.rope, self.c.head_dim, max_context)

    def enter(self, feature: str, ids: str) -> tuple[str, str]:
        """feature [.., d], ids [..] of the next tokens -> the residual stream [.., d] and the first attention's input
        [.., d] (eagle3: [.., 2d]); the embedding comes first in both concatenations."""
        g, w = self.graph, self.w
        both = zip((embedded(w, self.c, ids), feature), NORMS[self.kind])
        wide = g.op("Concat", *(rms_norm(w, x, norm, self.eps) for x, norm in both), axis=-1)
        if self.kind == "eagle3":
            return feature, wide
        x = w.linear(wide, "eh_proj")
        return x, rms_norm(w, x, "layers.0.input_layernorm", self.eps)

    def leave(self, i: int, x: str, attended: str) -> tuple[str, str | None]:
        """x [.., d], attended [.., H * D] -> the stream behind layer i and the next layer's input (None: it was the
        last)."""
        w, x = self.w, finish(self.w, self.c, f"layers.{i}", x, attended)
        return x, rms_norm(w, x, f"layers.{i + 1}.input_layernorm", self.eps) if i + 1 < self.depth else None

    def turned(self, heads: str, layer: int, norm: str, positions: str) -> str:
        """heads [R, any, S, D] with the layer's `norm` (q_norm, k_norm; where it has it), turned to positions [R, S]."""
        if self.c.qk_norm:
            heads = rms_norm(self.w, heads, f"layers.{layer}.self_attn.{norm}", self.eps)
        return self.graph.op("RotaryEmbedding", heads, self.cos, self.sin, positions)

    def logits(self, x: str, out: str | int = 1) -> str:
        """x [.., d] -> [.., V_d]."""
        return self.w.linear(rms_norm(self.w, x, "norm", self.eps), "lm_head", out=out)


def build_rows(model: ArDraft, max_context: int, *, static_cache: int | None = None) -> Graph:
    """The graph of docs/structures.md, "backbone" of an autoregressive draft. static_cache as in build_target. The last
    layer's queries, and what follows them, are those of each request's newest row alone: of the others only keys and
    values are wanted."""
    c, g = model.config.decoder, Graph("backbone")
    d, H, KV, D, depth = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.num_hidden_layers
    features = g.input("features", "float32", ("F", len(model.config.target_layer_ids) * d))
    next_ids = g.input("next_ids", "int64", ("F",))
    pad_index = g.input("pad_index", "int64", ("R", "Q"))
    position_ids = g.input("position_ids", "int64", ("R", "Q"))
    write_index = g.input("write_index", "int64", ("R",))
    last_index = g.input("last_index", "int64", ("R",))
    last_position_ids = g.input("last_position_ids", "int64", ("R", 1))
    mask = g.input("mask", "float32", ("R", 1, 1, "C"))
    layers = Layers(g, model, max_context)
    w = layers.w
    k_rows, v_rows = (head_rows(g, pad_index, KV, first, 2 * KV) for first in (0, KV))  # [R, H_kv, Q]
    groups = group_mask(g, c, mask)
    if depth > 1:  # every row goes on to the next layer
        packed = packed_head_rows(g, pad_index, g.input("pack_index", "int64", ("F",)), H)
        q_rows = head_rows(g, pad_index, H, 0, H)
        row_groups = group_mask(g, c, g.input("mask_rows", "float32", ("R", 1, "Q", "C")))

    x, h = layers.enter(w.linear(features, "fc") if layers.kind == "eagle3" else features, next_ids)
    for i in range(depth):
        attn, last = f"layers.{i}.self_attn", i == depth - 1
        kv = g.reshape(w.linear(h, f"{attn}.k_proj", f"{attn}.v_proj"), -1, D)
        k = layers.turned(g.op("Gather", kv, k_rows), i, "k_norm", position_ids)
        k, v = cache_write(g, c, i, k, g.op("Gather", kv, v_rows), write_index)
        if static_cache is not None:
            k, v = (slice_cache(g, cache, mask) for cache in (k, v))
        if last:
            x, h = g.op("Gather", x, last_index), g.op("Gather", h, last_index)
            q = layers.turned(g.reshape(w.linear(h, f"{attn}.q_proj"), -1, H, 1, D), i, "q_norm", last_position_ids)
            o = g.reshape(attention(g, c, q, k, v, groups), -1, H * D)
        else:
            q = g.op("Gather", g.reshape(w.linear(h, f"{attn}.q_proj"), -1, D), q_rows)
            q = layers.turned(q, i, "q_norm", position_ids)
            o = g.reshape(attention(g, c, q, k, v, row_groups), -1, D)  # [R * H * Q, D]
            o = g.reshape(g.op("Gather", o, packed), -1, H * D)
        x, h = layers.leave(i, x, o)
    hidden = g.reshape(x, -1, 1, d, out="hidden")
    layers.logits(hidden, out="base_logits")
    g.output("hidden", "float32", ("R", 1, d))
    g.output("base_logits", "float32", ("R", 1, model.config.vocab_out))
    if static_cache is not None:
        fix_cache_length(g, static_cache)
    g.quantizable = dict.fromkeys(g.quantizable, INT8)
    g.prune()
    return g


def build_steps(model: ArDraft, max_context: int, *, static_cache: int | None = None) -> Graph:
    """The graph of docs/structures.md, "markov" of an autoregressive draft: slot 0 from base_logits, then G - 1 steps,
    each with the token just picked. The caches are read and never written: a step attends them and the steps before it,
    two products under one softmax."""
    c, g, G = model.config, Graph("markov"), model.config.block_size
    d, depth = c.decoder.hidden_size, c.decoder.num_hidden_layers
    hidden = g.input("hidden", "float32", ("R", 1, d)) if G > 1 else None
    base_logits = g.input("base_logits", "float32", ("R", 1, c.vocab_out))
    picks = Picks(g, model)
    token = picks.pick(0, g.op("Squeeze", base_logits, g.const([1])))
    if G > 1:
        position_ids = g.op("Unsqueeze", g.input("position_ids", "int64", ("R",)), g.const([1]))
        mask = g.input("mask", "float32", ("R", 1, 1, "C"))
        layers = Layers(g, model, max_context)
        attend = [StepAttention(layers, i, mask, static_cache) for i in range(depth)]
        x = g.reshape(hidden, -1, d)
    for k in range(1, G):
        positions = g.op("Add", position_ids, g.const(k - 1))
        x, h = layers.enter(x, token)
        for i in range(depth):
            x, h = layers.leave(i, x, attend[i].step(h, positions))
        token = picks.pick(k, layers.logits(x))
    picks.outputs()
    if static_cache is not None:
        fix_cache_length(g, static_cache)
    g.quantizable = dict.fromkeys(g.quantizable, INT8)
    g.prune()
    return g


class StepAttention:
    """One layer's attention over the steps of a block: its cached rows, read where they lie, and the steps so far.

    In ONNX Runtime's form every query is a product of its own with a single row: keys and values are not packed first,
    and a request's bits do not depend on its neighbours (lower_onnxruntime.lower_attention)."""

    def __init__(self, layers: Layers, i: int, mask: str, static_cache: int | None):
        self.layers, self.i = layers, i
        self.graph, self.alone = layers.graph, static_cache is None
        g, c = self.graph, layers.c
        past = cache_names(i)[:2]
        for name in past:
            g.input(name, "float32", ("R", c.num_key_value_heads, "C", c.head_dim))
        keys, self.values = past if static_cache is None else (slice_cache(g, cache, mask) for cache in past)
        if self.alone:
            keys, self.values, mask = (g.op("Unsqueeze", cache, g.const([2])) for cache in (keys, self.values, mask))
        self.keys, self.mask = self.transposed(keys), mask
        self.own: list[tuple[str, str]] = []

    def step(self, h: str, positions: str) -> str:
        """h [R, d] (a first layer of eagle3: [R, 2d]), positions [R, 1] -> [R, H * D]; the step's own keys and values
        are kept for the steps after it."""
        g, c, attn = self.graph, self.layers.c, f"layers.{self.i}.self_attn"
        H, KV, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        qkv = g.reshape(self.layers.w.linear(h, *(f"{attn}.{p}_proj" for p in "qkv")), -1, H + 2 * KV, 1, D)
        q, k, v = g.op("Split", qkv, g.const([H, KV, KV]), out=3, axis=1)
        q, k = (self.layers.turned(x, self.i, n, positions) for x, n in ((q, "q_norm"), (k, "k_norm")))
        self.own.append((k, v))
        q = g.op("Mul", g.reshape(q, *self.shape(-1, KV, H // KV, D)), g.const(D**-0.5, "float32"))
        keys, values = (self.joined([pair[part] for pair in self.own]) for part in range(2))
        cached = g.op("Add", g.op("MatMul", q, self.keys), self.mask)
        own = g.op("MatMul", q, self.transposed(keys))
        share = g.op("Softmax", g.op("Concat", own, cached, axis=-1), axis=-1)
        T, axis = g.const([len(self.own)]), g.const([-1])
        steps, rows = g.op("Slice", share, g.const([0]), T, axis), g.op("Slice", share, T, g.const([TO_END]), axis)
        o = g.op("Add", g.op("MatMul", rows, self.values), g.op("MatMul", steps, values))
        return g.reshape(o, -1, H * D)

    def shape(self, *sizes: int) -> tuple[int, ...]:
        return (*sizes[:3], 1, sizes[3]) if self.alone else sizes

    def joined(self, parts: list[str]) -> str:
        """T times [R, H_kv, 1, D] -> [R, H_kv, T, D], or [R, H_kv, 1, T, D]."""
        g = self.graph
        x = g.op("Concat", *parts, axis=2) if len(parts) > 1 else parts[0]
        return g.op("Unsqueeze", x, g.const([2])) if self.alone else x

    def transposed(self, x: str) -> str:
        """The last two axes swapped; ONNX Runtime takes it into the product that follows."""
        return self.graph.op("Transpose", x, perm=[0, 1, 2, 4, 3] if self.alone else [0, 1, 3, 2])
