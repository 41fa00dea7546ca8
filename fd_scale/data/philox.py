"""Which random numbers belong to a key? The same ones on every machine, in every process, in every release.

A key is a purpose and a few whole numbers, hashed by BLAKE2b to the 128 bits that key a Philox counter
generator. Only its raw 64-bit words are used: NumPy fixes that stream for good, while the methods of its
``Generator`` may change. What is drawn for which purpose is the business of ``plan`` and ``view``.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import numpy as np
from numpy.random.bit_generator import ISeedSequence

VERSION = 1
"""Part of every key: raised when a change here or in a caller would alter what is drawn."""

KEY_BYTES = 16


class _Keyed(ISeedSequence):
    """Hands Philox a finished key; NumPy's own way first gathers entropy and throws it away."""

    def __init__(self, key: np.ndarray) -> None:
        self.key = key

    def generate_state(self, n_words: int, dtype: Any = np.uint64) -> np.ndarray:
        return self.key


def key(purpose: str, *numbers: int) -> bytes:
    """The 16-byte key of a purpose (at most 16 ASCII letters) and non-negative numbers below 2**64."""
    message = struct.pack(f"<{1 + len(numbers)}Q", VERSION, *numbers)
    return hashlib.blake2b(message, digest_size=KEY_BYTES, person=purpose.encode("ascii")).digest()


def as_array(keys: list[bytes]) -> np.ndarray:
    """Keys as an (n, 2) uint64 array, one row each, which travels between processes as one piece."""
    return np.frombuffer(b"".join(keys), dtype="<u8").reshape(-1, 2)


def words(key: bytes | np.ndarray, count: int) -> np.ndarray:
    """The first ``count`` words (uint64) of a key, given as bytes or as a row of ``as_array``."""
    row = np.frombuffer(key, dtype="<u8") if isinstance(key, bytes) else key
    return np.random.Philox(_Keyed(row)).random_raw(count)  # type: ignore[arg-type]


def uniform(word: int) -> float:
    """A word as a number in [0, 1), by its upper 53 bits."""
    return (word >> 11) * 2.0**-53


def uniforms(words: np.ndarray) -> np.ndarray:
    """The same of an array of words, as float64."""
    return (words >> np.uint64(11)) * 2.0**-53


def permutation(key: bytes, count: int) -> np.ndarray:
    """A permutation of 0 .. count - 1 (int64): the order of the key's words."""
    return np.argsort(words(key, count), kind="stable")
