import numpy as np
import pytest

from decoding.random import ACCEPT, DRAFT, NEXT, philox4x32, uniforms

# Random123's kat_vectors, "philox4x32 10": counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize("counter, key, result", KNOWN)
def test_known_answers(counter, key, result):
    words = lambda text: [int(w, 16) for w in text.split()]
    got = philox4x32(np.array(words(counter), np.uint64), tuple(words(key)))
    assert got.tolist() == words(result)


def test_counter_and_key_are_position_purpose_and_seed():
    seed, position = 0xA409382200000007, 0x1_0000_0005
    word = philox4x32(np.array([5, 1, ACCEPT, 0], np.uint64), (7, 0xA4093822))[0]
    assert uniforms(seed, position, ACCEPT) == np.float32(int(word) >> 9) * np.float32(2**-23)


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
