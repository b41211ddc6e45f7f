"""The EAGLE-3 layout, as SpecForge writes it and SafeAILab's checkpoints have it: a Llama decoder's flat keys, weights
under `fc`, `midlayer`, `norm`, `lm_head`, with `d2t` [V_d] int64 offsets and `t2d` [V] bool.

Sources: github.com/SafeAILab/EAGLE at cb7e084 (eagle/traineagle3/{config.json,cnets.py,modeling_llama_kv.py}) and
github.com/sgl-project/SpecForge at a6b6b02 (specforge/modeling/draft/llama3_eagle.py,
specforge/algorithms/model_providers.py, configs/gpt-oss-20B-eagle3.json). Layer ids are outputs of decoder layers, in
`eagle_config`; without them the three of the paper's code: 1, n // 2 - 1 and n - 4 of n layers. A checkpoint has no
block size; BLOCK is the length of its training-time test. Beyond the layout, ours have `block_size`,
`num_target_layers`, layers behind the first as `layers.1..`, and Qwen3's norms of queries and keys where model_type
says so.
"""

from __future__ import annotations

from collections.abc import Collection

from training.autoregressive import ArConfig
from training.formats.decoder import decoder_to_json, read_decoder, reading

NAME, KIND = "eagle3", "eagle3"
ARCHITECTURE = "LlamaForCausalLMEagle3"
FIRST, OURS = "midlayer.", "layers.0."
BLOCK = 7


def matches(raw: dict, names: Collection[str]) -> bool:
    named = any("eagle3" in name.lower() for name in raw.get("architectures") or [])
    own = "transformer_layer_config" not in raw
    return own and (named or "eagle_config" in raw or any(name.startswith(FIRST) for name in names))


def default_layers(num_layers: int) -> tuple[int, ...]:
    """Low, middle and high; in a target too shallow for three, those that there are (-1: the embedding's output)."""
    highest = num_layers - 2
    return tuple(sorted({max(-1, min(i, highest)) for i in (1, num_layers // 2 - 1, num_layers - 4)}))


def read_config(raw: dict, source: str, num_target_layers: int | None) -> ArConfig:
    """Raises ValueError, one sentence, for a variant that computes something else, a missing key or a bad value."""
    for key, plain in (("fc_norm", False), ("norm_output", True), ("norm_before_residual", False)):
        if bool(raw.get(key, plain)) != plain:
            raise ValueError(f"{source}: {key} is {raw[key]!r}; only EAGLE-3 with {key} {plain} is supported.")
    if (width := raw.get("target_hidden_size")) not in (None, raw.get("hidden_size")):
        raise ValueError(f"{source}: target_hidden_size is {width}; it must be the draft's hidden_size.")
    layers = raw.get("num_target_layers", num_target_layers)
    if layers is None:
        raise ValueError(f"{source} does not say how many layers its target has; name the target's folder.")
    return reading(lambda: _config(raw, source, int(layers)), source)


def _config(raw: dict, source: str, layers: int) -> ArConfig:
    decoder = read_decoder(raw, source)
    ids = (raw.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    pruned = int(raw["draft_vocab_size"])
    return ArConfig(
        decoder=decoder,
        kind=KIND,
        block_size=int(raw.get("block_size", BLOCK)),
        target_layer_ids=default_layers(layers) if ids is None else tuple(int(i) for i in ids),
        num_target_layers=layers,
        draft_vocab_size=None if pruned == decoder.vocab_size else pruned,
    )


def read_names(names: Collection[str]) -> dict[str, str]:
    """t2d says nothing that d2t does not."""
    return {n: OURS + n.removeprefix(FIRST) if n.startswith(FIRST) else n for n in names if n != "t2d"}


def write_config(config: ArConfig, verifier: str | None) -> dict:
    return {
        "architectures": [ARCHITECTURE],
        **decoder_to_json(config.decoder, nested_rope=False),
        "block_size": config.block_size,
        "draft_vocab_size": config.vocab_out,
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": list(config.target_layer_ids),
            "use_aux_hidden_state": True,
        },
        "num_target_layers": config.num_target_layers,
    }


def write_names(names: Collection[str], config: ArConfig) -> dict[str, str]:
    return {n: FIRST + n.removeprefix(OURS) if n.startswith(OURS) else n for n in names}


def notes(config: ArConfig) -> list[str]:
    """What the layout's own loaders would not read."""
    said = []
    if config.decoder.num_hidden_layers > 1:
        said.append("this draft has layers behind the first, which EAGLE-3's own loaders do not know.")
    if config.decoder.qk_norm:
        said.append("this draft has norms of queries and keys, which EAGLE-3's own loaders do not know (Llama layers).")
    if len(config.target_layer_ids) != 3:
        said.append(
            f"this draft reads {len(config.target_layer_ids)} target layers; EAGLE-3's own loaders expect three."
        )
    return said
