"""Draft checkpoints on disk: the DeepSpec layout (flat config.json + safetensors), and what this project adds to it.

Knows: config keys, weight files, hashes. Refuses to know: training state (trainer.py), ONNX, targets' own weights
beyond the two tensors a draft may borrow.

Beyond DeepSpec, and only written when used: `draft_vocab_size` with a tensor `d2t` [V_d] int64 (EAGLE-3: target id of
draft token i = i + d2t[i]); no `embed_tokens.weight` (the target's is used); no `lm_head.weight` (the target's is used;
only with V_d = V). Weights may be stored bf16 or fp16 and are loaded fp32; they may lie in several *.safetensors files.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from training.decoder_config import DecoderConfig
from training.draft import DraftConfig, DraftModel
from training.weights import load_exactly, read_safetensors

ARCHITECTURES = {"qwen3": "Qwen3DSparkModel", "llama": "LlamaDSparkModel"}
LAYER_KINDS = ("full_attention",)
REQUIRED = ("block_size", "mask_token_id", "target_layer_ids", "num_target_layers")


def config_to_json(config: DraftConfig) -> dict:
    """The flat config.json of a draft. Inverse of config_from_json."""
    dec, family = config.decoder, "qwen3" if config.decoder.qk_norm else "llama"
    plain = dec.rope.rope_type == "default"
    rope = {"rope_type": "default"} if plain else {k: v for k, v in asdict(dec.rope).items() if k != "theta"}
    raw = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "attention_bias": dec.attention_bias,
        "block_size": config.block_size,
        "confidence_head_with_markov": config.confidence_head_with_markov,
        "enable_confidence_head": config.enable_confidence_head,
        "head_dim": dec.head_dim,
        "hidden_act": "silu",
        "hidden_size": dec.hidden_size,
        "intermediate_size": dec.intermediate_size,
        "layer_types": [LAYER_KINDS[0]] * dec.num_hidden_layers,
        "markov_head_type": config.markov_head_type,
        "markov_rank": config.markov_rank,
        "mask_token_id": config.mask_token_id,
        "max_position_embeddings": dec.max_position_embeddings,
        "mlp_bias": dec.mlp_bias,
        "num_anchors": config.num_anchors,
        "num_attention_heads": dec.num_attention_heads,
        "num_hidden_layers": dec.num_hidden_layers,
        "num_key_value_heads": dec.num_key_value_heads,
        "num_target_layers": config.num_target_layers,
        "rms_norm_eps": dec.rms_norm_eps,
        "rope_parameters": {"rope_theta": dec.rope.theta, **rope},
        "target_layer_ids": list(config.target_layer_ids),
        "tie_word_embeddings": False,
        "vocab_size": dec.vocab_size,
    }
    if config.draft_vocab_size is not None:
        raw["draft_vocab_size"] = config.draft_vocab_size
    return raw


def config_from_json(raw: dict, source: str = "config.json") -> DraftConfig:
    """Reads the flat keys. Raises ValueError naming the key and what is allowed."""
    names = raw.get("architectures") or []
    if names and names[0] not in ARCHITECTURES.values():
        raise ValueError(f"{source}: architectures is {names}; this version reads {', '.join(ARCHITECTURES.values())}.")
    missing = [k for k in REQUIRED if k not in raw]
    if missing:
        raise ValueError(f"{source} is no DeepSpec draft: it lacks {', '.join(missing)}.")
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{source}: hidden_act is {raw['hidden_act']!r}; only 'silu' is supported.")
    if other := set(raw.get("layer_types") or ()) - set(LAYER_KINDS):
        raise ValueError(f"{source}: layer_types holds {sorted(other)}; only 'full_attention' is supported.")
    family = raw.get("model_type") or next((k for k, v in ARCHITECTURES.items() if v in names), "")
    try:
        return DraftConfig(
            decoder=DecoderConfig.from_hf(raw, model_type=family),
            block_size=int(raw["block_size"]),
            mask_token_id=int(raw["mask_token_id"]),
            target_layer_ids=tuple(int(i) for i in raw["target_layer_ids"]),
            num_target_layers=int(raw["num_target_layers"]),
            markov_rank=int(raw.get("markov_rank", 0)),
            markov_head_type=str(raw.get("markov_head_type", "vanilla")),
            enable_confidence_head=bool(raw.get("enable_confidence_head", False)),
            confidence_head_with_markov=bool(raw.get("confidence_head_with_markov", False)),
            draft_vocab_size=None if raw.get("draft_vocab_size") is None else int(raw["draft_vocab_size"]),
            num_anchors=int(raw.get("num_anchors", 512)),
        )
    except KeyError as error:
        raise ValueError(f"{source} lacks {error.args[0]}.") from None
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def load_draft(folder: str | Path, target_folder: str | Path | None = None) -> DraftModel:
    """Loads a draft in fp32, in eval mode, without gradients.

    target_folder: the target's Hugging Face folder; needed when the checkpoint leaves out embed_tokens or lm_head.
    Raises FileNotFoundError without config.json or weights, ValueError for anything that does not fit.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json.")
    raw = json.loads((folder / "config.json").read_text())
    config = config_from_json(raw, str(folder / "config.json"))
    state = {name: t if t.dtype == torch.int64 else t.float() for name, t in read_safetensors(folder).items()}
    V, V_d = config.decoder.vocab_size, config.vocab_out
    if "embed_tokens.weight" not in state:
        state["embed_tokens.weight"] = borrow(target_folder, "embed_tokens.weight", str(folder))
    if "lm_head.weight" not in state:
        if V_d != V:
            raise ValueError(f"{folder} has no lm_head.weight; with V_d = {V_d} of {V} it must have its own.")
        tied = state["embed_tokens.weight"] if raw.get("tie_word_embeddings") else None
        state["lm_head.weight"] = borrow(target_folder, "lm_head.weight", str(folder)) if tied is None else tied
    if V_d < V and "d2t" in state:
        check_d2t(state["d2t"], V, str(folder))
    with torch.device("meta"):
        model = DraftModel(config)
    load_exactly(model, state, str(folder))
    return model.eval().requires_grad_(False)


def check_d2t(d2t: Tensor, vocab_size: int, source: str) -> None:
    """Raises ValueError unless i + d2t[i] are distinct, increasing target ids."""
    ids = torch.arange(d2t.numel()) + d2t.flatten()
    if bool((ids < 0).any() or (ids >= vocab_size).any() or (ids[1:] <= ids[:-1]).any()):
        raise ValueError(f"{source}: d2t must map to increasing target ids in 0..{vocab_size - 1}.")


def borrow(target_folder: str | Path | None, name: str, source: str) -> Tensor:
    """One of the target's tensors in fp32, by its name in a DeepSpec checkpoint; a tied target lends its embedding as
    lm_head. Raises ValueError where there is no such tensor."""
    if target_folder is None:
        raise ValueError(f"{source} has no {name}; name the target's folder, whose copy it shares.")
    names = [f"model.{name}", name]
    if name == "lm_head.weight":
        names += ["model.embed_tokens.weight", "embed_tokens.weight"]
    files = {}
    for file in sorted(Path(target_folder).glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            files.update({key: file for key in handle.keys()})
    for key in names:
        if key in files:
            with safe_open(files[key], framework="pt") as handle:
                return handle.get_tensor(key).float()
    raise ValueError(f"{source} has no {name}, and neither has the target folder {target_folder}.")


def save_draft(
    model: DraftModel,
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    embed_tokens: bool = True,
    max_file_bytes: int | None = None,
) -> None:
    """Writes config.json and the weights (`dtype`; d2t stays int64). embed_tokens=False leaves out the frozen copy.

    Every file is written beside and renamed, config.json first, so that with one weight file a reader sees the old or
    the new checkpoint, never half of one. max_file_bytes splits the weights into model-0000i-of-0000n.safetensors.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: (t if t.dtype == torch.int64 else t.to(dtype)).detach().contiguous().clone()
        for name, t in model.state_dict().items()
        if embed_tokens or name != "embed_tokens.weight"
    }
    groups: list[dict[str, Tensor]] = [{}]
    for name, t in state.items():
        used = sum(x.nbytes for x in groups[-1].values())
        if max_file_bytes and groups[-1] and used + t.nbytes > max_file_bytes:
            groups.append({})
        groups[-1][name] = t
    n = len(groups)
    files = ["model.safetensors"] if n == 1 else [f"model-{i + 1:05}-of-{n:05}.safetensors" for i in range(n)]
    config = folder / "config.json"
    config.with_suffix(".part").write_text(json.dumps(config_to_json(model.config), indent=2) + "\n")
    os.replace(config.with_suffix(".part"), config)
    for file, group in zip(files, groups):
        part = folder / (file + ".part")
        save_file(group, part, metadata={"format": "pt"})
        os.replace(part, folder / file)
    for stale in set(folder.glob("*.safetensors")) - {folder / f for f in files}:
        stale.unlink()


def checkpoint_hash(folder: str | Path) -> str:
    """sha256 (hex) over the bytes of the folder's *.safetensors files in name order."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no *.safetensors file.")
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            while chunk := handle.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()
