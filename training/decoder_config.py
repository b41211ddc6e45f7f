"""The shape of a decoder stack, read from a Hugging Face config.json: the whole, and each layer's own.

Knows: config keys of both transformers generations, the families that this version reads. Refuses to know: weights,
layers, drafts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from training.gemma4_config import FULL, Gemma4Config, read_gemma4
from training.gemma4_config import MODEL_TYPES as GEMMA4
from training.rope import RopeConfig

SUPPORTED_MODEL_TYPES = ("llama", "qwen3", *GEMMA4)


@dataclass(frozen=True)
class LayerShape:
    """One layer's attention and MLP, under DecoderConfig's names. window: positions that a query sees, its own included
    (None: all before it); source: the layer whose keys and values it attends, itself unless it shares; own_values
    False: values are its keys before norm and rotation."""

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    rope: RopeConfig
    attention_scale: float
    source: int
    window: int | None = None
    own_values: bool = True


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of one decoder stack (a target's, or a draft backbone's). embed_scale: what embeddings are multiplied by;
    logit_softcap: logits are softcap * tanh(logits / softcap). gemma4: where layers differ; then `layer(i)` alone says
    what layer i is."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    qk_norm: bool
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    model_type: str = "llama"
    embed_scale: float = 1.0
    logit_softcap: float | None = None
    gemma4: Gemma4Config | None = None

    @property
    def attention_scale(self) -> float:
        """What a query's products are multiplied by: Gemma4 leaves that to its norms."""
        return 1.0 if self.gemma4 else float(self.head_dim) ** -0.5

    def layer(self, i: int) -> LayerShape:
        """The shape of decoder layer i."""
        g = self.gemma4
        shape = LayerShape(
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            intermediate_size=self.intermediate_size,
            rope=self.rope,
            attention_scale=self.attention_scale,
            source=i,
        )
        if g is None:
            return shape
        source = g.source(i)
        shape = replace(
            shape,
            source=source,
            intermediate_size=self.intermediate_size * (2 if g.double_wide_mlp and source != i else 1),
        )
        if g.layer_types[i] != FULL:
            return replace(shape, window=g.sliding_window)
        return replace(
            shape,
            num_key_value_heads=g.num_global_key_value_heads,
            head_dim=g.global_head_dim,
            rope=g.full_rope,
            own_values=not g.k_eq_v,
        )

    @property
    def layers(self) -> tuple[LayerShape, ...]:
        return tuple(self.layer(i) for i in range(self.num_hidden_layers))

    @property
    def cached_layers(self) -> tuple[LayerShape, ...]:
        """The layers that keep keys and values of their own: the first ones, since those that share are the last."""
        return tuple(shape for i, shape in enumerate(self.layers) if shape.source == i)

    def for_draft(self, depth: int) -> DecoderConfig:
        """A draft's decoder for a target of this shape: the same widths, `depth` layers; for Gemma4 as DeepSpec's
        Gemma4DSparkModel has them: full layers alone, nothing shared, no inputs of each layer's own."""
        c = replace(self, num_hidden_layers=depth, tie_word_embeddings=False)
        if self.gemma4 is None:
            return c
        own = dict(layer_types=(FULL,) * depth, num_kv_shared_layers=0, double_wide_mlp=False, per_layer_size=0)
        return replace(c, gemma4=replace(self.gemma4, **own))

    def plain(self, depth: int) -> DecoderConfig:
        """Llama-style layers of this decoder's widths, for drafts that have no other."""
        if self.gemma4 is None:
            return self.for_draft(depth)
        c = replace(self, num_hidden_layers=depth, tie_word_embeddings=False)
        return replace(c, gemma4=None, logit_softcap=None, qk_norm=True, model_type="qwen3")

    @classmethod
    def from_hf(cls, raw: dict, *, model_type: str | None = None) -> DecoderConfig:
        """From a Hugging Face `config.json`; of a model with pictures or sound the text part. Raises ValueError for a
        family this version does not read."""
        model_type = model_type or raw.get("model_type", "")
        if model_type not in SUPPORTED_MODEL_TYPES:
            raise ValueError(
                f"model_type is {model_type!r}; this version reads {', '.join(SUPPORTED_MODEL_TYPES[:3])}."
            )
        if model_type in GEMMA4:
            return cls(**read_gemma4(raw.get("text_config") or raw))
        if raw.get("use_sliding_window"):
            raise ValueError("use_sliding_window is true; sliding-window attention is not supported.")
        if raw.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act is {raw['hidden_act']!r}; this version computes 'silu'.")
        heads = int(raw["num_attention_heads"])
        return cls(
            vocab_size=int(raw["vocab_size"]),
            hidden_size=int(raw["hidden_size"]),
            intermediate_size=int(raw["intermediate_size"]),
            num_hidden_layers=int(raw["num_hidden_layers"]),
            num_attention_heads=heads,
            num_key_value_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=int(raw.get("head_dim") or raw["hidden_size"] // heads),
            rms_norm_eps=float(raw["rms_norm_eps"]),
            rope=RopeConfig.from_hf(raw),
            max_position_embeddings=int(raw["max_position_embeddings"]),
            qk_norm=bool(raw.get("qk_norm", model_type == "qwen3")),
            attention_bias=bool(raw.get("attention_bias", False)),
            mlp_bias=bool(raw.get("mlp_bias", False)),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            model_type=model_type,
            embed_scale=float(raw.get("embed_scale") or 1.0),
        )


def flat_keys(raw: dict) -> dict:
    """A config.json with the keys of its text part among its own."""
    return {**(raw.get("text_config") or {}), **{k: v for k, v in raw.items() if v is not None}}
