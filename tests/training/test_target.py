"""training.target against transformers: logits and layer outputs in fp32, packed or alone, with and without caches."""

import json

import pytest
import torch

from training.decoder_config import DecoderConfig
from training.target import PackedBatch, TargetModel

SIZES = dict(
    vocab_size=96, hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=256,
)  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
CASES = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-mha-wide-heads": ("llama", {"num_key_value_heads": 4, "head_dim": 16}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3}),
    "linear-rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-tied": ("qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
}


@pytest.fixture(params=CASES)
def pair(request, tmp_path):
    """(transformers' model, ours) with the same random weights, ours read from the folder that transformers wrote."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    family, changes = CASES[request.param]
    make = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}[family]
    torch.manual_seed(7)
    theirs = make[1](make[0](**{**SIZES, **changes})).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.ndim > 1 else 0.1) + (1.0 if "norm" in name else 0.0))
    theirs.save_pretrained(tmp_path)
    return theirs, TargetModel.from_pretrained(tmp_path, layer_ids=(-1, 0, 1))


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 96, (n,), generator=generator).tolist() for n in lengths]


def test_logits_and_features_equal_transformers(pair):
    theirs, ours = pair
    sequences = prompts(70, 1, 13)
    with torch.no_grad():
        batch = PackedBatch.build(sequences, [0, 0, 0], 70)
        out, row = ours(batch, torch.arange(84)), 0
        for ids in sequences:
            want = theirs(torch.tensor([ids]), output_hidden_states=True)
            rows = slice(row, row + len(ids))
            torch.testing.assert_close(out.logits[rows], want.logits[0], atol=1e-4, rtol=0)
            hidden = torch.cat([want.hidden_states[i][0] for i in (0, 1, 2)], dim=-1)
            torch.testing.assert_close(out.features[rows], hidden, atol=1e-4, rtol=0)
            row += len(ids)


def test_uneven_steps_with_caches_equal_one_pass(pair):
    """A ragged batch in two steps, then a rejected suffix overwritten after rewinding the length."""
    theirs, ours = pair
    a, b = prompts(40, 22)
    with torch.no_grad():
        caches = ours.new_caches(2, 128)
        ours(PackedBatch.build([a[:25], b[:4]], [0, 0], 64), torch.tensor([0]), caches)
        ours(PackedBatch.build([[5, 6, 7], [8]], [25, 4], 64), torch.tensor([0]), caches)  # rejected: lengths stay 25 and 4
        out = ours(PackedBatch.build([a[25:], b[4:]], [25, 4], 64), torch.arange(33), caches)
        torch.testing.assert_close(out.logits[:15], theirs(torch.tensor([a])).logits[0, 25:], atol=1e-4, rtol=0)
        torch.testing.assert_close(out.logits[15:], theirs(torch.tensor([b])).logits[0, 4:], atol=1e-4, rtol=0)


def test_misfits_are_named(tmp_path):
    raw = {**SIZES, "model_type": "llama", "rms_norm_eps": 1e-6}
    with pytest.raises(ValueError, match=r"target_layer_ids is \[0, 3\]; they must increase strictly and lie in -1..2"):
        TargetModel(DecoderConfig.from_hf(raw), layer_ids=(0, 3))
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(FileNotFoundError, match="no \\*.safetensors"):
        TargetModel.from_pretrained(tmp_path)


def test_missing_and_unused_weights_are_named(tmp_path):
    from safetensors.torch import save_file

    raw = {**SIZES, "model_type": "llama", "rms_norm_eps": 1e-6}
    model = TargetModel(DecoderConfig.from_hf(raw))
    state = {name: t.clone() for name, t in model.state_dict().items()}
    state["odd.weight"] = state.pop("layers.1.mlp.up_proj.weight")
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="missing layers.1.mlp.up_proj.weight; unused odd.weight"):
        TargetModel.from_pretrained(tmp_path)
