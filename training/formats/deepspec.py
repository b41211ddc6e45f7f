"""The DeepSpec layout, which is this project's own: flat keys, weights under the names of training/draft.py.

Source: github.com/deepseek-ai/DeepSpec at afdfa7c (deepspec/modeling/dspark/{qwen3,gemma4}/{config,modeling}.py,
.../markov_head.py). Beyond it, and only written when used: `draft_vocab_size` with a tensor `d2t` [V_d] int64 (EAGLE-3:
target id of draft token i = i + d2t[i]); `sample_from_anchor` false, where block_size counts the anchor's slot, which
drafts nothing; no `embed_tokens.weight` (the target's is used); no `lm_head.weight` (the target's is used; only with
V_d = V); `embed_scale`, for Llama or Qwen3 layers behind the embedding of a Gemma4 target.
"""

from __future__ import annotations

from collections.abc import Collection

from training.draft import DraftConfig
from training.formats.decoder import decoder_to_json, drafted_tokens, family, read_decoder, reading

NAME = "deepspec"
ARCHITECTURES = {"qwen3": "Qwen3DSparkModel", "llama": "LlamaDSparkModel", "gemma4_text": "Gemma4DSparkModel"}
REQUIRED = ("block_size", "mask_token_id", "target_layer_ids", "num_target_layers")


def matches(raw: dict, names: Collection[str]) -> bool:
    return any(key in raw for key in ("block_size", "target_layer_ids")) and "dflash_config" not in raw


def config_to_json(config: DraftConfig) -> dict:
    """The flat config.json of a draft. Inverse of config_from_json."""
    raw = {
        "architectures": [ARCHITECTURES[family(config.decoder)]],
        **decoder_to_json(config.decoder),
        "block_size": config.block_slots,
        "confidence_head_with_markov": config.confidence_head_with_markov,
        "enable_confidence_head": config.enable_confidence_head,
        "markov_head_type": config.markov_head_type,
        "markov_rank": config.markov_rank,
        "mask_token_id": config.mask_token_id,
        "num_anchors": config.num_anchors,
        "num_target_layers": config.num_target_layers,
        "target_layer_ids": list(config.target_layer_ids),
    }
    if config.draft_vocab_size is not None:
        raw["draft_vocab_size"] = config.draft_vocab_size
    if not config.sample_from_anchor:
        raw["sample_from_anchor"] = False
    return raw


def config_from_json(raw: dict, source: str = "config.json") -> DraftConfig:
    """Reads the flat keys. Raises ValueError naming the key and what is allowed."""
    names = raw.get("architectures") or []
    if names and names[0] not in ARCHITECTURES.values():
        raise ValueError(f"{source}: architectures is {names}; this version reads {', '.join(ARCHITECTURES.values())}.")
    said = ARCHITECTURES.get(raw.get("model_type"))
    if names and said not in (None, names[0]):
        raise ValueError(f"{source}: architectures is {names} and model_type {raw['model_type']!r}, which is {said}'s; they must agree.")
    missing = [k for k in REQUIRED if k not in raw]
    if missing:
        raise ValueError(f"{source} is no DeepSpec draft: it lacks {', '.join(missing)}.")
    model_type = raw.get("model_type") or next((k for k, v in ARCHITECTURES.items() if v in names), "")
    from_anchor = bool(raw.get("sample_from_anchor", True))
    return reading(
        lambda: DraftConfig(
            decoder=read_decoder(raw, source, model_type),
            block_size=drafted_tokens(int(raw["block_size"]), from_anchor),
            mask_token_id=int(raw["mask_token_id"]),
            target_layer_ids=tuple(int(i) for i in raw["target_layer_ids"]),
            num_target_layers=int(raw["num_target_layers"]),
            markov_rank=int(raw.get("markov_rank", 0)),
            markov_head_type=str(raw.get("markov_head_type", "vanilla")),
            enable_confidence_head=bool(raw.get("enable_confidence_head", False)),
            confidence_head_with_markov=bool(raw.get("confidence_head_with_markov", False)),
            draft_vocab_size=None if raw.get("draft_vocab_size") is None else int(raw["draft_vocab_size"]),
            num_anchors=int(raw.get("num_anchors", 512)),
            sample_from_anchor=from_anchor,
        ),
        source,
    )


def read_config(raw: dict, source: str, num_target_layers: int | None) -> DraftConfig:
    return config_from_json(raw, source)


def read_names(names: Collection[str]) -> dict[str, str]:
    return {name: name for name in names}


def write_config(config: DraftConfig, verifier: str | None) -> dict:
    return config_to_json(config)


def write_names(names: Collection[str], config: DraftConfig) -> dict[str, str]:
    return {name: name for name in names}
