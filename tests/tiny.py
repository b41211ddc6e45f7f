"""Tiny random targets and drafts on disk, for every room's tests. Weights are scaled so that distributions are neither
flat nor deterministic; a draft's Markov head knows the target's bigrams, so that some of its tokens are accepted."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from training.checkpoint import save_draft
from training.decoder_config import DecoderConfig, RopeConfig
from training.draft import DraftConfig, DraftModel
from training.target import PackedBatch, TargetModel

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 32, 4, 2, 8, 64


def decoder_config(
    family: str, vocab: int, layers: int, *, tied: bool = False, bias: bool = False, kv_heads: int = KV_HEADS,
    head_dim: int = HEAD_DIM,
) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=vocab, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=kv_heads, head_dim=head_dim, rms_norm_eps=1e-5,
        rope=RopeConfig(theta=10000.0), max_position_embeddings=512, qk_norm=family == "qwen3", attention_bias=bias,
        mlp_bias=bias, tie_word_embeddings=tied, model_type=family,
    )


def randomize(module: torch.nn.Module, seed: int, logit_scale: float = 1.6) -> None:
    """Norm weights near 1, matrices of gain about 1, an lm_head whose logits have a deviation of about logit_scale."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() == 1:
                p.copy_(1 + 0.1 * noise if "norm" in name else 0.1 * noise)
            elif "embed_tokens" in name or "markov_w1" in name:
                p.copy_(2 * noise)  # the token itself outweighs its context: bigrams then predict something
            else:
                p.copy_(noise * p.shape[1] ** -0.5 * (logit_scale if "lm_head" in name else 1.0))
    module.eval().requires_grad_(False)


def make_target(
    folder: str | Path, *, family: str = "llama", vocab: int = 64, layers: int = 3, seed: int = 0, tied: bool = False,
    bias: bool = False, eos: int | list[int] | None = None, kv_heads: int = KV_HEADS, head_dim: int = HEAD_DIM,
) -> Path:
    """Writes a Hugging Face folder (config.json, generation_config.json, model.safetensors) of a random target."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    c = decoder_config(family, vocab, layers, tied=tied, bias=bias, kv_heads=kv_heads, head_dim=head_dim)
    model = TargetModel(c)
    randomize(model, seed)
    state = {("" if n.startswith("lm_head") else "model.") + n: t.clone() for n, t in model.state_dict().items()}
    if tied:
        model.embed_tokens.weight.mul_(HIDDEN**-0.5 * 0.8)  # it is the lm_head too
        state = {"model." + n: t.clone() for n, t in model.state_dict().items() if not n.startswith("lm_head")}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    eos = vocab - 1 if eos is None else eos
    raw = {
        "architectures": [{"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[family]], "model_type": family,
        "vocab_size": vocab, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": layers,
        "num_attention_heads": HEADS, "num_key_value_heads": kv_heads, "head_dim": head_dim, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attention_bias": bias, "mlp_bias": bias, "tie_word_embeddings": tied, "hidden_act": "silu",
        "bos_token_id": 0, "eos_token_id": eos,
    }
    (folder / "config.json").write_text(json.dumps(raw, indent=1))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": eos}))
    return folder


def make_draft(
    folder: str | Path, target_folder: str | Path, *, head: str = "vanilla", rank: int = 16, confidence: str | None = "markov",
    layer_ids: tuple[int, ...] = (0, 1), draft_vocab: int | None = None, block_size: int = 4, layers: int = 1, seed: int = 1,
) -> Path:
    """Writes a DeepSpec folder of a random draft for the target in target_folder.

    head: "vanilla" | "gated" | "rnn" (rank 0 = DFlash); confidence: "markov" | "hidden" | None. Every second target token
    (and then the rest, in order) makes up a trimmed draft vocabulary of `draft_vocab` tokens.
    """
    raw = json.loads((Path(target_folder) / "config.json").read_text())
    target = DecoderConfig.from_hf(raw)
    c = decoder_config(target.model_type, target.vocab_size, layers, head_dim=target.head_dim)
    model = DraftModel(DraftConfig(
        decoder=c, block_size=block_size, mask_token_id=target.vocab_size - 2, target_layer_ids=tuple(layer_ids),
        num_target_layers=target.num_hidden_layers, markov_rank=rank, markov_head_type=head,
        enable_confidence_head=confidence is not None, confidence_head_with_markov=confidence == "markov" and rank > 0,
        draft_vocab_size=draft_vocab,
    ))
    randomize(model, seed, logit_scale=0.5)
    if hasattr(model, "d2t"):
        V = target.vocab_size
        ids = torch.tensor(sorted([*range(0, V, 2), *range(1, V, 2)][:draft_vocab]))
        model.d2t.copy_(ids - torch.arange(draft_vocab))
    if rank and head != "rnn":
        learn_bigrams(model, TargetModel.from_pretrained(target_folder))
    save_draft(model, folder)
    return Path(folder)


def learn_bigrams(draft: DraftModel, target: TargetModel) -> None:
    """Sets the Markov matrices to the best rank-r fit of the target's logits after each single token."""
    V = target.config.vocab_size
    batch = PackedBatch.build([[i] for i in range(V)], [0] * V, 1)
    table = target(batch, torch.arange(V)).logits
    u, s, v = torch.linalg.svd(table - table.mean(dim=-1, keepdim=True))
    r, gain = draft.config.markov_rank, 2.0 if draft.config.markov_head_type == "gated" else 1.0
    r = min(r, V)
    draft.markov_head.markov_w1.weight.copy_(u[:, :r] * s[:r].sqrt())
    draft.markov_head.markov_w2.weight.copy_((v[:r].T * s[:r].sqrt() * gain)[draft.draft_to_target()])
