"""What the layouts share: the decoder's keys of a draft's config.json, and the refusal of what no layout may hold here.

Knows: Hugging Face's names for a decoder, in both generations of transformers. Refuses to know: drafting.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from training.decoder_config import GEMMA4, DecoderConfig
from training.gemma4_config import FULL as FULL_ATTENTION
from training.gemma4_config import write_gemma4

T = TypeVar("T")


def decoder_to_json(dec: DecoderConfig, *, nested_rope: bool = True) -> dict:
    """The decoder's flat keys. nested_rope: `rope_parameters` (transformers 5), else `rope_theta` and
    `rope_scaling`."""
    if dec.gemma4:
        return {**write_gemma4(dec), "tie_word_embeddings": False}
    scaling = dec.rope.scaling()
    if nested_rope:
        rope: dict = {"rope_parameters": {"rope_theta": dec.rope.theta, **(scaling or {"rope_type": "default"})}}
    else:
        rope = {"rope_theta": dec.rope.theta, "rope_scaling": scaling or None}
    return {
        "attention_bias": dec.attention_bias,
        "head_dim": dec.head_dim,
        "hidden_act": "silu",
        "hidden_size": dec.hidden_size,
        "intermediate_size": dec.intermediate_size,
        "layer_types": [FULL_ATTENTION] * dec.num_hidden_layers,
        "max_position_embeddings": dec.max_position_embeddings,
        "mlp_bias": dec.mlp_bias,
        "model_type": family(dec),
        "num_attention_heads": dec.num_attention_heads,
        "num_hidden_layers": dec.num_hidden_layers,
        "num_key_value_heads": dec.num_key_value_heads,
        "rms_norm_eps": dec.rms_norm_eps,
        **rope,
        "tie_word_embeddings": False,
        "vocab_size": dec.vocab_size,
        **({} if dec.embed_scale == 1 else {"embed_scale": dec.embed_scale}),
    }


def family(dec: DecoderConfig) -> str:
    """The model_type of a draft's decoder: what tells Qwen3's layers from Llama's is the norm of queries and keys."""
    return dec.model_type if dec.gemma4 else "qwen3" if dec.qk_norm else "llama"


def read_decoder(raw: dict, source: str, model_type: str | None = None) -> DecoderConfig:
    """Raises ValueError, one sentence, for what no drafter of this version has, and KeyError for a key that is not
    there (`reading` makes it a sentence)."""
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{source}: hidden_act is {raw['hidden_act']!r}; only 'silu' is supported.")
    if other := set(raw.get("layer_types") or ()) - {FULL_ATTENTION}:
        raise ValueError(f"{source}: layer_types holds {sorted(other)}; only 'full_attention' is supported.")
    if (model_type or raw.get("model_type")) in GEMMA4 and raw.get("hidden_size_per_layer_input"):
        raise ValueError(f"{source}: hidden_size_per_layer_input is not 0; no draft has inputs of each layer's own.")
    return DecoderConfig.from_hf(raw, model_type=model_type)


def reading(make: Callable[[], T], source: str) -> T:
    """make(), with a missing key or a bad value told as one sentence that begins with the file."""
    try:
        return make()
    except KeyError as error:
        raise ValueError(f"{source} lacks {error.args[0]}.") from None
    except (TypeError, ValueError) as error:
        if not str(error).endswith("."):  # Python's own words
            raise ValueError(f"{source} has a value of the wrong kind: {error}.") from None
        raise error if str(error).startswith(source) else ValueError(f"{source}: {error}") from None


def drafted_tokens(slots: int, sample_from_anchor: bool) -> int:
    """G of a block of so many slots. Raises ValueError where nothing would be drafted."""
    if not sample_from_anchor and slots < 2:
        raise ValueError(f"block_size is {slots}; without a draft from the anchor's slot it must be 2 or more.")
    return slots - (0 if sample_from_anchor else 1)
