# SPDX-License-Identifier: Apache-2.0
"""Many features over one table: keys that no two of them share, and the lookup that learns from all of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hotloop import reference, table
from hotloop.reference.table import hashing
from hotloop.table import SGD, Constant, HashEmbedding, HashEmbeddingBag, feature_keys

EXTREMES = np.array([0, 1, -1, 2**63 - 1, -(2**63), 42], np.int64)


def fitting(bits: int, n: int = 50) -> np.ndarray:
    bound = 1 << (63 - bits)
    edge = [0, 1, -1, bound - 1, -bound, bound // 2, -(bound // 2)]
    inside = np.random.default_rng(bits).integers(-bound, bound, n)
    return np.unique(np.concatenate([edge, inside]))


def test_values_are_frozen():
    ids = np.array([0, 7, -1, 2**47 - 1, -(2**47)])
    found = [key % 2**64 for key in feature_keys(ids, 3).tolist()]
    assert found == [
        0x0003000000000000,
        0x0003000000000007,
        0xFFFCFFFFFFFFFFFF,
        0x00037FFFFFFFFFFF,
        0xFFFC800000000000,
    ]
    hashed = feature_keys(EXTREMES, 3, feature_bits=0).tolist()
    wanted = [hashing.mix64_number(i ^ hashing.salt_of(3, 0, 0)) for i in EXTREMES.tolist()]
    assert [key % 2**64 for key in hashed] == wanted
    # Its high bits are the bucket of the hash that was there before.
    buckets = table.salted_hash_bucket(EXTREMES, 1 << 20, feature=3)
    assert np.array_equal(np.array(hashed).view(np.uint64) >> np.uint64(44), buckets)


@pytest.mark.parametrize("bits", [1, 2, 7, 16, 32])
def test_no_two_features_share_a_key_where_ids_fit(bits):
    features = sorted({0, 1, 2**bits - 1, 2 ** (bits - 1), (2**bits - 1) // 3})
    ids = fitting(bits)
    keys = [feature_keys(ids, f, feature_bits=bits) for f in features]
    assert len(np.unique(np.concatenate(keys))) == len(features) * len(ids)
    for feature, part in zip(features, keys):
        wanted = [(i % 2**64) ^ (feature << (64 - bits)) for i in ids.tolist()]
        assert part.view(np.uint64).tolist() == wanted


def test_all_features_of_five_bits_beside_the_ends_of_what_fits():
    ids = fitting(5)
    keys = np.concatenate([feature_keys(ids, f, feature_bits=5) for f in range(32)])
    assert len(np.unique(keys)) == 32 * len(ids)
    # One id beyond them is another feature's: what the check is for.
    beyond = np.array([1 << 58])
    with pytest.raises(ValueError, match="ids: expected"):
        feature_keys(beyond, 0, feature_bits=5)
    unchecked = reference.table.feature_keys(beyond, 0, feature_bits=5)
    assert unchecked == feature_keys(np.array([-(1 << 58)]), 31, feature_bits=5)


@pytest.mark.parametrize("bits", [0, 7, 16])
@pytest.mark.parametrize("n", [0, 1, 1000])
def test_equals_the_reference_bit_by_bit(bits, n):
    ids = np.random.default_rng(n).integers(-(2**40), 2**40, n)
    for feature in (0, 1, 2 ** (bits or 64) - 1):
        ours = feature_keys(ids, feature, feature_bits=bits)
        theirs = reference.table.feature_keys(ids, feature, feature_bits=bits)
        assert ours.dtype == np.int64 and np.array_equal(ours, theirs)
        assert feature_keys(np.array(7), feature, feature_bits=bits).shape == ()


def test_hashed_keys_of_one_feature_never_meet_and_those_of_two_do_not_either_here():
    """2^18 consecutive ids of 8 features: a clash has probability 2^42 / 2^65."""
    ids = np.arange(1 << 18)
    keys = np.concatenate([feature_keys(ids, f, feature_bits=0) for f in range(8)])
    assert len(np.unique(keys)) == 8 << 18
    # Each bit of a key is set as often as not: 5 standard deviations, 64 bits, a false alarm in 3e4.
    ones = [(keys >> bit & 1).sum() for bit in range(64)]
    assert max(abs(int(n) - (4 << 18)) for n in ones) < 5 * np.sqrt((8 << 18) / 4)


@pytest.mark.parametrize("bits", [0, 16])
@pytest.mark.parametrize("kind", [HashEmbedding, HashEmbeddingBag])
def test_features_that_share_a_table_learn_apart(kind, bits):
    """As if each had a table of its own: the same rows, moved by its own gradients only."""
    rule, start = SGD(lr=0.5), Constant(1.0)
    ids = {0: torch.tensor([7, 8, 7]), 1: torch.tensor([7, 9, 9]), 40: torch.tensor([8, -1, 7])}
    shared = kind(3, optimizer=rule, initializer=start)
    loss = torch.zeros(())
    for feature, given in ids.items():
        weight = feature + torch.arange(1.0, 4.0)[:, None]
        loss = (
            loss
            + (
                shared(feature_keys(given, feature, feature_bits=bits)[:, None]).reshape(3, 3)
                * weight
            ).sum()
        )
    loss.backward()
    assert len(shared.table) == 2 + 2 + 3
    for feature, given in ids.items():
        alone = kind(3, optimizer=rule, initializer=start)
        weight = feature + torch.arange(1.0, 4.0)[:, None]
        (alone(given[:, None]).reshape(3, 3) * weight).sum().backward()
        keys = feature_keys(given, feature, feature_bits=bits)
        assert torch.equal(shared.table.find(keys).values, alone.table.find(given).values)
