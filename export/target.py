"""The target engine's graph: packed tokens in, logits and context features out, caches updated in place.

Knows: TargetModel's forward in the packed form of docs/structures.md. Refuses to know: drafts, precision, backends.
Legend: N packed tokens, R requests, Q padded slots a request, C cache positions, M rows with logits, V vocabulary,
d hidden size, H / H_kv heads, D head size, L feature layers.
"""

from __future__ import annotations

from training.decoder_config import DecoderConfig, LayerShape
from training.target import TargetModel

from .decoder import Weights, cache_write, rms_norm
from .graph import Graph
from .layers import embedded, finish, head, layer_inputs
from .packed_slots import PackedSlots
from .slots import GroupedSlots, SeparateSlots, fits_grouped

# int8 form of QKV, o_proj and down_proj: a few of their input channels are huge, and one 8-bit step a row would be too
# coarse.
OUTLIERS = "block"


def build_target(
    model: TargetModel, max_context: int, *, static_cache: int | None = None, native: bool = False
) -> Graph:
    """The graph of docs/structures.md, "target". `model` gives the weights and the feature layer ids.

    static_cache: TensorRT's form, whose caches have this fixed length and are sliced to the mask's C positions before
    attention. None: the caches' length is the mask's C (ONNX Runtime, where the slice would copy the cache).
    native: attention is engines/kernels' own operator, where the model fits it.
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
    at = (pad_index, pack_index, position_ids, mask)
    places = (position_ids, write_index, pad_index, pack_index, mask)
    packed = PackedSlots(g, c, max_context, *places) if native and PackedSlots.fits(c) else None
    grouped = static_cache is None and fits_grouped(c, max_context)
    slots = [None] * c.num_hidden_layers if packed else slots_of_each(g, c, max_context, at, grouped)

    x = embedded(w, c, token_ids)
    own = layer_inputs(w, c, token_ids, x)
    features, kept = {-1: x}, {}
    for i, (shape, form) in enumerate(zip(c.layers, slots)):
        layer, attn = f"layers.{i}", f"layers.{i}.self_attn"
        h = rms_norm(w, x, f"{layer}.input_layernorm", c.rms_norm_eps)
        heads = w.linear(h, *(f"{attn}.{p}_proj" for p in projections(shape, i)), int8=OUTLIERS)
        if packed is not None:
            attended = packed.attend(w, heads, i)
        elif shape.source == i:
            q, k, v = form.spread(w, heads, attn)
            k, v = cache_write(g, shape, i, k, v, write_index)
            kept[i] = (k, v) if static_cache is None else tuple(slice_cache(g, cache, mask) for cache in (k, v))
            attended = form.attend(q, *kept[i])
        else:
            attended = form.attend(form.queries(w, heads, attn), *kept[shape.source])
        x = finish(w, c, layer, x, attended, own[i], int8=OUTLIERS)
        features[i] = x
    last = rms_norm(w, g.op("Gather", x, logit_rows), "norm", c.rms_norm_eps)
    head(w, c, last, "logits", int8="row-or-none")
    g.op("Concat", *(features[i] for i in model.layer_ids), out="features", axis=-1)
    g.output("logits", "float32", ("M", c.vocab_size))
    g.output("features", "float32", ("N", len(model.layer_ids) * c.hidden_size))
    if static_cache is not None:
        fix_cache_length(g, static_cache)
    g.prune()
    return g


def slots_of_each(g: Graph, c: DecoderConfig, max_context: int, at: tuple[str, str, str, str], grouped: bool) -> list:
    """Each layer's slots, one for all layers of a kind. at: pad_index, pack_index, position_ids, mask."""
    if grouped:
        return [GroupedSlots(g, c, max_context, *at)] * c.num_hidden_layers
    kinds: dict[tuple, SeparateSlots] = {}
    for i, s in enumerate(c.layers):
        if (key := (s.window, s.head_dim, s.num_key_value_heads)) not in kinds:
            name = "rope" if not kinds else f"rope.{len(kinds)}"
            kinds[key] = SeparateSlots(g, c, max_context, *at, i=i, name=name)
    return [kinds[s.window, s.head_dim, s.num_key_value_heads] for s in c.layers]


def projections(shape: LayerShape, i: int) -> str:
    """What layer i projects: queries alone where it attends another's keys and values."""
    if shape.source != i:
        return "q"
    return "qkv" if shape.own_values else "qk"


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
