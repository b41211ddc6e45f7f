import numpy as np
import pytest

from decoding.random import ACCEPT, DRAFT, NEXT, gumbel, philox4x32, uniforms

# Random123's kat_vectors, "philox4x32 10": counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize("counter, key, result", KNOWN)
def test_known_answers(counter, key, result):
    words = lambda text: [int(w, 16) for w in text.split()]
    got = philox4x32(np.array(words(counter), np.uint64), np.array(words(key), np.uint64))
    assert got.tolist() == words(result)


def test_counter_and_key_are_position_purpose_and_seed():
    seed, position = 0xA409382200000007, 0x1_0000_0005
    word = philox4x32(np.array([5, 1, ACCEPT, 0], np.uint64), np.array([7, 0xA4093822], np.uint64))[0]
    assert uniforms(seed, position, ACCEPT) == np.float32(int(word) >> 9) * np.float32(2**-23)
    word = philox4x32(np.array([5, 1, ACCEPT + 4 * 3, 6], np.uint64), np.array([7, 0xA4093822], np.uint64))[0]
    assert uniforms(seed, position, ACCEPT, slot=6, twin=3) == np.float32(int(word) >> 9) * np.float32(2**-23)


def test_vectorised_equals_one_by_one():
    table = uniforms(3, np.arange(50)[None, :], np.arange(3)[:, None])
    assert table.shape == (3, 50) and table.dtype == np.float32
    assert all(table[p, k] == uniforms(3, k, p) for p in (DRAFT, ACCEPT, NEXT) for k in range(50))


def test_uniform_independent_and_never_one():
    table = uniforms(11, np.arange(200_000)[None, :], np.arange(3)[:, None])
    assert table.min() >= 0 and table.max() <= 1 - 2**-23
    assert all(
        np.float32(u) * np.float32(total) < np.float32(total)
        for u in (table.max(), 1 - 2**-23)
        for total in (1, 0.3, 7)
    )
    np.testing.assert_allclose(table.mean(axis=1), 0.5, atol=4 * 12**-0.5 * 200_000**-0.5)
    bins = np.stack([np.bincount((row * 64).astype(int), minlength=64) for row in table])
    assert (((bins - 3125) ** 2 / 3125).sum(axis=1) < 130).all()  # chi-square of 63 degrees: p about 1e-6
    assert np.abs(np.corrcoef(table) - np.eye(3)).max() < 0.012
    other = uniforms(12, np.arange(200_000), DRAFT)
    assert abs(np.corrcoef(table[0], other)[0, 1]) < 0.012


@pytest.mark.parametrize("seed", [-1, 1 << 64])
def test_seed_out_of_range(seed):
    with pytest.raises(ValueError, match="seed is"):
        uniforms(seed, 0, 0)


def test_gumbel_noise_is_what_the_words_say():
    """From numpy's documented Philox stream, in float64; the first words pinned, so that a seed's text stays the same."""
    size, key = 1001, np.array([(1 << 64) - 1, 77], np.uint64)
    raw = np.random.Philox(key=key).random_raw(501)
    words = np.stack([raw & np.uint64(0xFFFFFFFF), raw >> np.uint64(32)], axis=1).reshape(-1)[:size]
    want = -np.log(-np.log1p(-(words.astype(np.float64) + 0.5) / 2**32))
    np.testing.assert_allclose(gumbel((1 << 64) - 1, 77, np.empty(size, np.float32)), want, atol=2e-4, rtol=2e-6)
    first = np.random.Philox(key=np.array([0, 0], np.uint64)).random_raw(2)
    assert [hex(int(x)) for x in first] == ["0x2f4ba6408e4d89b", "0x3dd62b0b9ca8c5b2"]


def test_gumbel_noise_has_its_distribution_and_no_correlation():
    rows = np.stack([gumbel(3, p, np.empty(50_000, np.float32)) for p in range(8)])
    assert np.isfinite(rows).all()
    cdf = np.exp(-np.exp(-rows.astype(np.float64)))
    bins = np.bincount((cdf * 64).astype(int).reshape(-1), minlength=64)
    assert ((bins - 6250) ** 2 / 6250).sum() < 130  # chi-square of 63 degrees: p about 1e-6
    assert np.abs(np.corrcoef(rows) - np.eye(8)).max() < 0.02
    assert abs(np.corrcoef(rows[0], gumbel(4, 0, np.empty(50_000, np.float32)))[0, 1]) < 0.02
    assert (rows > 9).mean() == pytest.approx(-np.expm1(-np.exp(-9)), rel=0.3)
