"""config.json as transformers 4 and 5 write it; what this version does not read is named (numbers: test_target.py)."""

import pytest

from training.decoder_config import DecoderConfig, RopeConfig

RAW = dict(
    model_type="llama", vocab_size=96, hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4,
    rms_norm_eps=1e-6, max_position_embeddings=256,
)  # fmt: skip
MISFITS = {
    "model_type is 'mamba'; this version reads llama, qwen3": {"model_type": "mamba"},
    "rope_type is 'yarn'": {"rope_scaling": {"rope_type": "yarn"}},
    "hidden_act is 'gelu'": {"hidden_act": "gelu"},
    "use_sliding_window": {"model_type": "qwen3", "use_sliding_window": True},
}


@pytest.mark.parametrize("message", MISFITS)
def test_what_is_not_read_is_named(message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig.from_hf({**RAW, **MISFITS[message]})


def test_both_spellings_of_the_rotary_embedding_are_the_same():
    old = RopeConfig.from_hf({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}})
    new = RopeConfig.from_hf({"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2}})
    assert old == new == RopeConfig(theta=5e5, rope_type="linear", factor=2.0)


def test_absent_keys_follow_the_family():
    llama, qwen = DecoderConfig.from_hf(RAW), DecoderConfig.from_hf({**RAW, "model_type": "qwen3", "head_dim": 16})
    assert (llama.num_key_value_heads, llama.head_dim, llama.qk_norm) == (4, 8, False)
    assert (qwen.head_dim, qwen.qk_norm) == (16, True)
    assert DecoderConfig.from_hf(RAW, model_type="qwen3").model_type == "qwen3"


def test_tables_hold_half_a_head_and_grow_prefix_by_prefix():
    rope = RopeConfig()
    cos, sin = rope.tables(8, 20)
    assert cos.shape == sin.shape == (20, 4) and bool((cos[0] == 1).all()) and bool((sin[0] == 0).all())
    assert bool((rope.tables(8, 50)[0][:20] == cos).all())
