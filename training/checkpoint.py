"""Draft checkpoints on disk: loaded from any layout of training/formats, saved in the one of their kind.

Knows: what a draft borrows from its target, weight files, hashes. Refuses to know: config keys (formats/ does),
training state (trainer.py), ONNX, targets' own weights beyond the two tensors a draft may borrow.

Weights may be stored bf16 or fp16 and are loaded fp32; they may lie in several *.safetensors files.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from training.autoregressive import ArConfig, ArDraft
from training.draft import DraftConfig, DraftModel
from training.formats.layouts import OWN, StoredDraft, config_json, named, open_draft
from training.target import bare
from training.weights import StoredTensor, load_exactly, stored_tensors, write_checkpoint


def load_draft(folder: str | Path, target_folder: str | Path | None = None) -> DraftModel | ArDraft:
    """Loads a draft of any layout in fp32, in eval mode, without gradients.

    target_folder: the target's Hugging Face folder; needed when the checkpoint leaves out embed_tokens, lm_head or the
    target's number of layers.
    Raises FileNotFoundError without config.json or weights, ValueError for anything that does not fit.
    """
    config, stored = draft_tensors(folder, target_folder)
    with torch.device("meta"):
        model = draft_module(config)
    load_exactly(model, {name: t.numbers() for name, t in stored.items()}, str(folder))
    return model.eval().requires_grad_(False)


def draft_module(config: DraftConfig | ArConfig) -> DraftModel | ArDraft:
    """The module of a config, its weights not yet set."""
    return DraftModel(config) if config.kind == "parallel" else ArDraft(config)


def draft_tensors(
    folder: str | Path, target_folder: str | Path | None = None
) -> tuple[DraftConfig | ArConfig, dict[str, StoredTensor]]:
    """A draft's config and tensors, unread, those that it borrows from the target included. Arguments and errors as of
    load_draft; whether names and shapes fit the config is not checked."""
    return with_borrowed(open_draft(folder, target_folder), folder, target_folder)


def with_borrowed(
    opened: StoredDraft, folder: str | Path, target_folder: str | Path | None
) -> tuple[DraftConfig | ArConfig, dict[str, StoredTensor]]:
    """The config and tensors of an opened draft, those that it borrows from the target included."""
    config, state = opened.config, dict(opened.tensors)
    V, V_d = config.decoder.vocab_size, config.vocab_out
    if "embed_tokens.weight" not in state:
        state["embed_tokens.weight"] = borrow(target_folder, "embed_tokens.weight", str(folder))
    if "lm_head.weight" not in state:
        if V_d != V:
            raise ValueError(f"{folder} has no lm_head.weight; with V_d = {V_d} of {V} it must have its own.")
        tied = state["embed_tokens.weight"] if opened.raw.get("tie_word_embeddings") else None
        state["lm_head.weight"] = borrow(target_folder, "lm_head.weight", str(folder)) if tied is None else tied
    if V_d < V and "d2t" in state:
        check_d2t(state["d2t"].load(), V, str(folder))
    return config, state


def check_d2t(d2t: Tensor, vocab_size: int, source: str) -> None:
    """Raises ValueError unless i + d2t[i] are distinct, increasing target ids."""
    ids = torch.arange(d2t.numel()) + d2t.flatten()
    if bool((ids < 0).any() or (ids >= vocab_size).any() or (ids[1:] <= ids[:-1]).any()):
        raise ValueError(f"{source}: d2t must map to increasing target ids in 0..{vocab_size - 1}.")


def borrow(target_folder: str | Path | None, name: str, source: str) -> StoredTensor:
    """One of the target's tensors by its name in a DeepSpec checkpoint; a tied target lends its embedding as lm_head.
    Raises ValueError where there is no such tensor."""
    if target_folder is None:
        raise ValueError(f"{source} has no {name}; name the target's folder, whose copy it shares.")
    wanted = [name, "embed_tokens.weight"] if name == "lm_head.weight" else [name]
    stored = {bare(key): tensor for key, tensor in stored_tensors(Path(target_folder)).items()}
    for key in wanted:
        if key in stored:
            return stored[key]
    raise ValueError(f"{source} has no {name}, and neither has the target folder {target_folder}.")


def save_draft(
    model: DraftModel | ArDraft,
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    embed_tokens: bool = True,
    max_file_bytes: int | None = None,
) -> None:
    """Writes config.json and the weights (`dtype`; d2t stays int64). embed_tokens=False leaves out the frozen copy.

    How files are replaced, and max_file_bytes: weights.write_checkpoint.
    """
    folder = Path(folder)
    state = {
        name: (t if t.dtype == torch.int64 else t.to(dtype)).detach().contiguous().clone()
        for name, t in model.state_dict().items()
        if embed_tokens or name != "embed_tokens.weight"
    }
    layout = OWN[model.config.kind].NAME
    write_checkpoint(folder, config_json(model.config), named(state, layout, model.config), max_file_bytes)


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
