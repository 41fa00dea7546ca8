"""The random words are the published Philox4x64-10 stream of a hashed key, and never change."""

import hashlib

import numpy as np

from fd_scale.data import philox

MASK = 2**64 - 1


def philox_4x64_10(counter: int, key: tuple[int, int]) -> list[int]:
    """One block of Philox4x64-10 as published (Salmon et al. 2011), in Python integers."""
    c = [counter & MASK, counter >> 64, 0, 0]
    k = list(key)
    for _ in range(10):
        left, right = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [(right >> 64) ^ c[1] ^ k[0], right & MASK, (left >> 64) ^ c[3] ^ k[1], left & MASK]
        k = [(k[0] + 0x9E3779B97F4A7C15) & MASK, (k[1] + 0xBB67AE8584CAA73B) & MASK]
    return c


def test_words_are_the_published_philox_stream():
    key = philox.key("fd.test", 3, 2**63)
    halves = (int.from_bytes(key[:8], "little"), int.from_bytes(key[8:], "little"))
    # NumPy counts before it draws, so its first block is the one of counter 1.
    published = [word for counter in (1, 2, 3) for word in philox_4x64_10(counter, halves)]
    assert philox.words(key, 11).tolist() == published[:11]


def test_a_key_is_blake2b_of_purpose_version_and_numbers():
    message = b"".join(number.to_bytes(8, "little") for number in (philox.VERSION, 5, 6))
    expected = hashlib.blake2b(message, digest_size=16, person=b"fd.sample").digest()
    assert philox.key("fd.sample", 5, 6) == expected
    # The order of a data set must survive every release: this value may only change with philox.VERSION.
    assert philox.key("fd.sample", 0, 1, 2).hex() == "9a4bced7f53b470a8ca3561aee9f1545"
    assert philox.permutation(philox.key("fd.shards", 0, 0), 7).tolist() == [1, 2, 5, 6, 0, 4, 3]


def test_keys_travel_as_rows_of_an_array():
    keys = [philox.key("fd.test", number) for number in range(3)]
    rows = philox.as_array(keys)
    assert rows.shape == (3, 2)
    for key, row in zip(keys, rows, strict=True):
        np.testing.assert_array_equal(philox.words(key, 9), philox.words(row, 9))


def test_uniforms_fill_zero_to_one():
    drawn = philox.uniforms(philox.words(philox.key("fd.test", 1), 20_000))
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert philox.uniforms(np.array([2**64 - 1], dtype=np.uint64))[0] == 1 - 2.0**-53
    words = philox.words(philox.key("fd.test", 1), 100)
    assert [philox.uniform(word) for word in words.tolist()] == philox.uniforms(words).tolist()
    counts = np.histogram(drawn, bins=10, range=(0, 1))[0]
    # 2000 expected in each tenth, standard deviation 42; this key's worst is 76.
    assert np.abs(counts - 2000).max() < 5 * 42


def test_permutations_hold_every_number_once_and_differ_by_key():
    for count in (0, 1, 2, 17, 1000):
        drawn = philox.permutation(philox.key("fd.test", 1), count)
        assert drawn.dtype == np.int64
        assert sorted(drawn.tolist()) == list(range(count))
    first, second = (philox.permutation(philox.key("fd.test", number), 1000) for number in (1, 2))
    assert (first != second).mean() > 0.98
