# SPDX-License-Identifier: Apache-2.0
"""The verbs of ``Table`` against a Python dict: every type of rows, width, kind of array and key."""

import numpy as np
import pytest
import torch
from hotloop.core.rules import SGD
from hotloop.front import arrays
from hotloop.reference.core import philox_uniform
from hotloop.table import Adagrad, Constant, Normal, Table, Uniform, _store, salted_hash_bucket

LOW, HIGH = -(2**63), 2**63 - 1
EXTREMES = np.array([0, -1, LOW, HIGH, 1, -2, 2**32, -(2**32)], np.int64)
DTYPES = ("float32", "float16", "bfloat16")
KINDS = ("numpy", "torch")
# One number, less than a vector, a prime, one vector of 64, more than the 256 that fit on the stack.
DIMS = (1, 2, 7, 64, 300)


def made(x, kind):
    return torch.from_numpy(np.ascontiguousarray(x)) if kind == "torch" else x


def plain(x):
    return arrays.to_numpy(x).astype(np.float32)


def stored(x, dtype):
    """What float32 numbers are after a stay in rows of this type: torch rounds to nearest even."""
    return torch.from_numpy(np.ascontiguousarray(x)).to(getattr(torch, dtype)).float().numpy()


def some_keys(rng, n):
    """Distinct keys of any 64 bits, the extremes first."""
    drawn = np.setdiff1d(rng.integers(LOW, HIGH, 2 * n + 8, dtype=np.int64), EXTREMES)
    return np.concatenate([EXTREMES, rng.permutation(drawn)])[:n]


def assert_holds(table, model, keys, kind="numpy"):
    """The table holds the dict, and says so by every verb that reads."""
    found = table.find(made(keys, kind))
    wanted = [model.get(k) for k in keys.tolist()]
    there = [w is not None for w in wanted]
    assert found.found.tolist() == there
    assert table.contains(made(keys, kind)).tolist() == there
    values = np.stack([np.zeros(table.dim) if w is None else w for w in wanted]) if wanted else []
    np.testing.assert_array_equal(plain(found.values), np.reshape(values, (-1, table.dim)))
    rows = table.export()
    assert rows.keys.tolist() == sorted(model)
    assert len(table) == table.size == len(model)
    for key, value in zip(rows.keys.tolist(), rows.values.astype(np.float32)):
        np.testing.assert_array_equal(value, model[key])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_verbs_against_a_dict(dim, dtype, kind):
    rng = np.random.default_rng(dim)
    pool = some_keys(rng, 60)
    table = Table(dim, capacity=1, dtype=dtype, initializer=Uniform(-1, 1, seed=3))
    model: dict[int, np.ndarray] = {}
    first = Table(dim, dtype=dtype, initializer=Uniform(-1, 1, seed=3))

    def fresh(key):
        return plain(first.find_or_insert(np.array([key])).values)[0]

    for step in range(40):
        keys = rng.choice(pool, rng.integers(0, 20))  # with repeats, sometimes none
        values = rng.normal(size=(len(keys), dim)).astype(np.float32)
        rounded = stored(values, dtype)
        known = [k in model for k in keys.tolist()]
        k, v = made(keys, kind), made(values, kind)
        verb = step % 6
        if verb == 0:
            assert table.insert_or_assign(k, v).tolist() == [True] * len(keys)
            model.update(zip(keys.tolist(), rounded))
        elif verb == 1:
            found = table.find_or_insert(k)
            for key in keys.tolist():
                model.setdefault(key, fresh(key))
            # A key that is repeated was let in by its first occurrence.
            seen = [key in keys.tolist()[:i] for i, key in enumerate(keys.tolist())]
            assert found.found.tolist() == [a or b for a, b in zip(known, seen)]
            wanted = np.reshape([model[key] for key in keys.tolist()], (-1, dim))
            np.testing.assert_array_equal(plain(found.values), wanted)
        elif verb == 2:
            assert table.assign(k, v).tolist() == known
            model.update((a, b) for a, b, c in zip(keys.tolist(), rounded, known) if c)
        elif verb == 3:
            accum = rng.random(len(keys)) < 0.5
            done = table.accum_or_assign(k, v, made(accum, kind))
            assert done.tolist() == [a == b for a, b in zip(accum.tolist(), known)]
            for key, value, add, was in zip(keys.tolist(), rounded, accum, known):
                if add and was:
                    model[key] = stored(model[key] + value, dtype)
                elif not add and not was:
                    model[key] = value
        elif verb == 4:
            gone = table.erase(k)
            assert gone.tolist() == [model.pop(key, None) is not None for key in keys.tolist()]
        else:
            evicted = table.insert_and_evict(k, v)
            assert [len(x) for x in evicted] == [0, 0, 0]
            model.update(zip(keys.tolist(), rounded))
        assert_holds(table, model, pool, kind)
    assert len(model) > 5
    table.clear()
    assert_holds(table, {}, pool, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [*DTYPES, "int8"])
def test_results_are_of_the_kind_of_the_keys(kind, dtype):
    table = Table(3, dtype=dtype, initializer=Constant(0.5))
    keys = made(EXTREMES, kind)
    shown = dtype if dtype != "int8" and (kind, dtype) != ("numpy", "bfloat16") else "float32"
    for found in (table.find(keys), table.find_or_insert(keys), table.find(keys)):
        assert type(found.values) is type(found.found) is type(keys)
        assert arrays.dtype(found.found) == "bool" and found.found.shape == (8,)
        assert found.values.shape == (8, 3)
        assert arrays.dtype(found.values) in (shown, "float32")
    assert arrays.dtype(found.values) == shown


def test_unsigned_and_narrow_keys_are_the_same_keys():
    table = Table(1)
    unsigned = np.array([2**63, 2**64 - 1, 0, 2**63 - 1], np.uint64)
    values = np.arange(4, dtype=np.float32)[:, None]
    table.insert_or_assign(unsigned, values)
    signed = np.array([LOW, -1, 0, HIGH], np.int64)
    for keys in (unsigned, signed, torch.from_numpy(signed), torch.from_numpy(unsigned)):
        found = table.find(keys)
        assert found.found.all()
        np.testing.assert_array_equal(plain(found.values), values)
    narrow = np.array([-1, 0, 2**31 - 1, -(2**31)], np.int32)
    assert table.contains(narrow).tolist() == [True, True, False, False]
    table.insert_or_assign(narrow, values)
    assert table.contains(narrow.astype(np.int64)).all()
    assert plain(table.find(np.array([-(2**31)])).values).tolist() == [[3.0]]
    assert len(table) == 6


@pytest.mark.parametrize("strides", [(8, 4), (4, 8)])  # no element has a place
@pytest.mark.parametrize("kind", KINDS)
def test_empty_batches_change_nothing(kind, strides):
    table = Table(2, optimizer=SGD(), track="use")
    table.insert_or_assign(np.array([1]), np.ones((1, 2), np.float32))
    none, mask = made(np.empty(0, np.int64), kind), made(np.empty(0, bool), kind)
    nothing = np.lib.stride_tricks.as_strided(np.empty(0, np.float32), (0, 2), strides)
    nothing = torch.from_numpy(nothing) if kind == "torch" else nothing
    assert table.find(none).values.shape == (0, 2)
    assert table.find_or_insert(none).found.shape == (0,)
    assert table.insert_or_assign(none, nothing).shape == (0,)
    assert table.assign(none, nothing).shape == (0,)
    assert table.accum_or_assign(none, nothing, mask).shape == (0,)
    assert table.insert_and_evict(none, nothing).values.shape == (0, 2)
    assert table.erase(none).shape == table.contains(none).shape == (0,)
    assert table.update(none, nothing) == 0
    assert len(table) == 1 and table.export().values.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("n", [9, 5000])  # one thread's work, and three's
def test_repeated_keys_take_effect_in_order(n, threads):
    torch.set_num_threads(threads)
    rng = np.random.default_rng(n)
    keys = rng.choice(some_keys(rng, n // 4), n)
    values = np.arange(2 * n, dtype=np.float32).reshape(n, 2)
    table = Table(2, capacity=1)
    table.insert_or_assign(keys, values)
    last = dict(zip(keys.tolist(), values))
    assert_holds(table, last, np.unique(keys))
    assert not table.accum_or_assign(keys, values, np.zeros(n, bool)).any()
    assert table.accum_or_assign(keys, values, np.ones(n, bool)).all()  # below 2^24: exact sums
    for key, value in zip(keys.tolist(), values):
        last[key] = last[key] + value
    assert_holds(table, last, np.unique(keys))
    erased = table.erase(keys)
    _, first = np.unique(keys, return_index=True)
    assert np.flatnonzero(erased).tolist() == sorted(first.tolist())
    assert len(table) == 0


@pytest.mark.parametrize("dtype", [*DTYPES, "int8"])
@pytest.mark.parametrize("dim", [1, 7])
def test_growth_changes_no_row(dim, dtype):
    """From one row to 10^5, by batches whose sizes straddle one thread's work."""
    rng = np.random.default_rng(4)
    total = 100_000 if dim == 1 else 20_000
    keys = some_keys(rng, total)
    table = Table(dim, capacity=1, dtype=dtype)
    codes = rng.integers(-128, 128, (total, dim)).astype(np.float32) / 128  # exact in every type
    at, capacities = 0, set()
    for size in [1, 1, 2, 9, 511, 512, 513, 7000, total]:
        end = min(at + size, total)
        table.insert_or_assign(keys[at:end], codes[at:end])
        at = end
        capacities.add(table.capacity)
        assert table.size == at <= table.capacity
        assert table.load_factor <= _store.MAX_LOAD_FACTOR + 0.08  # 11 of 12 slots
        found = table.find(keys[:at])
        assert found.found.all()
        np.testing.assert_array_equal(plain(found.values), codes[:at])
    assert at == total and len(capacities) > 5
    assert not table.contains(some_keys(np.random.default_rng(99), 5000)[8:]).any()
    before = table.capacity
    table.reserve(3 * before)
    assert table.capacity >= 3 * before
    np.testing.assert_array_equal(plain(table.find(keys).values), codes)


def test_freed_rows_are_used_again():
    table = Table(4, capacity=1000)
    keys = np.arange(1000)
    for round in range(50):
        table.insert_or_assign(keys + 1000 * round, np.full((1000, 4), round, np.float32))
        assert table.erase(keys + 1000 * round).all()
    assert table._native.end <= 2000 and table.capacity < 2000


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_any_stride(kind):
    """Rows cut out of wider ones, columns that are apart, keys with a stride, a transposed matrix."""
    rng = np.random.default_rng(0)
    wide = rng.normal(size=(50, 9)).astype(np.float32)
    every = some_keys(rng, 100)
    keys = every[::2]
    for values in (wide[:, 2:7], wide[:, :5], wide[:, ::2], wide.T[:5].copy().T, wide[::-1, :5]):
        if kind == "torch" and values.strides[0] < 0:
            continue  # torch has none
        table = Table(5)
        k, v = keys, values
        if kind == "torch":
            k, v = torch.from_numpy(every)[::2], torch.from_numpy(values)
            assert v.stride() == tuple(s // 4 for s in values.strides)
        assert table.insert_or_assign(k, v).all()
        np.testing.assert_array_equal(plain(table.find(k).values), values)
        assert table.accum_or_assign(k, v, made(np.ones(50, bool), kind)).all()
        np.testing.assert_array_equal(plain(table.find(k).values), 2 * values)


def test_int8_rows_are_codes():
    values = np.array([[-1.0, -0.5, 0.0, 0.4921875, 0.9921875], [1.5, -1.5, 0.003, 0.005, 0]])
    table = Table(5, dtype="float32")
    table.insert_or_assign(np.array([5, -5]), values.astype(np.float32))
    served = table.quantized(value_range=1.0)
    wanted = np.clip(np.round(values * 128), -128, 127) / 128
    assert np.abs(plain(served.find(np.array([5, -5])).values) - wanted).max() <= 1 / 128
    np.testing.assert_array_equal(plain(served.find(np.array([5])).values)[0], values[0])
    coded = np.array([[1, -128, 127, 0, 3]], np.int8)
    served.insert_or_assign(np.array([7]), coded)
    np.testing.assert_array_equal(plain(served.find(np.array([7])).values), coded / np.float32(128))
    # New rows of int8 are zeros: they are for serving.
    assert not plain(served.find_or_insert(np.array([8])).values).any()
    assert len(served) == 4 and served.dtype == "int8" and len(table) == 2


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_quantized_to_halves_rounds_to_even(dtype):
    rng = np.random.default_rng(1)
    keys, values = some_keys(rng, 300), rng.normal(size=(300, 3)).astype(np.float32)
    table = Table(3)
    table.insert_or_assign(keys, values)
    served = table.quantized(dtype)
    np.testing.assert_array_equal(plain(served.find(keys).values), stored(values, dtype))


@pytest.mark.parametrize("initializer", [Uniform(-2, 3, seed=9), Normal(1, 0.5, seed=2**64 - 1)])
@pytest.mark.parametrize("dim", DIMS)
def test_first_values_follow_from_seed_and_key(level, dim, initializer):
    """Any order, any split into batches, any number of threads, any instruction set."""
    keys = some_keys(np.random.default_rng(5), 1200)
    wanted = None
    for threads, batches in ((1, 1), (2, 1), (3, 7)):
        torch.set_num_threads(threads)
        order = (
            np.random.default_rng(batches).permutation(len(keys)) if batches > 1 else slice(None)
        )
        table = Table(dim, capacity=1, initializer=initializer)
        for part in np.array_split(keys[order], batches):
            table.find_or_insert(part)
        found = table.find(keys).values
        if wanted is None:
            wanted = found.copy()
        np.testing.assert_array_equal(found.view(np.uint32), wanted.view(np.uint32))
    digest = _digests.setdefault((dim, initializer), wanted.tobytes())
    assert digest == wanted.tobytes(), f"{level} draws other bits"
    other = Table(dim, initializer=type(initializer)(seed=1)).find_or_insert(keys).values
    assert (other != wanted).mean() > 0.9


_digests: dict = {}


def test_uniform_values_are_the_words_of_philox():
    """Element j is word j mod 4 of the block j // 4, as the docstring says."""
    keys = some_keys(np.random.default_rng(6), 20)
    found = Table(10, initializer=Uniform(0, 1, seed=77)).find_or_insert(keys).values
    for key, row in zip(keys.tolist(), found):
        item = key % 2**64
        u = [philox_uniform(77, 1, offset=block, first_item=item) for block in range(3)]
        np.testing.assert_array_equal(row, np.reshape(u, -1)[:10])


def ks_distance(sample, law):
    x = np.sort(sample)
    n = len(x)
    f = law(x)
    return max((np.arange(1, n + 1) / n - f).max(), (f - np.arange(n) / n).max())


def uniform_law(x):
    return (x + 2) / 5


def normal_law(x):
    return 0.5 * (1 + torch.erf(torch.from_numpy((x - 1) / 0.5 / np.sqrt(2)))).numpy()


@pytest.mark.parametrize(
    ("initializer", "law", "wrong"),
    [
        (Uniform(-2, 3), uniform_law, lambda x: uniform_law(x + 0.02)),
        (Normal(1, 0.5), normal_law, lambda x: normal_law(1 + (x - 1) * 1.01)),
    ],
)
def test_law_of_first_values(initializer, law, wrong):
    """Kolmogorov and Smirnov: D sqrt(n) > 2.4 once in 50 000 for the right law (2 exp(-2 * 2.4^2) = 2e-5).

    A mean that is off by 0.4% of the range, a deviation by 1%, must be rejected.
    """
    keys = np.arange(100_000) * 3 - 150_000  # neighbours, which a weak hash would leave alike
    values = Table(4, initializer=initializer).find_or_insert(keys).values.astype(np.float64)
    n = values.size
    assert ks_distance(values.ravel(), law) * np.sqrt(n) < 2.4
    assert ks_distance(values.ravel(), wrong) * np.sqrt(n) > 2.4
    # Columns and neighbouring keys are independent: correlations of 10^5 pairs, five deviations.
    centred = (values - values.mean(0)) / values.std(0)
    limit = 5 / np.sqrt(len(keys))
    off = centred.T @ centred / len(keys) - np.eye(4)
    assert np.abs(off).max() < limit
    assert np.abs((centred[1:] * centred[:-1]).mean(0)).max() < limit


@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_rows(dtype):
    found = Table(300, dtype=dtype, initializer=Constant(0.3)).find_or_insert(EXTREMES)
    wanted = np.full((8, 300), stored(np.float32([0.3]), dtype))
    np.testing.assert_array_equal(plain(found.values), wanted)


def test_expiry_keeps_what_was_used_at_the_boundary():
    table = Table(1, track="use", optimizer=SGD(lr=0.0))
    keys = np.arange(6)
    ones = np.ones((6, 1), np.float32)
    for key in keys:
        table.insert_or_assign(keys[key : key + 1], ones[:1], time=100 + int(key))
    assert table.export().last_use.tolist() == [100, 101, 102, 103, 104, 105]
    table.find(keys)
    table.contains(keys)
    assert table.export().last_use.tolist() == [100, 101, 102, 103, 104, 105]
    assert table.expire(100) == 0
    assert table.expire(103) == 3
    assert table.contains(keys).tolist() == [False] * 3 + [True] * 3
    table.find_or_insert(keys[3:4], time=200)
    table.update(keys[4:5], ones[:1], time=201)
    table.assign(keys[5:], ones[:1], time=90)  # time does not run backwards
    assert table.export().last_use.tolist() == [200, 201, 105]
    table.accum_or_assign(keys[5:], ones[:1], np.array([True]), time=199)
    assert table.expire(200) == 1
    assert table.export().keys.tolist() == [3, 4]
    assert table.expire(2**32 - 1) == 2 and len(table) == 0


def test_now_is_the_default_time(monkeypatch):
    monkeypatch.setattr(_store._time, "time", lambda: 1234.9)
    table = Table(1, track="use")
    table.find_or_insert(np.array([1]))
    assert table.export().last_use.tolist() == [1234]


@pytest.mark.parametrize("threads", [1, 3])
def test_expiry_of_many_rows(threads):
    torch.set_num_threads(threads)
    rng = np.random.default_rng(threads)
    keys = some_keys(rng, 30_000)
    times = rng.integers(0, 50, len(keys))
    table = Table(2, capacity=1, track="use")
    for time in range(50):
        mine = keys[times == time]
        table.insert_or_assign(mine, np.full((len(mine), 2), time, np.float32), time=time)
    assert table.expire(20) == (times < 20).sum()
    np.testing.assert_array_equal(table.contains(keys), times >= 20)
    assert table.size == (times >= 20).sum()


def test_memory_beyond_values_and_state_at_full_load():
    """16 bytes per row: key, its live bit and 64 / 12 / 0.85 of the index. Rows come in chunks of 4 MiB."""
    table = Table(32, capacity=400_000)
    capacity = table.capacity
    keys = np.arange(capacity)
    values = np.zeros((capacity, 32), np.float32)
    table.insert_or_assign(keys, values)
    assert table.capacity == capacity, "it is full and did not grow"
    assert 0.849 < table.load_factor <= 0.8501
    beyond = table.nbytes - values.nbytes
    chunk = 5 << 20
    assert beyond <= 16 * capacity + chunk
    assert (beyond - chunk) / capacity < 16 and beyond / capacity > 14


def test_what_it_says_of_itself():
    table = Table(2, capacity=10, max_capacity=20, evict_strategy="lru", optimizer=SGD(lr=1.0))
    assert repr(table).startswith("Table(dim=2, size=0, capacity=") and "'lru'" in repr(table)
    assert 10 <= table.capacity <= 20 and table.state_width == 0
    table.find_or_insert(np.arange(20))
    assert table.capacity == 20 == len(table)
    assert table.scores(np.array([3, 99])).tolist() == [1, 0]


def test_a_shard_takes_its_part_of_every_delta(tmp_path):
    source = Table(2, track=("changes",))
    keys = np.arange(300)
    source.insert_or_assign(keys[:100], np.zeros((100, 2), np.float32))
    source.save(tmp_path / "t")
    shards = [Table.load(tmp_path / "t", shard=(i, 3)) for i in range(3)]
    source.insert_or_assign(keys[50:], np.ones((250, 2), np.float32))
    source.erase(keys[:10])
    delta = source.delta(shards[0]._position)
    for i, shard in enumerate(shards):
        assert shard.apply(delta)
        assert (salted_hash_bucket(shard.export().keys, 3) == i).all()
        shard.save(tmp_path / str(i))  # and it is a shard still when it comes back
        again = Table.load(tmp_path / str(i))
        source.insert_or_assign(keys + 1000 * (i + 1), np.ones((300, 2), np.float32))
        assert again.apply(source.delta(again._position))
        assert (salted_hash_bucket(again.export().keys, 3) == i).all()
    both = np.sort(np.concatenate([shard.export().keys for shard in shards]))
    np.testing.assert_array_equal(both, keys[10:])


@pytest.mark.parametrize("threads", [1, 3])
def test_of_a_key_that_was_seen_twice_the_later_row_stays_whole(threads):
    """Values and state of one moment, whatever the threads: a scan may meet a key that moved."""
    torch.set_num_threads(threads)
    table = Table(2, optimizer=Adagrad(lr=0.1))
    keys = np.tile(
        np.arange(2000), 2
    )  # far apart: in the hands of two threads, unless a key has one
    values = np.repeat(np.arange(4000, dtype=np.float32)[:, None], 2, 1)
    table._native.import_rows(4000, (keys, values, values + 0.5, None, None))
    rows = table.export()
    np.testing.assert_array_equal(rows.values[:, 0], np.arange(2000, 4000))
    np.testing.assert_array_equal(rows.state, rows.values + 0.5)
