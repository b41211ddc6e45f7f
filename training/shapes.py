"""Random checkpoints of published shapes: what a real model's export takes in memory, time and disk, without it.

    python -m training.shapes --shape qwen3-0.6b --out build/models/qwen3-0.6b --draft build/models/qwen3-0.6b-draft

Knows: the shapes, how a target's and a draft's folders look. Refuses to know: what such weights would compute (nothing).

Sources: Qwen/Qwen3-0.6B and Qwen/Qwen3-4B (config.json); deepseek-ai/dspark_qwen3_4b_block7 (5 layers of the target's
shape, rank 256, block 7). gemma4-defaults is no published model: it has the sizes that transformers' Gemma4TextConfig
has for want of others, inputs of each layer's own among them, and a softcap of 30. Weights are bfloat16, drawn shard by
shard: no more than one shard is in memory.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import typer
from safetensors.torch import save_file
from torch import Tensor

from training.decoder_config import DecoderConfig, RopeConfig
from training.draft import DraftConfig, DraftModel
from training.formats.deepspec import config_to_json
from training.gemma4_config import FULL, SLIDING, Gemma4Config, write_gemma4
from training.target import TIED, TargetModel

_QWEN3 = DecoderConfig(
    vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
    num_key_value_heads=8, head_dim=128, rms_norm_eps=1e-6, rope=RopeConfig(theta=1e6), max_position_embeddings=40960,
    qk_norm=True, tie_word_embeddings=True, model_type="qwen3",
)  # fmt: skip
_GEMMA4 = DecoderConfig(
    vocab_size=262144, hidden_size=2304, intermediate_size=9216, num_hidden_layers=30, num_attention_heads=8,
    num_key_value_heads=4, head_dim=256, rms_norm_eps=1e-6, rope=RopeConfig(), max_position_embeddings=131072,
    qk_norm=True, tie_word_embeddings=True, model_type="gemma4_text", embed_scale=2304**0.5, logit_softcap=30.0,
    gemma4=Gemma4Config(
        layer_types=(*(SLIDING,) * 5, FULL) * 5, sliding_window=512, global_head_dim=512, num_global_key_value_heads=4,
        full_rope=RopeConfig(theta=1e6, rope_type="proportional", rotated_share=0.25), per_layer_size=256,
    ),
)  # fmt: skip
SHAPES = {
    "gemma4-defaults": _GEMMA4,
    "qwen3-0.6b": _QWEN3,
    "qwen3-4b": replace(_QWEN3, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32),
}
ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM", "gemma4_text": "Gemma4ForCausalLM"}
DRAFT_LAYERS, BLOCK, RANK, MASK, EOS = 5, 7, 256, 151669, [151645, 151643]
SHARD_BYTES = 1 << 30


def draft_shape(target: DecoderConfig) -> DraftConfig:
    """The draft of dspark_qwen3_4b_block7's kind for a target: the same width, features of five layers spread out."""
    layers = target.num_hidden_layers
    spread = {round(1 + i * (layers - 4) / 4) for i in range(5)} if layers > 8 else {-1, layers - 2}
    return DraftConfig(
        decoder=target.for_draft(DRAFT_LAYERS),
        block_size=BLOCK,
        mask_token_id=min(MASK, target.vocab_size - 1),
        target_layer_ids=tuple(sorted(spread)),
        num_target_layers=layers,
        markov_rank=RANK,
        enable_confidence_head=True,
        confidence_head_with_markov=True,
    )


def write_random(
    target: DecoderConfig, out: Path, *, draft: Path | None = None, seed: int = 0, shard_bytes: int = SHARD_BYTES
) -> int:
    """Writes a random target of this shape to `out`, and its draft to `draft` where one is named; gives their bytes."""
    with torch.device("meta"):
        model = TargetModel(target)
    state = model.state_dict()
    if target.tie_word_embeddings:
        del state[TIED]
    names = {("" if name == TIED else "model.") + name: tensor for name, tensor in state.items()}
    written = write_shards(names, out, seed, shard_bytes)
    raw = write_gemma4(target) if target.gemma4 else {
        "model_type": target.model_type,
        "vocab_size": target.vocab_size,
        "hidden_size": target.hidden_size,
        "intermediate_size": target.intermediate_size,
        "num_hidden_layers": target.num_hidden_layers,
        "num_attention_heads": target.num_attention_heads,
        "num_key_value_heads": target.num_key_value_heads,
        "head_dim": target.head_dim,
        "rms_norm_eps": target.rms_norm_eps,
        "max_position_embeddings": target.max_position_embeddings,
        "rope_theta": target.rope.theta,
        "tie_word_embeddings": target.tie_word_embeddings,
        "hidden_act": "silu",
    }  # fmt: skip
    raw |= {
        "architectures": [ARCHITECTURES[target.model_type]],
        "torch_dtype": "bfloat16",
        "eos_token_id": [min(i, target.vocab_size - 1) for i in EOS],
    }
    (out / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    if draft is None:
        return written
    config = draft_shape(target)
    with torch.device("meta"):
        module = DraftModel(config)
    written += write_shards(module.state_dict(), draft, seed + 1, shard_bytes)
    (draft / "config.json").write_text(json.dumps(config_to_json(config), indent=2) + "\n")
    return written


def write_shards(names: dict[str, Tensor], folder: Path, seed: int, shard_bytes: int) -> int:
    """names: tensors (of the meta device) whose shapes are to be filled. Gives the bytes written."""
    folder.mkdir(parents=True, exist_ok=True)
    generator, shards = torch.Generator().manual_seed(seed), list(split(names, shard_bytes))
    where, total = {}, 0
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {name: drawn(name, names[name].shape, generator) for name in shard}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, file)
        total += (folder / file).stat().st_size
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    return total


def split(names: dict[str, Tensor], shard_bytes: int) -> Iterator[list[str]]:
    """Names in order, as many a shard as fit (one at least), two bytes a number."""
    shard, used = [], 0
    for name, tensor in names.items():
        size = 2 * tensor.numel()
        if shard and used + size > shard_bytes:
            yield shard
            shard, used = [], 0
        shard.append(name)
        used += size
    yield shard


def drawn(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """bfloat16 [shape]: norms near 1, matrices of gain about 1; in blocks of rows, so that no float32 copy is whole."""
    tensor = torch.empty(shape, dtype=torch.bfloat16)
    scale = 1.0 if "embed_tokens" in name else shape[-1] ** -0.5
    for part in tensor.split(max(1, (1 << 24) // max(1, tensor[0].numel()))):
        noise = torch.randn(part.shape, generator=generator)
        near_one = len(shape) == 1 and ("norm" in name or "layer_scalar" in name)
        part.copy_(1 + 0.1 * noise if near_one else noise * scale)
    return tensor


def main(
    shape: str = typer.Option(..., help=f"one of {', '.join(SHAPES)}"),
    out: Path = typer.Option(..., help="folder of the target to write"),
    draft: Path = typer.Option(None, help="folder of its draft to write: 5 layers, rank 256, block 7"),
    layers: int = typer.Option(None, help="decoder layers of the target instead of the shape's, 2 or more"),
    seed: int = 0,
) -> None:
    """Write a random target of a published shape, and a draft for it."""
    if shape not in SHAPES:
        print(f"--shape is {shape!r}; it must be one of {', '.join(SHAPES)}.", file=sys.stderr)
        raise typer.Exit(1)
    if layers is not None and layers < 2:
        print(f"--layers is {layers}; it must be 2 or more.", file=sys.stderr)
        raise typer.Exit(1)
    config = SHAPES[shape] if layers is None else replace(SHAPES[shape], num_hidden_layers=layers)
    written = write_random(config, out, draft=draft, seed=seed)
    print(f"wrote {out}{f' and {draft}' if draft else ''}: {written / 1e6:.0f} MB, bfloat16, random")


if __name__ == "__main__":
    typer.run(main)
