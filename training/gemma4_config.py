"""What a Gemma4 decoder's config.json says beyond the other families': two kinds of attention layers, keys and values
that layers share, inputs of each layer's own.

Knows: the config keys of gemma4_text and gemma4_unified_text, as released and as transformers 5 writes them.
Refuses to know: weights, layers, drafts, pictures and sound.
"""

from __future__ import annotations

from dataclasses import dataclass

from training.rope import RopeConfig

MODEL_TYPES = ("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text")
SLIDING, FULL = "sliding_attention", "full_attention"
PATTERN = 6  # without layer_types every sixth layer is a full one
FULL_ROPE = {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0}
SLIDING_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}


@dataclass(frozen=True)
class Gemma4Config:
    """layer_types: SLIDING or FULL a layer. A sliding layer has the decoder's num_key_value_heads, head_dim and rope,
    and a query of it sees sliding_window positions, its own included; a full one has those named here. k_eq_v: a full
    layer's values are its keys before norm and rotation. The last num_kv_shared_layers layers attend the keys and
    values of the last layer of their type before them (double_wide_mlp: and have MLPs of twice the width).
    per_layer_size: width of the inputs of each layer's own (0: none)."""

    layer_types: tuple[str, ...]
    sliding_window: int
    global_head_dim: int
    num_global_key_value_heads: int
    full_rope: RopeConfig
    k_eq_v: bool = False
    num_kv_shared_layers: int = 0
    double_wide_mlp: bool = False
    per_layer_size: int = 0

    def source(self, i: int) -> int:
        """The layer whose keys and values layer i attends; i itself unless it shares."""
        own = len(self.layer_types) - self.num_kv_shared_layers
        return i if i < own else max(j for j in range(own) if self.layer_types[j] == self.layer_types[i])


def read_gemma4(raw: dict) -> dict:
    """DecoderConfig's fields from the flat keys (of a text_config where there is one). Raises ValueError, one sentence,
    for what this version does not compute."""
    refuse(raw)
    heads, kv_heads = int(raw["num_attention_heads"]), int(raw["num_key_value_heads"])
    layers, types = int(raw["num_hidden_layers"]), raw.get("layer_types")
    if types is None:
        types = [SLIDING if (i + 1) % PATTERN else FULL for i in range(layers)]
    if len(types) != layers or not set(types) <= {SLIDING, FULL}:
        raise ValueError(f"layer_types is {types}; it must name {SLIDING} or {FULL} for each of {layers} layers.")
    types = [*types[:-1], FULL]  # as transformers has it
    ropes = raw.get("rope_parameters") or {SLIDING: SLIDING_ROPE, FULL: FULL_ROPE}
    read_rope = lambda kind: RopeConfig.from_hf({"rope_parameters": ropes[kind]})
    full_rope, softcap = read_rope(FULL), raw.get("final_logit_softcapping")
    full = full_layers(raw, [i for i, kind in enumerate(types) if kind == FULL], kv_heads)
    gemma4 = Gemma4Config(
        layer_types=tuple(types),
        sliding_window=int(raw.get("sliding_window") or 512),
        global_head_dim=full["head_dim"],
        num_global_key_value_heads=full["num_key_value_heads"],
        full_rope=full_rope,
        k_eq_v=bool(raw.get("attention_k_eq_v", False)),
        num_kv_shared_layers=int(raw.get("num_kv_shared_layers") or 0),
        double_wide_mlp=bool(raw.get("use_double_wide_mlp", False)),
        per_layer_size=int(raw.get("hidden_size_per_layer_input") or 0),
    )
    check_shared(gemma4)
    return dict(
        vocab_size=int(raw["vocab_size"]),
        hidden_size=int(raw["hidden_size"]),
        intermediate_size=int(raw["intermediate_size"]),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=int(raw.get("head_dim") or 256),
        rms_norm_eps=float(raw["rms_norm_eps"]),
        rope=read_rope(SLIDING) if SLIDING in ropes else full_rope,
        max_position_embeddings=int(raw["max_position_embeddings"]),
        qk_norm=True,
        attention_bias=bool(raw.get("attention_bias", False)),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", True)),
        model_type="gemma4_text",
        embed_scale=float(raw["hidden_size"]) ** 0.5,
        logit_softcap=None if softcap is None else float(softcap),
        gemma4=gemma4,
    )


def refuse(raw: dict) -> None:
    """Raises ValueError, one sentence, for a Gemma4 that this version does not compute."""
    if raw.get("enable_moe_block"):
        raise ValueError("enable_moe_block is true; mixture-of-experts layers are not supported.")
    if raw.get("use_bidirectional_attention") == "all":
        raise ValueError("use_bidirectional_attention is 'all'; only causal text is supported.")
    if (act := raw.get("hidden_activation", "gelu_pytorch_tanh")) != "gelu_pytorch_tanh":
        raise ValueError(f"hidden_activation is {act!r}; for Gemma4 this version computes 'gelu_pytorch_tanh'.")
    vocab, own = int(raw["vocab_size"]), raw.get("vocab_size_per_layer_input")
    if raw.get("hidden_size_per_layer_input") and own is not None and int(own) != vocab:
        raise ValueError(f"vocab_size_per_layer_input is {own}; it must be vocab_size, {vocab}.")


def full_layers(raw: dict, layers: list[int], kv_heads: int) -> dict[str, int]:
    """head_dim and num_key_value_heads of the full layers: from per_layer_config (transformers 5) or the keys of
    released checkpoints."""
    if (own := raw.get("per_layer_config")) is None:
        wide = raw.get("num_global_key_value_heads") if raw.get("attention_k_eq_v") else None
        return {"head_dim": int(raw.get("global_head_dim") or 512), "num_key_value_heads": int(wide or kv_heads)}
    usual = {"head_dim": int(raw.get("head_dim") or 256), "num_key_value_heads": kv_heads}
    found = [{**usual, **own.get(str(i), {})} for i in layers]
    odd = set(own) - set(map(str, layers)) or any(f != found[0] for f in found)
    if odd or set(found[0]) != set(usual):
        raise ValueError("per_layer_config differs among the full layers or names others; two kinds of layer are read.")
    return {key: int(value) for key, value in found[0].items()}


def check_shared(g: Gemma4Config) -> None:
    own = len(g.layer_types) - g.num_kv_shared_layers
    if g.num_kv_shared_layers and (own < 1 or not set(g.layer_types[own:]) <= set(g.layer_types[:own])):
        raise ValueError(
            f"num_kv_shared_layers is {g.num_kv_shared_layers}; each type of layer that shares must also be among the "
            f"{max(own, 0)} before."
        )


def write_gemma4(c) -> dict:
    """The flat keys of a DecoderConfig with Gemma4's details. Inverse of read_gemma4."""
    g = c.gemma4
    rope = lambda r: {"rope_theta": r.theta, **(r.scaling() or {"rope_type": "default"})}
    return {
        "attention_bias": c.attention_bias,
        "attention_dropout": 0.0,
        "attention_k_eq_v": g.k_eq_v,
        "enable_moe_block": False,
        "final_logit_softcapping": c.logit_softcap,
        "global_head_dim": g.global_head_dim,
        "head_dim": c.head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": c.hidden_size,
        "hidden_size_per_layer_input": g.per_layer_size,
        "intermediate_size": c.intermediate_size,
        "layer_types": list(g.layer_types),
        "max_position_embeddings": c.max_position_embeddings,
        "model_type": c.model_type,
        "num_attention_heads": c.num_attention_heads,
        "num_global_key_value_heads": g.num_global_key_value_heads,
        "num_hidden_layers": c.num_hidden_layers,
        "num_key_value_heads": c.num_key_value_heads,
        "num_kv_shared_layers": g.num_kv_shared_layers,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_parameters": {SLIDING: rope(c.rope), FULL: rope(g.full_rope)},
        "sliding_window": g.sliding_window,
        "tie_word_embeddings": c.tie_word_embeddings,
        "use_double_wide_mlp": g.double_wide_mlp,
        "vocab_size": c.vocab_size,
        "vocab_size_per_layer_input": c.vocab_size,
    }
