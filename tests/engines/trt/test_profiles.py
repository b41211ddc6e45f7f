"""The sizes that plans are compiled for."""

from __future__ import annotations

import pytest

from engines.trt.profiles import TOP_MOST, limits_for, profiles_of, size

SYMBOLS = {
    "target": {"N", "R", "Q", "C", "M"},
    "backbone": {"F", "R", "Q", "C"},
    "markov": {"R", "Rs", "Rc"},
    "confidence": {"R"},
    "verify": {"M", "R", "Mw", "E", "Mf", "Mc", "Mx", "Rs", "Rq", "Ml"},
}


@pytest.mark.parametrize("requests", [1, 2, 64, 4096])
@pytest.mark.parametrize("chunk", [1, 512])
@pytest.mark.parametrize("block, vocab", [(1, 40), (7, 151_936)])
@pytest.mark.parametrize("from_anchor", [True, False])
def test_every_range_is_in_order_and_every_symbol_has_one(requests, chunk, block, vocab, from_anchor):
    limits = limits_for(
        requests=requests, chunk=chunk, block=block, vocab=vocab, max_context=2048, sample_from_anchor=from_anchor
    )
    for engine, profiles in profiles_of(limits).items():
        assert len({p.name for p in profiles}) == len(profiles)
        for p in profiles:
            assert set(p.sizes) == SYMBOLS[engine] and set(p.values) == ({"top_count"} if engine == "verify" else set())
            for name, (least, typical, most) in {**p.sizes, **p.values}.items():
                assert 0 <= least <= typical <= most, f"{engine} {p.name} {name}"


def test_the_target_fits_every_round():
    limits = limits_for(requests=8, chunk=32, block=4, vocab=64, max_context=128)
    decode, verify, prefill = (p.sizes for p in profiles_of(limits)["target"])
    assert decode["Q"] == (1, 1, 1) and decode["N"][2] == 8
    assert verify["N"][2] == 8 * 5 and verify["Q"][2] == 5
    assert prefill["N"][2] == 32 + 40 and prefill["Q"][2] == 32 and prefill["M"][0] == 0  # a chunk may want no logits
    assert limits.cache >= 128 + 32 + 4 and limits.cache % 64 == 0  # padded slots behind the last position
    assert {p["C"][2] for p in (decode, verify, prefill)} == {limits.cache}


@pytest.mark.parametrize("from_anchor, slots", [(True, 4), (False, 5)])
def test_the_draft_fits_every_round(from_anchor, slots):
    """A round hands over at most G + 1 rows, a prompt's pass a chunk; then the block's slots, beyond max_context too."""
    limits = limits_for(requests=8, chunk=32, block=4, vocab=64, max_context=127, sample_from_anchor=from_anchor)
    decode, prefill = (p.sizes for p in profiles_of(limits)["backbone"])
    assert decode["Q"][2] == 5 + slots and prefill["Q"][2] == 32 + slots
    assert limits.cache >= 127 + 32 + slots


def test_a_draft_by_steps_has_no_block_in_its_cache():
    limits = limits_for(requests=8, chunk=32, block=4, vocab=64, max_context=127, autoregressive=True)
    profiles = profiles_of(limits)
    decode, prefill = (p.sizes for p in profiles["backbone"])
    assert decode["Q"][2] == 5 and prefill["Q"][2] == 32 and profiles["markov"][0].sizes["C"][2] == limits.cache


def test_wide_rows_are_bounded_by_memory_and_top_by_tensorrt():
    small, large = (limits_for(requests=256, chunk=512, block=7, vocab=v, max_context=2048) for v in (1_000, 151_936))
    assert small.wide_rows == 256 * 8 and large.wide_rows == (256 << 20) // (4 * 151_936)
    (verify,) = profiles_of(large)["verify"]
    assert verify.values["top_count"][2] == TOP_MOST and verify.sizes["Mw"] == (0, 1, large.wide_rows)


def test_size_puts_numbers_for_symbols():
    profile = profiles_of(limits_for(requests=8, chunk=32, block=4, vocab=64, max_context=128))["target"][0]
    assert size(("R", 1, "Q", "C"), profile, 2) == (8, 1, 1, 192)


@pytest.mark.parametrize("field, value", [("requests", 0), ("requests", 5000), ("chunk", 0)])
def test_limits_have_a_range(field, value):
    wanted = {"requests": 1, "chunk": 1, "block": 4, "vocab": 64, "max_context": 128, field: value}
    with pytest.raises(ValueError, match=rf"(max_)?{field} is {value}; it must lie in 1\.\.4096\.$"):
        limits_for(**wanted)
