"""The z-lab DFlash layout, and ModelOpt's DSpark checkpoints, which are the same with the heads' weights beside the
backbone's.

Sources: github.com/z-lab/dflash at 44947fb (dflash/model.py) and github.com/NVIDIA/Model-Optimizer at a2fbac7
(modelopt/torch/export/plugins/hf_spec_export.py, modelopt/torch/speculative/plugins/modeling_dspark.py). Without
`shift_label` the block is [anchor, mask x (block_size - 1)] and each mask predicts the token at its own position;
ModelOpt's DSpark has `shift_label` true. The confidence head always sees the Markov embedding. Neither embedding nor
lm_head is stored: both are the target's.
"""

from __future__ import annotations

from collections.abc import Collection

from training.draft import DraftConfig
from training.formats.decoder import decoder_to_json, drafted_tokens, read_decoder, reading
from training.formats.specforge import layer_ids, refuse_pruned

NAME = "modelopt"
HEADS = {
    "markov_w1.": "markov_head.markov_w1.",
    "markov_w2.": "markov_head.markov_w2.",
    "gate_proj.": "markov_head.gate_proj.",
    "joint_proj.": "markov_head.joint_proj.",
    "confidence_proj.": "confidence_head.proj.",
}  # theirs: ours; no other name begins with one of theirs (the layers' gate_proj lies under layers.N.mlp)


def matches(raw: dict, names: Collection[str]) -> bool:
    method = raw.get("dflash_config")
    return isinstance(method, dict) and ("projector_type" not in method or "markov_w1.weight" in names)


def read_config(raw: dict, source: str, num_target_layers: int | None) -> DraftConfig:
    """Raises ValueError, one sentence, for another projector, a window, a missing key or a value out of range."""
    method = raw["dflash_config"]
    projector = method.get("projector_type")
    if projector not in (None, "dspark"):
        raise ValueError(f"{source}: projector_type is {projector!r}; this version reads 'dspark', or none for DFlash.")
    if method.get("use_swa"):
        raise ValueError(f"{source}: use_swa is true; only full attention is supported.")
    both = {**raw, **{key: value for key, value in method.items() if value is not None}}
    markov = projector == "dspark"
    from_anchor, confident = (
        bool(method.get("shift_label", markov)),
        markov and bool(method.get("use_confidence_head", False)),
    )
    return reading(
        lambda: DraftConfig(
            decoder=read_decoder(raw, source),
            block_size=drafted_tokens(int(both["block_size"]), from_anchor),
            mask_token_id=int(both["mask_token_id"]),
            target_layer_ids=layer_ids(both),
            num_target_layers=int(raw["num_target_layers"]),
            markov_rank=int(method["markov_rank"]) if markov else 0,
            markov_head_type=str(method.get("markov_head_type", "vanilla")).lower() if markov else "vanilla",
            enable_confidence_head=confident,
            confidence_head_with_markov=confident,
            num_anchors=int(raw.get("num_anchors", 512)),
            sample_from_anchor=from_anchor,
        ),
        source,
    )


def read_names(names: Collection[str]) -> dict[str, str]:
    prefix = lambda name: next((theirs for theirs in HEADS if name.startswith(theirs)), "")
    return {name: HEADS.get(prefix(name), "") + name.removeprefix(prefix(name)) for name in names}


def write_config(config: DraftConfig, verifier: str | None) -> dict:
    """Raises ValueError, one sentence, for a draft that this layout cannot say."""
    refuse_pruned(config, NAME)
    if config.enable_confidence_head and not config.confidence_head_with_markov:
        raise ValueError("the modelopt layout's confidence head sees the Markov embedding, and this draft's does not.")
    method: dict = {"mask_token_id": config.mask_token_id, "target_layer_ids": list(config.target_layer_ids)}
    if config.markov_rank:
        method |= {
            "projector_type": "dspark",
            "shift_label": config.sample_from_anchor,
            "markov_rank": config.markov_rank,
            "markov_head_type": config.markov_head_type,
            "use_confidence_head": config.enable_confidence_head,
        }
    elif config.sample_from_anchor:
        method["shift_label"] = True
    return {
        "architectures": ["DFlashDraftModel"],
        **decoder_to_json(config.decoder, nested_rope=False),
        "block_size": config.block_slots,
        "dflash_config": method,
        "num_anchors": config.num_anchors,
        "num_target_layers": config.num_target_layers,
    }


def write_names(names: Collection[str], config: DraftConfig) -> dict[str, str]:
    back = {ours: theirs for theirs, ours in HEADS.items()}
    prefix = lambda name: next((ours for ours in back if name.startswith(ours)), "")
    return {name: back.get(prefix(name), "") + name.removeprefix(prefix(name)) for name in names}
