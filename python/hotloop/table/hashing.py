# SPDX-License-Identifier: Apache-2.0
"""Keys to buckets, by hashes that are part of the checkpoint format and never change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..front import arrays, native
from ..front.arrays import Array
from ..front.check import integer
from ..front.impl import Impl, choose
from ..reference.table import hashing as _reference
from . import _keys, _words


@_words.documented
def salted_hash_bucket(
    keys: Array,
    num_buckets: int,
    *,
    feature: int = 0,
    chunk: int = 0,
    seed: int = 0,
    impl: Impl = "auto",
) -> Array:
    """Hash 64-bit keys into buckets, independently for every (feature, chunk, seed).

    h = mix64(key xor mix64(feature * C1 + chunk * C2 + seed)), bucket = floor(h * num_buckets / 2^64), all modulo
    2^64, with mix64 the finaliser of MurmurHash3, C1 = 0x9E3779B97F4A7C15 and C2 = 0xC2B2AE3D27D4EB4F. These values
    are part of the checkpoint format. Keras and TensorFlow Recommenders take SipHash64 modulo the buckets instead:
    the distribution is the same, the buckets are not. Not for keys chosen by an attacker.

    Args:
        keys: any shape; int64 or uint64 of any value, or int32, which is widened with its sign.
        num_buckets: 1 to 2^63 - 1.
        feature: which feature the keys belong to, 0 to 2^64 - 1. Default 0.
        chunk: which of the feature's chunks is looked up, 0 to 2^64 - 1. Default 0.
        seed: another family of hashes, 0 to 2^64 - 1. Default 0.

    Returns:
        Buckets in [0, num_buckets), int64, shape and kind of ``keys``.

    Examples:
        >>> import numpy as np
        >>> salted_hash_bucket(np.array([1, 2, 3]), 100).tolist()
        [70, 22, 4]
        >>> salted_hash_bucket(np.array([1, 2, 3]), 100, feature=1).tolist()
        [55, 78, 47]

    Reference:
        Coleman et al. 2023, arXiv:2305.12102 (Unified Embedding), section 4: one hash per feature and chunk.
    """
    if arrays.compiling():
        from . import _operators

        salt = map(_keys.signed, (feature, chunk, seed))
        return _operators.hash_bucket(keys, num_buckets, *salt, impl)
    return _keys.hash_bucket(keys, num_buckets, feature, chunk, seed, impl)


MAX_FEATURE_BITS = 32


@_words.documented
def feature_keys(ids: Array, feature: int, *, feature_bits: int = 16) -> Array:
    """Turn a feature's ids into keys that no other feature has, so that many features share one ``Table``.

    With b = feature_bits > 0: key = id xor (feature * 2^(64 - b)), for -2^(63 - b) <= id < 2^(63 - b): exact, no two
    (feature, id) have one key, and the same xor turns keys back into ids. With b = 0, for ids of all 64 bits, such as
    those of ``hash_strings``: key = mix64(id xor mix64(feature * C1)), the hash of ``salted_hash_bucket`` before its
    buckets. Two ids of one feature never meet; ids of two features do with a probability below n^2 / 2^65 for n ids in
    all (0.2% for 2^28), unless an attacker chose them. These values are part of the checkpoint format.

    Args:
        ids: any shape; int64, uint64 (the same bits as int64) or int32.
        feature: number of the feature, 0 to 2^b - 1, or to 2^64 - 1 with b = 0. It is part of the checkpoint: new
            features take new numbers.
        feature_bits: b, 0 to 32; the same for all features of a table. Default 16: 65536 features, ids of 47 bits and a
            sign.

    Returns:
        Keys, int64, shape and kind of ``ids``.

    Raises:
        ValueError: an id that does not fit, or a number out of range.

    Examples:
        >>> import numpy as np
        >>> ids = np.array([0, 7, -1])
        >>> [feature_keys(ids, f).tolist() for f in (0, 1)]
        [[0, 7, -1], [281474976710656, 281474976710663, -281474976710657]]

    Reference:
        Coleman et al. 2023, arXiv:2305.12102 (Unified Embedding), section 4: features share a table by salted hashes;
        here, where no two keys share a row, nothing is left to chance that need not be.
    """
    op = "feature_keys"
    given = _keys.keys(op, ids, name="ids")
    bits = integer(op, "feature_bits", feature_bits, at_least=0, at_most=MAX_FEATURE_BITS)
    feature = integer(op, "feature", feature, at_least=0, at_most=(1 << (bits or 64)) - 1)
    if bits == 0:
        return _mixed(given, _keys.signed(_reference.salt_of(feature, 0, 0))).reshape(ids.shape)
    bound = 1 << (63 - bits)
    flat = given.reshape(-1)
    if flat.shape[0]:
        lowest, highest = int(flat.min()), int(flat.max())
        if lowest < -bound or highest >= bound:
            raise ValueError(
                f"[{op}] ids: expected {-bound} to {bound - 1} beside {bits} bits of the feature, got "
                f"{lowest if lowest < -bound else highest}. Take fewer feature_bits, or 0, which hashes."
            )
    return (flat ^ _keys.signed(feature << (64 - bits))).reshape(ids.shape)


def _mixed(keys: Any, salt: int) -> Any:
    """mix64(keys xor salt) in int64, which NumPy, torch and CuPy multiply modulo 2^64."""
    k = keys.reshape(-1) ^ salt
    below = (1 << 31) - 1  # what a shift by 33 leaves; the sign comes in from the left
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        k = (k ^ ((k >> 33) & below)) * _keys.signed(factor)
    return k ^ ((k >> 33) & below)


@_words.documented
def hash_strings(strings: Sequence[str | bytes], *, impl: Impl = "auto") -> np.ndarray:
    """Hash strings to 64-bit keys, which every op of this room takes.

    h_0 = mix64(length + C3); h_i = mix64(h_(i-1) xor word_i) over the words of eight bytes, little-endian, the last one
    filled up with zeros; C3 = 0x165667B19E3779F9. A str is its UTF-8 bytes. These values are part of the checkpoint
    format. Two of n strings collide with probability about n^2 / 2^65; nothing is kept by which to notice. Not for
    strings chosen by an attacker.

    Args:
        strings: a sequence of n str or bytes, or a NumPy array of them.

    Returns:
        Keys, NumPy int64 (n,), of either sign.

    Raises:
        TypeError: one string instead of a sequence, or an item that is neither str nor bytes.

    Examples:
        >>> hash_strings(["user:17", b"user:17", "user:18"]).tolist()
        [4359292828340978484, 4359292828340978484, 125916871650819531]

    Reference:
        Coleman et al. 2023, arXiv:2305.12102 (Unified Embedding), section 4: strings are hashed to table rows.
    """
    op = "hash_strings"
    if isinstance(strings, (str, bytes)):
        raise TypeError(
            f"[{op}] strings: expected a sequence of str or bytes, got one {type(strings).__name__}. "
            "Put it into a list."
        )
    parts = [s.encode() if isinstance(s, str) else s for s in strings]
    for i, s in enumerate(parts):
        if not isinstance(s, bytes):
            raise TypeError(
                f"[{op}] strings: expected str or bytes, got {type(s).__name__} at [{i}]. Pass integers as keys."
            )
    out = np.empty(len(parts), np.int64)
    if choose(op, impl, "strings", out) == "reference":
        return _reference.hash_strings(parts)
    offsets = np.zeros(len(parts) + 1, np.int64)
    np.cumsum([len(p) for p in parts], out=offsets[1:])
    native.core.table.hash_strings(len(parts), b"".join(parts), offsets, out)
    return out
