"""The target engine's graph: packed tokens in, logits and context features out, caches updated in place.

Knows: TargetModel's forward in the packed form of docs/structures.md. Refuses to know: drafts, precision, backends.
Legend: N packed tokens, R requests, Q padded slots a request, C cache positions, M rows with logits, V vocabulary,
d hidden size, H / H_kv heads, D head size, L feature layers.
"""

from __future__ import annotations

from training.target import TargetModel

from .decoder import Weights, cache_write, mlp, rms_norm
from .graph import Graph
from .slots import GroupedSlots, SeparateSlots, fits_grouped

# int8 form of QKV, o_proj and down_proj: a few of their input channels are huge, and one 8-bit step a row would be too
# coarse.
OUTLIERS = "block"


def build_target(model: TargetModel, max_context: int, *, static_cache: int | None = None) -> Graph:
    """The graph of docs/structures.md, "target". `model` gives the weights and the feature layer ids.

    static_cache: TensorRT's form, whose caches have this fixed length and are sliced to the mask's C positions before
    attention. None: the caches' length is the mask's C (ONNX Runtime, where the slice would copy the cache).
    """
    c, g = model.config, Graph("target")
    w = Weights(g, model.state_dict())
    token_ids = g.input("token_ids", "int64", ("N",))
    pad_index = g.input("pad_index", "int64", ("R", "Q"))
    pack_index = g.input("pack_index", "int64", ("N",))
    position_ids = g.input("position_ids", "int64", ("R", "Q"))
    write_index = g.input("write_index", "int64", ("R",))
    mask = g.input("mask", "float32", ("R", 1, "Q", "C"))
    logit_rows = g.input("logit_rows", "int64", ("M",))
    form = GroupedSlots if static_cache is None and fits_grouped(c, max_context) else SeparateSlots
    slots = form(g, c, max_context, pad_index, pack_index, position_ids, mask)

    x = g.op("Gather", w.plain("embed_tokens.weight"), token_ids)
    features = {-1: x}
    for i in range(c.num_hidden_layers):
        layer = f"layers.{i}"
        h = rms_norm(w, x, f"{layer}.input_layernorm", c.rms_norm_eps)
        qkv = w.linear(h, *(f"{layer}.self_attn.{p}_proj" for p in "qkv"), int8=OUTLIERS)
        q, k, v = slots.spread(w, qkv, f"{layer}.self_attn")
        k, v = cache_write(g, c, i, k, v, write_index)
        if static_cache is not None:
            k, v = (slice_cache(g, cache, mask) for cache in (k, v))
        x = g.op("Add", x, w.linear(slots.attend(q, k, v), f"{layer}.self_attn.o_proj", int8=OUTLIERS))
        h = rms_norm(w, x, f"{layer}.post_attention_layernorm", c.rms_norm_eps)
        x = g.op("Add", x, mlp(w, h, f"{layer}.mlp", down_int8=OUTLIERS))
        features[i] = x
    last = rms_norm(w, g.op("Gather", x, logit_rows), "norm", c.rms_norm_eps)
    w.linear(last, "lm_head", int8="row-or-none", out="logits")
    g.op("Concat", *(features[i] for i in model.layer_ids), out="features", axis=-1)
    g.output("logits", "float32", ("M", c.vocab_size))
    g.output("features", "float32", ("N", len(model.layer_ids) * c.hidden_size))
    if static_cache is not None:
        fix_cache_length(g, static_cache)
    g.prune()
    return g


def slice_cache(g: Graph, cache: str, mask: str) -> str:
    """The cache's first C positions, C from the mask."""
    return g.op("Slice", cache, g.const([0]), g.op("Shape", mask, start=3, end=4), g.const([2]))


def fix_cache_length(g: Graph, length: int) -> None:
    """Replaces the symbol C of the caches (not of the mask) by a number."""
    is_cache = lambda name: name.startswith(("past_key_values.", "present."))
    fixed = lambda s: (
        type(s)(s.name, s.dtype, tuple(length if n == "C" else n for n in s.shape)) if is_cache(s.name) else s
    )
    g.inputs, g.outputs = [fixed(s) for s in g.inputs], [fixed(s) for s in g.outputs]
