"""What surrounds attention in a decoder of every family, as ONNX: embeddings, each layer's own input, all that comes
behind attention, logits.

Knows: training/layers.py's and training/gemma4.py's `finish`. Refuses to know: packing, caches, precision.
Legend: N rows, d hidden size, L layers, p width of a layer's own input.
"""

from __future__ import annotations

from training.decoder_config import DecoderConfig

from .decoder import Weights, mlp, rms_norm
from .graph import Graph


def embedded(w: Weights, c: DecoderConfig, ids: str) -> str:
    """ids [...] -> scaled embeddings [..., d]."""
    x = w.graph.op("Gather", w.plain("embed_tokens.weight"), ids)
    return x if c.embed_scale == 1 else times(w.graph, x, c.embed_scale)


def layer_inputs(w: Weights, c: DecoderConfig, ids: str, x: str) -> list[str | None]:
    """Each layer's own input [N, p], from ids [N] and their embeddings x [N, d]; None where the model has none."""
    L = c.num_hidden_layers
    if c.gemma4 is None or not (p := c.gemma4.per_layer_size):
        return [None] * L
    g = w.graph
    tokens = times(g, g.op("Gather", w.plain("embed_tokens_per_layer.weight"), ids), p**0.5)
    context = g.reshape(times(g, w.linear(x, "per_layer_model_projection"), c.hidden_size**-0.5), -1, L, p)
    both = g.op("Add", rms_norm(w, context, "per_layer_projection_norm", c.rms_norm_eps), g.reshape(tokens, -1, L, p))
    both = times(g, both, 2**-0.5)
    return [g.op("Gather", both, g.const(i), axis=1) for i in range(L)]


def finish(
    w: Weights, c: DecoderConfig, layer: str, x: str, attended: str, own_input: str | None = None, *, int8: str = "row"
) -> str:
    """The residual stream x [rows, d] behind `layer`, from what its heads attended [rows, H * D]. int8: the form of
    o_proj and down_proj in the int8 pass."""
    g, eps = w.graph, c.rms_norm_eps
    o = w.linear(attended, f"{layer}.self_attn.o_proj", int8=int8)
    if c.gemma4 is None:
        x = g.op("Add", x, o)
        h = rms_norm(w, x, f"{layer}.post_attention_layernorm", eps)
        return g.op("Add", x, mlp(w, h, f"{layer}.mlp", down_int8=int8))
    x = g.op("Add", x, rms_norm(w, o, f"{layer}.post_attention_layernorm", eps))
    h = rms_norm(w, x, f"{layer}.pre_feedforward_layernorm", eps)
    h = mlp(w, h, f"{layer}.mlp", down_int8=int8, activation="Gelu")
    x = g.op("Add", x, rms_norm(w, h, f"{layer}.post_feedforward_layernorm", eps))
    if own_input is not None:
        gate = g.op("Gelu", w.linear(x, f"{layer}.per_layer_input_gate"), approximate="tanh")
        h = w.linear(g.op("Mul", gate, own_input), f"{layer}.per_layer_projection")
        x = g.op("Add", x, rms_norm(w, h, f"{layer}.post_per_layer_input_norm", eps))
    return g.op("Mul", x, w.plain(f"{layer}.layer_scalar"))


def head(w: Weights, c: DecoderConfig, x: str, out: str, *, int8: str | None = "row") -> None:
    """x [..., d] -> the graph's logits `out`, softcapped where the model's are."""
    if c.logit_softcap is None:
        w.linear(x, "lm_head", int8=int8, out=out)
        return
    g, cap = w.graph, w.graph.const(c.logit_softcap, "float32")
    g.op("Mul", g.op("Tanh", g.op("Div", w.linear(x, "lm_head", int8=int8), cap)), cap, out=out)


def times(g: Graph, x: str, factor: float) -> str:
    return g.op("Mul", x, g.const(factor, "float32"))
