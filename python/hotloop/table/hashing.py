"""Keys to buckets, by hashes that are part of the checkpoint format and never change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import _arrays, _native
from .._impl import Impl
from .._numbers import integer
from ..reference.table import hashing as _reference
from . import _keys


def salted_hash_bucket(
    keys: Any,
    num_buckets: int,
    *,
    feature: int = 0,
    chunk: int = 0,
    seed: int = 0,
    impl: Impl = "auto",
) -> Any:
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
        impl: "auto", "cpu" or "reference". Default "auto".

    Returns:
        Buckets in [0, num_buckets), int64, shape and kind of ``keys``.

    Raises:
        TypeError: keys that are no array of integers, or a number that is no integer.
        ValueError: a number out of range.
        NotImplementedError: the forced impl cannot run these inputs.

    Example:
        >>> import numpy as np
        >>> salted_hash_bucket(np.array([1, 2, 3]), 100).tolist()
        [70, 22, 4]
        >>> salted_hash_bucket(np.array([1, 2, 3]), 100, feature=1).tolist()
        [55, 78, 47]

    Reference:
        Coleman et al. 2023, arXiv:2305.12102 (Unified Embedding), section 4: one hash per feature and chunk.
    """
    op = "salted_hash_bucket"
    if _arrays.compiling():
        from . import _operators

        return _operators.hash_bucket(keys, num_buckets, feature, chunk, seed, impl)
    given = _keys.keys(op, keys)
    most = 2**64 - 1
    buckets = integer(op, "num_buckets", num_buckets, at_least=1, at_most=2**63 - 1)
    feature = integer(op, "feature", feature, at_least=0, at_most=most)
    chunk = integer(op, "chunk", chunk, at_least=0, at_most=most)
    seed = integer(op, "seed", seed, at_least=0, at_most=most)
    if _keys.choose(op, impl, given) == "reference":
        return _reference.salted_hash_bucket(
            given, buckets, feature=feature, chunk=chunk, seed=seed
        )
    flat = given.reshape(-1)
    out = _arrays.empty(given, (flat.shape[0],), "int64")
    _native.core().table_hash_bucket(
        flat.shape[0], _arrays.exported(flat), feature, chunk, seed, buckets, _arrays.exported(out)
    )
    return out.reshape(given.shape)


def hash_strings(strings: Sequence[str | bytes], *, impl: Impl = "auto") -> np.ndarray:
    """Hash strings to 64-bit keys, which every op of this room takes.

    h_0 = mix64(length + C3); h_i = mix64(h_(i-1) xor word_i) over the words of eight bytes, little-endian, the last one
    filled up with zeros; C3 = 0x165667B19E3779F9. A str is its UTF-8 bytes. These values are part of the checkpoint
    format. Two of n strings collide with probability about n^2 / 2^65; nothing is kept by which to notice. Not for
    strings chosen by an attacker.

    Args:
        strings: a sequence of n str or bytes, or a NumPy array of them.
        impl: "auto", "cpu" or "reference". Default "auto".

    Returns:
        Keys, NumPy int64 (n,), of either sign.

    Raises:
        TypeError: one string instead of a sequence, or an item that is neither str nor bytes.

    Example:
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
    parts = []
    for i, s in enumerate(strings):
        if isinstance(s, str):
            parts.append(s.encode())
        elif isinstance(s, bytes):
            parts.append(s)
        else:
            raise TypeError(
                f"[{op}] strings: expected str or bytes, got {type(s).__name__} at [{i}]. Pass integers as keys."
            )
    out = np.empty(len(parts), np.int64)
    if _keys.choose(op, impl, out) == "reference":
        return _reference.hash_strings(parts)
    offsets = np.zeros(len(parts) + 1, np.int64)
    np.cumsum([len(p) for p in parts], out=offsets[1:])
    _native.core().table_hash_strings(len(parts), b"".join(parts), offsets, out)
    return out
