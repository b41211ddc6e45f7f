"""The bundle: five graphs, their manifest and the target's tokenizer files, written beside and renamed when complete.

Knows: docs/structures.md's manifest, what makes a draft fit a target. Refuses to know: how a graph is built or run.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Iterator

from training.checkpoint import checkpoint_hash, load_draft
from training.decoder_config import DecoderConfig, flat_keys
from training.draft import DraftConfig, DraftModel
from training.formats.layouts import open_draft
from training.target import TargetModel

from .graph import OPSET, Graph
from .sources import DraftSource, TargetSource

FORMAT_VERSION = 2
DEFAULT_MAX_CONTEXT = 2048
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
BUILDER_PACKAGES = ("onnx", "onnxruntime", "torch")


def check_pair(target: DecoderConfig, draft: DraftConfig, max_context: int | None) -> int:
    """The max_context to build for (None: 2048, or less for a target with fewer positions).

    Raises ValueError, one sentence, when the draft was made for another target or max_context does not fit.
    """
    wanted = {
        "hidden_size": (draft.decoder.hidden_size, target.hidden_size),
        "vocab_size": (draft.decoder.vocab_size, target.vocab_size),
        "num_target_layers": (draft.num_target_layers, target.num_hidden_layers),
    }
    for field, (have, want) in wanted.items():
        if have != want:
            raise ValueError(f"the draft was made for another target: its {field} is {have}, the target's is {want}.")
    least, most = 2 * draft.block_size, target.max_position_embeddings
    max_context = min(DEFAULT_MAX_CONTEXT, most) if max_context is None else max_context
    if not least <= max_context <= most:
        raise ValueError(f"max_context is {max_context}; it must lie in {least}..{most} (the target's max_position_embeddings).")
    return max_context


def target_entry(folder: Path, config: DecoderConfig) -> dict:
    """The manifest's `target`. End-of-sequence ids come from generation_config.json, else from config.json."""
    raw = flat_keys(json.loads((folder / "config.json").read_text()))
    generation = folder / "generation_config.json"
    raw_generation = json.loads(generation.read_text()) if generation.is_file() else {}
    eos = raw_generation.get("eos_token_id")
    eos = raw.get("eos_token_id") if eos is None else eos
    entry = {
        "name": folder.resolve().name,
        "model_type": config.model_type,
        "hash": checkpoint_hash(folder),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "eos_token_ids": [] if eos is None else [eos] if isinstance(eos, int) else list(eos),
    }
    if config.gemma4:
        entry["caches"] = [[s.num_key_value_heads, s.head_dim] for s in config.cached_layers]
    if raw.get("bos_token_id") is not None:
        entry["bos_token_id"] = raw["bos_token_id"]
    return entry


def draft_entry(folder: Path, config: DraftConfig) -> dict:
    """The manifest's `draft`."""
    return {
        "hash": checkpoint_hash(folder),
        "block_size": config.block_size,
        "depth": config.decoder.num_hidden_layers,
        "num_kv_heads": config.decoder.layer(0).num_key_value_heads,
        "head_dim": config.decoder.layer(0).head_dim,
        "layer_ids": list(config.target_layer_ids),
        "mask_token_id": config.mask_token_id,
        "markov_rank": config.markov_rank,
        "markov_head_type": config.markov_head_type,
        "has_confidence": config.enable_confidence_head,
        "confidence_with_markov": config.enable_confidence_head and config.confidence_head_with_markov,
        "vocab_size": config.vocab_out,
        **({} if config.sample_from_anchor else {"sample_from_anchor": False}),
        **({} if config.kind == "parallel" else {"kind": config.kind}),
    }


def engine_entry(g: Graph, bundle: Path) -> dict:
    """The manifest's `engines.NAME` for a graph saved under bundle/onnx/NAME."""
    path = Path("onnx") / g.name / "model.onnx"
    data = bundle / path.with_name("model.onnx.data")
    specs = lambda tensors: [{"name": t.name, "dtype": t.dtype, "shape": list(t.shape)} for t in tensors]
    entry = {"path": str(path), "sha256": file_hash(bundle / path)}
    if data.is_file():
        entry["data_sha256"] = file_hash(data)
    return {**entry, "inputs": specs(g.inputs), "outputs": specs(g.outputs)}


def file_hash(path: Path) -> str:
    """sha256, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(
    bundle: Path, engines: dict[str, dict], target: dict, draft: dict, *, backend: str, dtype: str, max_context: int,
    parity: list[dict], calibration: dict | None = None, tensorrt: dict | None = None, emulates: str | None = None,
    kernels: dict | None = None,
) -> None:  # fmt: skip
    """engines: {name: engine_entry, with `plans` where there are any}; tensorrt: engines/trt/plans.py's settings;
    emulates: the TensorRT dtype whose roundings an fp32 bundle applies; kernels: path and sha256 of the CPU operators."""
    manifest = {
        "format_version": FORMAT_VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "backend": backend,
        "dtype": dtype,
        "target": target,
        "draft": draft,
        "max_context": max_context,
        "engines": engines,
        "builder": {**{name: version(name) for name in BUILDER_PACKAGES}, "opset": OPSET},
        "parity": parity,
        **({"emulates": emulates} if emulates else {}),
        **({"kernels": kernels} if kernels else {}),
        **({"tensorrt": tensorrt} if tensorrt else {}),
        **({"calibration": calibration} if calibration else {}),
    }
    (bundle / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def kept_calibration(out: Path, target: dict, draft: dict) -> dict | None:
    """The calibration of the bundle that `out` holds now, where it was fitted for these two checkpoints; else None.

    target, draft: the new manifest's entries. A change of precision or of a graph does not undo it: it corrects the head."""
    try:
        calibration = json.loads((out / "manifest.json").read_text())["calibration"]
        hashes = calibration["draft_hash"], calibration["target_hash"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    same_block = len(calibration.get("sampled") or ()) == draft["block_size"]
    return calibration if same_block and hashes == (draft["hash"], target["hash"]) else None


def copy_tokenizer(target: Path, bundle: Path) -> None:
    """Copies what there is; a chat template inside tokenizer_config.json also becomes chat_template.jinja."""
    for name in TOKENIZER_FILES:
        if (target / name).is_file():
            shutil.copyfile(target / name, bundle / name)
    config = bundle / "tokenizer_config.json"
    if config.is_file() and not (bundle / "chat_template.jinja").is_file():
        template = json.loads(config.read_text()).get("chat_template")
        if isinstance(template, list):  # named templates: the default one
            template = next((t["template"] for t in template if t.get("name") == "default"), None)
        if template:
            (bundle / "chat_template.jinja").write_text(template)


@contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """Yields a folder beside `out`; it becomes `out` when the block ends well and is removed when it does not.

    Raises ValueError when `out` is something other than a bundle, which is never replaced.
    """
    if out.exists() and not (out / "manifest.json").is_file() and (out.is_file() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not a bundle (no manifest.json); choose another --out or remove it.")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (out.with_name(f"{out.name}.{word}-{os.getpid()}") for word in ("partial", "old"))
    try:
        partial.mkdir()
        yield partial
        if out.exists():
            os.rename(out, old)
        os.rename(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not out.exists():
            os.rename(old, out)
        shutil.rmtree(old, ignore_errors=True)


def open_sources(
    target_folder: Path, draft_folder: Path, max_context: int | None
) -> tuple[TargetSource, DraftSource, int]:
    """Both checkpoints, checked against each other and against their own configs, and the max_context to build for. No
    weight is read."""
    draft_config, max_context = check_folders(target_folder, draft_folder, max_context)
    draft = DraftSource.open(draft_folder, target_folder)
    return TargetSource.open(target_folder, draft_config.target_layer_ids), draft, max_context


def load_models(target_folder: Path, draft_folder: Path, max_context: int | None) -> tuple[TargetModel, DraftModel, int]:
    """As open_sources, with every weight in memory as float32: what parity compares with."""
    draft_config, max_context = check_folders(target_folder, draft_folder, max_context)
    draft = load_draft(draft_folder, target_folder)
    return TargetModel.from_pretrained(target_folder, draft_config.target_layer_ids), draft, max_context


def check_folders(target_folder: Path, draft_folder: Path, max_context: int | None) -> tuple[DraftConfig, int]:
    """The draft's config and the max_context to build for. Raises ValueError or FileNotFoundError, one sentence."""
    for what, folder in (("target", target_folder), ("draft", draft_folder)):
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"--{what} {folder}: there is no such folder with a config.json.")
    raw = json.loads((target_folder / "config.json").read_text())
    config = open_draft(draft_folder, target_folder).config
    return config, check_pair(DecoderConfig.from_hf(raw), config, max_context)
