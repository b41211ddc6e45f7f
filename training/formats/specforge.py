"""The SpecForge layout (also RadixArk's checkpoints): the method's keys in `dflash_config`, heads under their own
modules.

Source: github.com/sgl-project/SpecForge at a6b6b02 (specforge/modeling/draft/{dflash,dspark}.py,
configs/qwen3-4b-dspark.json, scripts/gates/normalize_dflash_export.py). `projector_type` "dspark" drafts from the
anchor's slot (its labels are p+1 .. p+block_size); "dflash" does not. The checkpoint has neither embedding nor lm_head:
both are the target's. Files that were normalised for serving repeat the head's keys at the top level; early ones keep
the heads under `logit_head.`.
"""

from __future__ import annotations

from collections.abc import Collection

from training.draft import DraftConfig
from training.formats.decoder import decoder_to_json, drafted_tokens, read_decoder, reading

NAME = "specforge"
PROJECTORS = ("dspark", "dflash")
EARLY_PREFIX = "logit_head."
AUTO_MAP = {"dspark": "dspark.DSparkDraftModel", "dflash": "dflash.DFlashDraftModel"}


def matches(raw: dict, names: Collection[str]) -> bool:
    method = raw.get("dflash_config")
    return isinstance(method, dict) and "projector_type" in method and "markov_w1.weight" not in names


def read_config(raw: dict, source: str, num_target_layers: int | None) -> DraftConfig:
    """Raises ValueError, one sentence, for another projector, a key that is missing or a value out of range."""
    method = raw["dflash_config"]
    projector = method.get("projector_type", "dflash")
    if projector not in PROJECTORS:
        raise ValueError(f"{source}: projector_type is {projector!r}; this version reads {', '.join(PROJECTORS)}.")
    both = {**raw, **{key: value for key, value in method.items() if value is not None}}
    from_anchor = projector == "dspark" or bool(method.get("shift_label", False))
    markov = projector == "dspark"
    confident = bool(both.get("enable_confidence_head", float(both.get("confidence_head_alpha") or 0) > 0)) and markov
    return reading(
        lambda: DraftConfig(
            decoder=read_decoder(raw, source),
            block_size=drafted_tokens(int(both["block_size"]), from_anchor),
            mask_token_id=int(both["mask_token_id"]),
            target_layer_ids=layer_ids(both),
            num_target_layers=int(raw["num_target_layers"]),
            markov_rank=int(both.get("markov_rank") or 0) if markov else 0,
            markov_head_type=str(both.get("markov_head_type", "vanilla")).lower(),
            enable_confidence_head=confident,
            confidence_head_with_markov=confident and bool(both.get("confidence_head_with_markov", False)),
            num_anchors=int(raw.get("num_anchors", 512)),
            sample_from_anchor=from_anchor,
        ),
        source,
    )


def layer_ids(both: dict) -> tuple[int, ...]:
    """target_layer_ids, or what DFlash takes without them: as many as the draft has layers, from 1 to the last but two
    (github.com/z-lab/dflash at 44947fb, dflash/model.py; SpecForge has the same rule)."""
    if "target_layer_ids" in both:
        return tuple(int(i) for i in both["target_layer_ids"])
    layers, depth = int(both["num_target_layers"]), int(both["num_hidden_layers"])
    if depth == 1:
        return (layers // 2,)
    return tuple(round(1 + i * (layers - 4) / (depth - 1)) for i in range(depth))


def read_names(names: Collection[str]) -> dict[str, str]:
    return {name: name.removeprefix(EARLY_PREFIX) for name in names}


def write_config(config: DraftConfig, verifier: str | None) -> dict:
    """Raises ValueError, one sentence, for a draft that this layout cannot say."""
    refuse_pruned(config, NAME)
    projector = "dspark" if config.sample_from_anchor else "dflash"
    if projector == "dflash" and (config.markov_rank or config.enable_confidence_head):
        raise ValueError(
            "the specforge layout drafts from the anchor's slot where there is a Markov or confidence head; this draft "
            "has sample_from_anchor false."
        )
    dec = config.decoder
    method = {
        "mask_token_id": config.mask_token_id,
        "target_layer_ids": list(config.target_layer_ids),
        "projector_type": projector,
    }
    if projector == "dspark":
        method |= {
            "attention_mode": "gqa" if dec.num_key_value_heads < dec.num_attention_heads else "mha",
            "markov_rank": config.markov_rank,
            "markov_head_type": config.markov_head_type,
            "confidence_head_alpha": 1.0 if config.enable_confidence_head else 0.0,
            "enable_confidence_head": config.enable_confidence_head,
            "confidence_head_with_markov": config.confidence_head_with_markov,
        }
    return {
        "architectures": [AUTO_MAP[projector].split(".")[1]],
        "auto_map": {"AutoModel": AUTO_MAP[projector]},
        **decoder_to_json(dec, nested_rope=False),
        "block_size": config.block_slots,
        "dflash_config": method,
        "num_anchors": config.num_anchors,
        "num_target_layers": config.num_target_layers,
    }


def write_names(names: Collection[str], config: DraftConfig) -> dict[str, str]:
    return {name: name for name in names}


def refuse_pruned(config: DraftConfig, layout: str) -> None:
    """A layout whose drafts use the target's own lm_head has no place for a pruned vocabulary."""
    if config.vocab_out != config.decoder.vocab_size:
        raise ValueError(
            f"the {layout} layout has no draft vocabulary, and this draft has one of {config.vocab_out} of "
            f"{config.decoder.vocab_size} tokens; write deepspec or speculators."
        )
