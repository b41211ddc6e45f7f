"""The layer pieces that the target's and the draft backbone's graphs share.

Knows: how a decoder layer of training/target.py is spelled in ONNX. Refuses to know: packing, caches' owners,
precision.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from training.decoder_config import DecoderConfig, LayerShape
from training.rope import RopeConfig

from .arrays import Array, Lazy, concatenated
from .graph import Graph

TOO_FAR = -3e4
ROPE_SLACK = 64  # rows past max_context: padded slots and mask tokens may be positioned there


class Weights:
    """A module's state dict (tensors, or lazy arrays that a checkpoint gives), with the graph that takes from it."""

    def __init__(self, graph: Graph, state: dict[str, Tensor] | dict[str, Lazy]):
        self.graph, self.state = graph, state

    def array(self, name: str) -> Array:
        value = self.state[name]
        return value if isinstance(value, Lazy) else value.detach().numpy()

    def held(self, name: str, make: Callable[[], Array], sources: tuple[str, ...]) -> str:
        """The initializer `name`, made once: steps that are unrolled read the same weights again."""
        return name if name in self.graph.weights else self.graph.weight(name, make(), sources)

    def plain(self, name: str) -> str:
        """The tensor as it is."""
        return self.held(name, lambda: self.array(name), (name,))

    def linear(self, x: str, *layers: str, int8: str | None = "row", out: str | int = 1) -> str:
        """x [rows, in] -> [rows, sum of outs]: the named nn.Linear layers side by side, as one MatMul.

        int8: the form it takes in the int8 pass ("row", "row-or-none" or "block", export/quantize.py); None = stays
        float32.
        """
        g = self.graph
        sources = tuple(f"{layer}.weight" for layer in layers)
        name = ".".join([layers[0], *(layer.rsplit(".", 1)[-1] for layer in layers[1:])])
        weight = self.held(f"{name}.T", lambda: concatenated([self.array(s) for s in sources]).T, sources)
        if int8:
            g.quantizable[weight] = int8
        biases = tuple(f"{layer}.bias" for layer in layers if f"{layer}.bias" in self.state)
        if not biases:
            return g.op("MatMul", x, weight, out=out)
        bias = self.held(f"{name}.bias", lambda: concatenated([self.array(b) for b in biases]), biases)
        return g.op("Add", g.op("MatMul", x, weight), bias, out=out)


def rms_norm(w: Weights, x: str, layer: str, eps: float, out: str | int = 1) -> str:
    """RMSNorm over the last axis, computed in float32."""
    return w.graph.op("RMSNormalization", x, w.plain(f"{layer}.weight"), out=out, axis=-1, epsilon=eps)


def rope_tables(
    g: Graph, rope: RopeConfig, head_dim: int, max_context: int, *, unturned: int = 0, scale: float | None = None,
    name: str = "rope",
) -> tuple[str, str, int]:  # fmt: skip
    """cos and sin initializers [max_context + slack, D/2], and how many rows that is. unturned: that many rows more,
    which leave a head as it is (cos 1, sin 0). scale: the first rows once more, at the end, for heads that are scaled
    as they are turned."""
    rows = max_context + ROPE_SLACK
    tables = [table.numpy() for table in rope.tables(head_dim, rows)]
    for i, (part, still) in enumerate((("cos", 1), ("sin", 0))):
        scaled = tables[i] * np.float32(scale) if scale else tables[i][:0]
        padded = np.pad(tables[i], ((0, unturned), (0, 0)), constant_values=still)
        g.weight(f"{name}.{part}", np.concatenate([padded, scaled]))
    return f"{name}.cos", f"{name}.sin", rows


def cache_names(layer: int) -> tuple[str, str, str, str]:
    """(past key, past value, present key, present value) of a layer."""
    return tuple(f"{side}.{layer}.{part}" for side in ("past_key_values", "present") for part in ("key", "value"))


def cache_write(g: Graph, c: DecoderConfig | LayerShape, layer: int, key: str, value: str, write_index: str) -> tuple[str, str]:
    """Declares the layer's linear caches [R, H_kv, C, D] and writes key and value [R, H_kv, Q, D] at write_index
    [R]."""
    past_key, past_value, present_key, present_value = cache_names(layer)
    shape = ("R", c.num_key_value_heads, "C", c.head_dim)
    for past, new, present in ((past_key, key, present_key), (past_value, value, present_value)):
        g.input(past, "float32", shape)
        g.op("TensorScatter", past, new, write_index, out=present, axis=2, mode="linear")
        g.output(present, "float32", shape)
    return present_key, present_value


def attention(g: Graph, c: DecoderConfig | LayerShape, q: str, k: str, v: str, mask: str) -> str:
    """q [R, H, Q, D], k and v [R, H_kv, C, D], mask from group_mask -> [R, H, Q, D], or a reshape of it.

    The heads of a group are laid side by side as slots of one head, q [R, H_kv, H / H_kv * Q, D]: the same numbers, but
    keys and values are read once a group, and a matrix product never has a single row, for which ONNX Runtime takes
    another kernel with another rounding: a token's logits would depend on how many tokens share its pass. Without
    groups each slot is computed twice for that reason.
    """
    alone = c.num_attention_heads == c.num_key_value_heads
    q = g.op("Concat", q, q, axis=2) if alone else g.reshape(q, 0, c.num_key_value_heads, -1, c.head_dim)
    o = g.op("Attention", q, k, v, mask, scale=c.attention_scale)
    return g.op("Split", o, out=2, axis=2, num_outputs=2)[0] if alone else o


def group_mask(g: Graph, c: DecoderConfig | LayerShape, mask: str) -> str:
    """The additive mask [R, 1, Q, C] repeated for the slots that attention lays side by side; once a pass."""
    return g.op("Concat", *[mask] * max(c.num_attention_heads // c.num_key_value_heads, 2), axis=2)


def within(g: Graph, mask: str, position_ids: str, window: int) -> str:
    """The additive mask [R, 1, Q, C], with the cache positions (their index) out that lie `window` or more before the
    query's own, position_ids [R, Q]. TOO_FAR is finite in float16 too, and so is a row in which nothing is left."""
    C = g.op("Squeeze", g.op("Shape", mask, start=3, end=4), g.const([0]))
    back = g.op("Sub", g.op("Unsqueeze", position_ids, g.const([1, 3])), g.op("Range", g.const(0), C, g.const(1)))
    near, far = g.const(0.0, "float32"), g.const(TOO_FAR, "float32")
    return g.op("Min", mask, g.op("Where", g.op("Less", back, g.const(window)), near, far))


def head_rows(g: Graph, rows: str, heads: int, first: int, total: int) -> str:
    """Index [R, heads, Q] into the [rows * total, D] view of [rows, total * D]: head `first + h` of packed row rows[r,
    j].

    One Gather with it both pads and transposes; computed once a pass, used by every layer.
    """
    scaled = g.op("Mul", g.op("Unsqueeze", rows, g.const([1])), g.const(total))
    return g.op("Add", scaled, g.const(np.arange(first, first + heads)[None, :, None]))


def mlp(w: Weights, x: str, layer: str, *, down_int8: str = "row", activation: str = "Swish") -> str:
    """x [rows, d] -> [rows, d]: down(activation(gate) * up), gate and up as one MatMul. activation: Swish, or Gelu (its
    tanh form)."""
    g = w.graph
    gate_up = w.linear(x, f"{layer}.gate_proj", f"{layer}.up_proj")
    gate, up = g.op("Split", gate_up, out=2, axis=-1, num_outputs=2)
    form = {"approximate": "tanh"} if activation == "Gelu" else {}
    return w.linear(g.op("Mul", g.op(activation, gate, **form), up), f"{layer}.down_proj", int8=down_int8)
