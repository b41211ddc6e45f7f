"""Tiny random targets and drafts on disk, for every room's tests. Weights are scaled so that distributions are neither
flat nor deterministic; a draft's Markov head knows the target's bigrams, so that some of its tokens are accepted."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from training.autoregressive import ArConfig, ArDraft
from training.checkpoint import save_draft
from training.decoder_config import DecoderConfig, RopeConfig
from training.gemma4_config import FULL, SLIDING, Gemma4Config, write_gemma4
from training.draft import DraftConfig, DraftModel
from training.target import PackedBatch, TargetModel

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 32, 4, 2, 8, 64
GEMMA4 = ("gemma4-12b", "gemma4-e")  # values that are keys; inputs of each layer's own, shared keys and values
WINDOW = 6  # of a sliding layer


def decoder_config(
    family: str, vocab: int, layers: int, *, tied: bool = False, bias: bool = False, kv_heads: int = KV_HEADS,
    head_dim: int = HEAD_DIM,
) -> DecoderConfig:
    if family in GEMMA4:
        return gemma4_config(vocab, layers, family == "gemma4-e", kv_heads=kv_heads, head_dim=head_dim)
    return DecoderConfig(
        vocab_size=vocab, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=kv_heads, head_dim=head_dim, rms_norm_eps=1e-5,
        rope=RopeConfig(theta=10000.0), max_position_embeddings=512, qk_norm=family == "qwen3", attention_bias=bias,
        mlp_bias=bias, tie_word_embeddings=tied, model_type=family,
    )


def gemma4_config(vocab: int, layers: int, e_style: bool, *, kv_heads: int, head_dim: int) -> DecoderConfig:
    """Sliding and full layers in turn, the last a full one, which in the E style shares. Heads of a full layer are twice as
    wide."""
    own = dict(num_kv_shared_layers=1, double_wide_mlp=True, per_layer_size=12) if e_style else dict(k_eq_v=True)
    gemma4 = Gemma4Config(
        layer_types=tuple(SLIDING if (layers - i) % 2 == 0 else FULL for i in range(layers)), sliding_window=WINDOW,
        global_head_dim=2 * head_dim, num_global_key_value_heads=kv_heads if e_style else 1,
        full_rope=RopeConfig(theta=1e6, rope_type="proportional", rotated_share=0.25), **own,
    )  # fmt: skip
    return DecoderConfig(
        vocab_size=vocab, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=kv_heads, head_dim=head_dim, rms_norm_eps=1e-5, rope=RopeConfig(),
        max_position_embeddings=512, qk_norm=True, tie_word_embeddings=False, model_type="gemma4_text",
        embed_scale=HIDDEN**0.5, logit_softcap=6.0, gemma4=gemma4,
    )  # fmt: skip


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
        for name, scalar in module.named_buffers():
            if name.endswith("layer_scalar"):
                scalar.copy_(0.7 + 0.3 * torch.rand(scalar.shape, generator=generator))
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
    model.embed_tokens.weight.mul_(1 / c.embed_scale)
    state = {("" if n.startswith("lm_head") else "model.") + n: t.clone() for n, t in model.state_dict().items()}
    if tied:
        model.embed_tokens.weight.mul_(HIDDEN**-0.5 * 0.8)  # it is the lm_head too
        state = {"model." + n: t.clone() for n, t in model.state_dict().items() if not n.startswith("lm_head")}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    eos = vocab - 1 if eos is None else eos
    raw = {
        "architectures": [{"llama": "LlamaForCausalLM"}.get(family, "Qwen3ForCausalLM")], "model_type": family,
        "vocab_size": vocab, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": layers,
        "num_attention_heads": HEADS, "num_key_value_heads": kv_heads, "head_dim": head_dim, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attention_bias": bias, "mlp_bias": bias, "tie_word_embeddings": tied, "hidden_act": "silu",
        "bos_token_id": 0, "eos_token_id": eos,
    }
    if c.gemma4:
        raw = {**write_gemma4(c), "bos_token_id": 0, "eos_token_id": eos}
    (folder / "config.json").write_text(json.dumps(raw, indent=1))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": eos}))
    return folder


def make_draft(
    folder: str | Path, target_folder: str | Path, *, head: str = "vanilla", rank: int = 16, confidence: str | None = "markov",
    layer_ids: tuple[int, ...] | None = None, draft_vocab: int | None = None, block_size: int = 4, layers: int = 1, seed: int = 1,
    sample_from_anchor: bool = True, kind: str = "parallel", plain: bool = False,
) -> Path:
    """Writes a folder of a random draft for the target in target_folder: kind "parallel" (DeepSpec's layout), "eagle3" or
    "mtp" (head, rank, confidence and sample_from_anchor then mean nothing).

    head: "vanilla" | "gated" | "rnn" (rank 0 = DFlash); confidence: "markov" | "hidden" | None. Every second target token
    (and then the rest, in order) makes up a trimmed draft vocabulary of `draft_vocab` tokens. layer_ids None: two below the last.
    plain: Qwen3 layers for a Gemma4 target.
    """
    raw = json.loads((Path(target_folder) / "config.json").read_text())
    target = DecoderConfig.from_hf(raw)
    if target.gemma4:
        c = target.plain(layers) if plain or kind != "parallel" else target.for_draft(layers)
    else:
        c = decoder_config(target.model_type, target.vocab_size, layers, head_dim=target.head_dim)
    if kind != "parallel":
        return make_autoregressive(folder, target_folder, target, c, kind, layer_ids, draft_vocab, block_size, seed)
    layer_ids = layer_ids or {1: (-1,), 2: (-1, 0)}.get(target.num_hidden_layers, (0, 1))
    model = DraftModel(DraftConfig(
        decoder=c, block_size=block_size, mask_token_id=target.vocab_size - 2, target_layer_ids=tuple(layer_ids),
        num_target_layers=target.num_hidden_layers, markov_rank=rank, markov_head_type=head,
        enable_confidence_head=confidence is not None, confidence_head_with_markov=confidence == "markov" and rank > 0,
        draft_vocab_size=draft_vocab, sample_from_anchor=sample_from_anchor,
    ))
    randomize(model, seed, logit_scale=0.5)
    trim(model)
    if rank and head != "rnn":
        learn_bigrams(model, TargetModel.from_pretrained(target_folder))
    save_draft(model, folder)
    return Path(folder)


def trim(model: DraftModel | ArDraft) -> None:
    """Every second target token, then the rest in order, makes up a trimmed draft vocabulary."""
    if hasattr(model, "d2t"):
        V, V_d = model.config.decoder.vocab_size, model.config.vocab_out
        model.d2t.copy_(torch.tensor(sorted([*range(0, V, 2), *range(1, V, 2)][:V_d])) - torch.arange(V_d))


def make_autoregressive(
    folder: str | Path, target_folder: str | Path, target: DecoderConfig, decoder: DecoderConfig, kind: str,
    layer_ids: tuple[int, ...] | None, draft_vocab: int | None, block_size: int, seed: int,
) -> Path:
    """Its lm_head is fitted to the target's logits over random text, so that some of its tokens are accepted."""
    last = target.num_hidden_layers - 1
    layer_ids = layer_ids or ((last,) if kind == "mtp" else tuple(sorted({-1, 0, last - 1})))
    model = ArDraft(ArConfig(decoder, kind, block_size, tuple(layer_ids), last + 1, draft_vocab))
    randomize(model, seed)
    trim(model)
    known, n = TargetModel.from_pretrained(target_folder, tuple(layer_ids)), 24
    text = torch.randint(0, target.vocab_size, (40, n), generator=torch.Generator().manual_seed(seed))
    out = known(PackedBatch.build(text.tolist(), [0] * len(text), n), torch.arange(text.numel()))
    features, logits = (x.unflatten(0, text.shape) for x in (out.features, out.logits))
    rows = model.norm(model.rows(features, text.roll(-1, dims=1)).hidden)[:, :-1].flatten(0, 1)
    wanted = logits[:, 1:, model.draft_to_target()].flatten(0, 1)
    model.lm_head.weight.copy_(torch.linalg.lstsq(rows, wanted - wanted.mean(-1, keepdim=True)).solution.T)
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
