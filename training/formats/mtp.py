"""The layout of a trained MTP module (DeepSeek-V3, arXiv:2412.19437, section 2.2), which is this project's own.

Public MTP modules lie inside their targets' checkpoints (DeepSeek: model.layers.N.{enorm,hnorm,eh_proj,...}) and have
no folder apart, so this one borrows the flat keys of deepspec.py and DeepSeek's names: `enorm`, `hnorm`, `eh_proj`
(embedding first), `layers.{i}`, `norm`, `lm_head`. `method` "mtp" tells it apart. `embed_tokens` may be left out: it is
the target's.
"""

from __future__ import annotations

from collections.abc import Collection

from training.autoregressive import ArConfig
from training.formats.decoder import decoder_to_json, read_decoder, reading

NAME, KIND = "mtp", "mtp"
ARCHITECTURE = "MTPDraftModel"


def matches(raw: dict, names: Collection[str]) -> bool:
    return raw.get("method") == "mtp" or ARCHITECTURE in (raw.get("architectures") or [])


def read_config(raw: dict, source: str, num_target_layers: int | None) -> ArConfig:
    """Raises ValueError, one sentence, for a key that is missing or a value out of range."""
    return reading(
        lambda: ArConfig(
            decoder=read_decoder(raw, source),
            kind=KIND,
            block_size=int(raw["block_size"]),
            target_layer_ids=tuple(int(i) for i in raw["target_layer_ids"]),
            num_target_layers=int(raw["num_target_layers"]),
            draft_vocab_size=None if raw.get("draft_vocab_size") is None else int(raw["draft_vocab_size"]),
        ),
        source,
    )


def read_names(names: Collection[str]) -> dict[str, str]:
    return {name: name for name in names}


def write_config(config: ArConfig, verifier: str | None) -> dict:
    raw = {
        "architectures": [ARCHITECTURE],
        "method": "mtp",
        **decoder_to_json(config.decoder),
        "block_size": config.block_size,
        "num_target_layers": config.num_target_layers,
        "target_layer_ids": list(config.target_layer_ids),
    }
    return raw if config.draft_vocab_size is None else {**raw, "draft_vocab_size": config.draft_vocab_size}


def write_names(names: Collection[str], config: ArConfig) -> dict[str, str]:
    return {name: name for name in names}


def notes(config: ArConfig) -> list[str]:
    return []
