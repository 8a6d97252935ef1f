# SPDX-License-Identifier: Apache-2.0
"""Salted hashing: frozen values, the reference bit by bit, uniformity, independence of salts."""

import functools

import numpy as np
import pytest
import torch
from hotloop import table
from hotloop.reference.table import hashing as reference
from table_checks import NO_ARRAY, grouped, refused

EXTREMES = np.array([0, 1, -1, 2**63 - 1, -(2**63), 42], np.int64)

FROZEN_PLAIN = [0, 704, 393, 670, 560, 504]
FROZEN_SALTED = [
    5159124514476412087,
    4337619420036180212,
    7177028902015999375,
    6600294524224885114,
    3150540392151069275,
    2177631945372573048,
]
FROZEN_STRINGS = [
    -824098762345677140,
    -7728834968560760693,
    1668692780657922417,
    3681251873981719529,
]


def test_values_are_frozen():
    # MurmurHash3's own finaliser, and what tables on disk were built with.
    assert reference.mix64_number(1) == 0xB456BCFC34C2CB2C
    assert table.salted_hash_bucket(EXTREMES, 1000).tolist() == FROZEN_PLAIN
    salted = table.salted_hash_bucket(EXTREMES, 2**63 - 1, feature=3, chunk=2, seed=5)
    assert salted.tolist() == FROZEN_SALTED
    assert table.hash_strings(["", "a", "12345678", b"123456789"]).tolist() == FROZEN_STRINGS


@pytest.mark.parametrize("buckets", [1, 2, 3, 1000, 2**31 + 11, 2**40, 2**63 - 1])
@pytest.mark.parametrize("n", [0, 1, 6, 32768, 32769])  # none, one, extremes, the grain of a thread
@pytest.mark.parametrize("salt", [(0, 0, 0), (7, 3, 2**64 - 1), (2**64 - 1, 1, 9)])
def test_equals_the_reference_bit_by_bit(buckets, n, salt):
    keys = np.random.default_rng(n).integers(-(2**63), 2**63 - 1, n)
    keys[: len(EXTREMES)] = EXTREMES[:n]
    number = dict(zip(("feature", "chunk", "seed"), salt))
    ours = table.salted_hash_bucket(keys, buckets, impl="cpu", **number)
    theirs = table.salted_hash_bucket(keys, buckets, impl="reference", **number)
    assert ours.dtype == np.int64
    assert np.array_equal(ours, theirs)
    assert ((ours >= 0) & (ours < buckets)).all()
    # Python's whole numbers have no halves to get wrong.
    for key, bucket in zip(keys[:6].tolist(), ours.tolist()):
        h = reference.mix64_number(key ^ reference.salt_of(*salt))
        assert (h * buckets) >> 64 == bucket


HASHES = {
    "bucket": functools.partial(table.salted_hash_bucket, num_buckets=97),
    "reference": functools.partial(table.salted_hash_bucket, num_buckets=97, impl="reference"),
    "feature": functools.partial(table.feature_keys, feature=5),
    "hashed feature": functools.partial(table.feature_keys, feature=5, feature_bits=0),
}


@pytest.mark.parametrize("hashed", HASHES.values(), ids=HASHES)
def test_kinds_shapes_and_widths(hashed):
    keys = np.array([[0, 1, -1], [2**46, -(2**47), 42]])
    wanted = hashed(keys)
    assert wanted.shape == (2, 3)
    assert np.array_equal(hashed(keys.view(np.uint64)), wanted)
    assert np.array_equal(hashed(keys[:, ::-1]), wanted[:, ::-1])
    t = torch.from_numpy(keys)
    for given in (t, t.view(torch.uint64), t.t().contiguous().t()):
        ours = hashed(given)
        assert isinstance(ours, torch.Tensor)
        assert np.array_equal(ours.numpy(), wanted)
    small = np.array([-1, 5], np.int32)
    assert np.array_equal(hashed(small), hashed(small.astype(np.int64)))
    for one in (np.array(42), torch.tensor(42)):
        assert type(hashed(one)) is type(one)
        assert hashed(one).shape == ()
        assert int(hashed(one)) == wanted[1, 2]


def chi_square(counts, expected):
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("pattern", ["consecutive", "strided", "high_bits"])
def test_uniform_over_buckets(pattern):
    n, buckets = 200_000, 1000
    keys = np.arange(n, dtype=np.int64)
    keys = {"consecutive": keys, "strided": keys * 4096, "high_bits": keys << 44}[pattern]
    for feature in range(4):
        b = table.salted_hash_bucket(keys, buckets, feature=feature)
        x = chi_square(np.bincount(b, minlength=buckets), n / buckets)
        # 999 degrees of freedom: +- 5 standard deviations, a false alarm in 2e6 each.
        assert abs(x - 999) < 5 * np.sqrt(2 * 999), (pattern, feature, x)
    # What the test must reject: the same multiply-shift without mixing.
    plain = reference.bucket_of(keys.view(np.uint64), buckets).astype(np.int64)
    assert chi_square(np.bincount(plain, minlength=buckets), n / buckets) > 1e4


def test_different_salts_collide_once_in_num_buckets():
    n, buckets = 400_000, 64
    keys = np.arange(n, dtype=np.int64)
    salts = [(0, 0, 0), (0, 1, 0), (1, 0, 0), (0, 0, 1), (2, 5, 0), (5, 2, 0)]
    found = [
        table.salted_hash_bucket(keys, buckets, feature=f, chunk=c, seed=s) for f, c, s in salts
    ]
    deviation = np.sqrt(n / buckets * (1 - 1 / buckets))
    for i, a in enumerate(found):
        for j, b in enumerate(found[:i]):
            hits = int((a == b).sum())
            # 15 pairs at 5 standard deviations: a false alarm in 1e5.
            assert abs(hits - n / buckets) < 5 * deviation, (salts[i], salts[j], hits)
    assert int((found[0] == found[0]).sum()) == n  # the same salt is seen


def test_strings():
    words = ["", "a", "ab", "1234567", "12345678", "123456789", "é", "a\0", "a\0\0", b"raw\xff"]
    ours = table.hash_strings(words, impl="cpu")
    assert np.array_equal(ours, table.hash_strings(words, impl="reference"))
    assert len(set(ours.tolist())) == len(words)
    assert ours[6] == table.hash_strings(["é".encode()])[0]
    assert np.array_equal(table.hash_strings(np.array(["a", "ab"])), ours[1:3])
    assert table.hash_strings([]).shape == (0,)
    many = table.hash_strings([f"id{i}" for i in range(100_000)])
    assert len(np.unique(many)) == 100_000
    b = np.bincount(table.salted_hash_bucket(many, 500), minlength=500)
    assert abs(chi_square(b, 200) - 499) < 5 * np.sqrt(2 * 499)


KEYS = np.arange(3)
META = torch.zeros(2, dtype=torch.int64, device="meta")
ERRORS = {
    ("salted_hash_bucket", TypeError): [
        (([1], 5), {}, f"keys: {NO_ARRAY} list"),
        ((np.zeros(2), 5), {}, "keys: expected dtype int64, uint64, int32, got float64"),
        ((KEYS, 5.0), {}, "num_buckets: expected an integer, got float"),
    ],
    ("salted_hash_bucket", ValueError): [
        ((KEYS, 0), {}, "num_buckets: expected an integer >= 1"),
        ((KEYS, 2**63), {}, "num_buckets: expected an integer >= 1 and <= 9"),
        ((KEYS, 5), {"feature": -1}, "feature: expected an integer >= 0"),
        ((KEYS, 5), {"chunk": 2**64}, "chunk: expected an integer >= 0 and <="),
        ((KEYS, 5), {"seed": -1}, "seed: expected an integer >= 0"),
    ],
    ("salted_hash_bucket", NotImplementedError): [
        ((KEYS, 5), {"impl": "cuda"}, "no implementation fits"),
        ((META, 5), {}, "no implementation fits"),
    ],
    ("hash_strings", TypeError): [
        (("word",), {}, "strings: expected a sequence of str or bytes, got one str"),
        ((["a", 3],), {}, "strings: expected str or bytes, got int at [1]. Pass"),
    ],
    ("hash_strings", NotImplementedError): [
        ((["a"],), {"impl": "triton"}, "no implementation fits"),
    ],
    ("feature_keys", TypeError): [
        (([1], 0), {}, f"ids: {NO_ARRAY}"),
        ((np.zeros(2), 0), {}, "ids: expected dtype int64, uint64, int32"),
        ((KEYS, 0.5), {}, "feature: expected an integer, got float"),
    ],
    ("feature_keys", ValueError): [
        (
            (np.array([5, 2**47]), 0),
            {},
            "ids: expected -140737488355328 to 140737488355327 beside 16 bits of the feature, got "
            "140737488355328. Take fewer feature_bits, or 0, which hashes.",
        ),
        ((np.array([5, -(2**47) - 1]), 0), {}, "ids: …got -140737488355329. Take"),
        ((KEYS, 2**16), {}, "feature: expected an integer >= 0 and <= 65535, got 65536"),
        ((KEYS, -1), {}, "feature: expected an integer >= 0"),
        ((KEYS, 2**64), {"feature_bits": 0}, "feature: expected an integer >= 0"),
        ((KEYS, 0), {"feature_bits": 33}, "feature_bits: expected"),
    ],
}


@pytest.mark.parametrize(("op", "kind", "args", "given", "text"), grouped(ERRORS))
def test_errors(op, kind, args, given, text):
    with refused(f"[{op}] {text}", kind):
        getattr(table, op)(*args, **given)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_whole_equals_eager(backend):
    def buckets(keys, seed):
        return table.salted_hash_bucket(keys + 1, 1000, feature=2, seed=seed)

    torch.compiler.reset()
    compiled = torch.compile(buckets, fullgraph=True, backend=backend)
    for n in (1, 4, 0, 7):
        keys = torch.arange(n)
        for seed in (0, 2**64 - 1):
            assert torch.equal(compiled(keys, seed), buckets(keys, seed))
