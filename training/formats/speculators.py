"""The speculators layout (vLLM): the decoder in `transformer_layer_config`, layer ids shifted by one, a pruned
vocabulary.

Source: github.com/vllm-project/speculators at c05b95b (src/speculators/models/{dflash,dspark}/{config,core}.py,
.../model.py, src/speculators/convert/dflash/converter.py). `aux_hidden_state_layer_ids` counts hidden states: 0 is the
embedding's output and k + 1 the output of decoder layer k. The nested config may leave out what is transformers'
default for Qwen3. `draft_vocab_size` is always written; with V_d < V there are `d2t` [V_d] int64 offsets and `t2d` [V]
bool. The target's number of layers is not stored: it comes from the target's folder, or from `num_target_layers` where
we wrote the file.
"""

from __future__ import annotations

from collections.abc import Collection

from training.draft import DraftConfig
from training.formats.decoder import decoder_to_json, drafted_tokens, read_decoder, reading

NAME = "speculators"
ARCHITECTURES = {"dspark": "DSparkDraftModel", "dflash": "DFlashDraftModel"}
QWEN3_DEFAULTS = {
    "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32, "head_dim": 128,
    "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_act": "silu", "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "model_type": "qwen3",
    "attention_bias": False, "tie_word_embeddings": False,
}  # fmt: skip
DSPARK_DEFAULTS = {
    "markov_rank": 256, "markov_head_type": "vanilla", "enable_confidence_head": True,
    "confidence_head_with_markov": True,
}  # fmt: skip
MAPS = ("t2d", "d2t")


def matches(raw: dict, names: Collection[str]) -> bool:
    return "speculators_model_type" in raw or "transformer_layer_config" in raw


def read_config(raw: dict, source: str, num_target_layers: int | None) -> DraftConfig:
    """Raises ValueError, one sentence, for another algorithm, a key that is missing or a value out of range."""
    algorithm = raw.get("speculators_model_type", "dspark")
    if algorithm not in ARCHITECTURES:
        raise ValueError(f"{source}: speculators_model_type is {algorithm!r}; this version reads dspark, dflash.")
    layers = raw.get("num_target_layers", num_target_layers)
    if layers is None:
        raise ValueError(f"{source} does not say how many layers its target has; name the target's folder.")
    return reading(lambda: _config(raw, source, algorithm == "dspark", int(layers)), source)


def _config(raw: dict, source: str, dspark: bool, layers: int) -> DraftConfig:
    nested = raw["transformer_layer_config"]
    qwen3 = nested.get("model_type", "qwen3") == "qwen3"
    if qwen3 and any(nested.get(key) for key in ("rope_theta", "rope_scaling")):
        nested = {"rope_parameters": None, **nested}  # transformers 4 wrote it: no default for what is said there
    decoder = read_decoder({**QWEN3_DEFAULTS, **nested} if qwen3 else nested, source)
    width = raw.get("target_hidden_size")
    if width not in (None, decoder.hidden_size):
        raise ValueError(f"target_hidden_size is {width}; it must be the draft's hidden_size, {decoder.hidden_size}.")
    heads = {**DSPARK_DEFAULTS, **raw} if dspark else {}
    from_anchor, confident = (
        bool(raw.get("sample_from_anchor", dspark)),
        bool(heads.get("enable_confidence_head", False)),
    )
    pruned = int(raw["draft_vocab_size"])
    return DraftConfig(
        decoder=decoder,
        block_size=drafted_tokens(int(raw["block_size"]), from_anchor),
        mask_token_id=int(raw["mask_token_id"]),
        target_layer_ids=tuple(int(i) - 1 for i in raw["aux_hidden_state_layer_ids"]),
        num_target_layers=layers,
        markov_rank=int(heads.get("markov_rank", 0)),
        markov_head_type=str(heads.get("markov_head_type", "vanilla")),
        enable_confidence_head=confident,
        confidence_head_with_markov=confident and bool(heads["confidence_head_with_markov"]),
        draft_vocab_size=None if pruned == decoder.vocab_size else pruned,
        num_anchors=int(raw.get("num_anchors", 512)),
        sample_from_anchor=from_anchor,
    )


def read_names(names: Collection[str]) -> dict[str, str]:
    """t2d says nothing that d2t does not."""
    return {name: name for name in names if name != "t2d"}


def write_config(config: DraftConfig, verifier: str | None) -> dict:
    """verifier: the target's name, as vLLM finds it."""
    plain = not (config.sample_from_anchor or config.markov_rank or config.enable_confidence_head)
    algorithm = "dflash" if plain else "dspark"
    heads = {
        "markov_rank": config.markov_rank,
        "markov_head_type": config.markov_head_type,
        "enable_confidence_head": config.enable_confidence_head,
        "confidence_head_with_markov": config.confidence_head_with_markov,
    }
    return {
        "architectures": [ARCHITECTURES[algorithm]],
        "speculators_model_type": algorithm,
        "transformer_layer_config": decoder_to_json(config.decoder),
        "draft_vocab_size": config.vocab_out,
        "block_size": config.block_slots,
        "aux_hidden_state_layer_ids": [i + 1 for i in config.target_layer_ids],
        "mask_token_id": config.mask_token_id,
        "sample_from_anchor": config.sample_from_anchor,
        **({} if plain else heads),
        "num_anchors": config.num_anchors,
        "num_target_layers": config.num_target_layers,
        "speculators_config": {
            "algorithm": algorithm,
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": config.block_size}],
            "verifier": {"name_or_path": verifier, "architectures": []},
        },
        "tie_word_embeddings": False,
    }


def write_names(names: Collection[str], config: DraftConfig) -> dict[str, str]:
    return {name: name for name in names}
