# SPDX-License-Identifier: Apache-2.0
"""Snapshots that no table wrote: entries of wrong types and sizes under a checksum that is right, and odd files."""

import copy
import json
import os
import sys

import numpy as np
import pytest
from hotloop.table import Adam, CountFilter, ProbabilisticFilter, Table
from hotloop.table.files import container, disk, manifests, snapshots
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import printed
from table_checks import refused
from table_file_cases import reseal, resealed

FormatError = container.FormatError


def table_of(admission=None):
    table = Table(
        3,
        max_capacity=100,
        evict_strategy="lru",
        optimizer=Adam(),
        track=("use", "changes"),
        admission=admission,
    )
    table.insert_or_assign(np.arange(40), np.ones((40, 3), np.float32), time=7)
    return table


def entries(directory):
    return json.loads((directory / snapshots.MANIFEST).read_bytes())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("snapshot")
    table_of(CountFilter(1000, 2)).save(directory)
    return directory


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2**31, 2**32, 2**48, 2**63 - 1, 2**63, 2**64, 10**400, -(10**400)]),
    st.sampled_from([0.0, -1.5, 1e308, 1.5]),
    st.sampled_from(["", "x", "__class__", "Table", "os", "NaN", "\ud800", "float32", "../x"]),
    st.sampled_from([[], {}, [[]], [1, 2, 3], {"a": {}}, [None], {"name": "Adam"}]),
    st.sampled_from(
        [{"name": "settings"}, {"name": "number"}, {"name": ["Adam"]}, {"name": "Any"}]
    ),
)


def places(value, path=()):
    yield path
    if isinstance(value, list):
        value = dict(enumerate(value))
    for name, child in value.items() if isinstance(value, dict) else ():
        yield from places(child, (*path, name))


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_manifest_with_odd_entries_is_a_format_error_or_the_table(saved, data):
    changed = entries(saved)
    whole = (saved / snapshots.MANIFEST).read_bytes()
    try:
        for _ in range(data.draw(st.integers(1, 3))):
            *path, last = data.draw(
                st.sampled_from([p for p in places(changed) if p and p != ("hotloop_crc32",)])
            )
            at = changed
            for name in path:
                at = at[name]
            if data.draw(st.booleans()):
                at[last] = copy.deepcopy(data.draw(ODD))
            else:
                del at[last]
        reseal(saved / snapshots.MANIFEST, json.dumps(changed, indent=1).encode() + b"\n")
        try:
            # Another setting, or the same again.
            rows, text = len(Table.load(saved)), "[Table.load] "
        except FormatError as error:
            rows, text = 0, str(error)
        assert rows <= 40 and text.startswith("[Table.load] ")
    finally:
        (saved / snapshots.MANIFEST).write_bytes(whole)


@pytest.mark.parametrize(
    ("entry", "value", "text"),
    [
        ("optimizer", {"name": "settings", "op": "x"}, "expected optimizer.name of SGD, Rowwise"),
        ("optimizer", {"name": "Adam", "lr": -1.0}, r"Adam\] lr: expected a number >= 0"),
        ("optimizer", {"name": "Adam", "speed": 1.0}, "unexpected keyword argument 'speed'"),
        ("initializer", {"name": "Path"}, "expected initializer.name of Constant, Uniform, Normal"),
        ("dim", 2**40, r"\[config\] dim: expected an integer >= 1 and <= 65536"),
        ("dim", 4, r"\[Table.load\] values: expected F32 \(40, 4\), got F32 \(40, 3\)"),
        ("dtype", "float16", r"\[Table.load\] values: expected F16 \(40, 3\), got F32"),
        ("dtype", "float8", "expected dtype of float32, float16, bfloat16, int8, got 'float8'"),
        ("tick", -1, "tick: expected an integer >= 0"),
        ("position", 2**63, "position: expected an integer >= 0"),
        ("track", "use", "track: expected list, got str"),
        ("value_range", "1", "value_range: expected a number"),
        ("table_id", "x", "table_id: expected 32 hexadecimal digits, got 'x'"),
        ("shard", [3, 2], "shard: expected an integer >= 0 and <= 1, got 3"),
        ("hash_seed", 2**64, "hash_seed: expected an integer"),
        ("max_capacity", None, "max_capacity: expected a bound with evict_strategy"),
        ("own_mark", 1, "own_mark: expected bool, got int"),
    ],
)
def test_what_a_config_cannot_say(tmp_path, entry, value, text):
    table_of().save(tmp_path)
    resealed(tmp_path, lambda content: content["config"].update({entry: value}))
    with pytest.raises(FormatError, match=text):
        Table.load(tmp_path)


def test_names_given_twice_and_numbers_that_are_none(tmp_path):
    table_of().save(tmp_path)
    whole = (tmp_path / snapshots.MANIFEST).read_bytes()
    for old, new in (
        (b' "rows": 40,', b' "rows": 40,\n "rows": 40,'),
        (b'"value_range": 1.0', b'"value_range": NaN'),
        (b'"value_range": 1.0', b'"value_range": Infinity'),
    ):
        assert old in whole
        reseal(tmp_path / snapshots.MANIFEST, whole.replace(old, new))
        with pytest.raises(
            FormatError, match=r"expected JSON, got (a name given twice|the number)"
        ):
            Table.load(tmp_path)


HUGE = """
import resource, sys
from hotloop.table import Table
Table(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    Table.load(sys.argv[1])
except ValueError as error:
    print(type(error).__name__, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def refused_within(directory):
    name, grown = printed(HUGE, str(directory)).split()
    assert name == "FormatError" and int(grown) < 64 << 10  # KiB


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read as Linux gives it")
@pytest.mark.parametrize("capacity", [2**31, 2**48])
def test_a_filter_takes_no_memory_that_its_cells_do_not_fill(tmp_path, capacity):
    """A manifest of 2 KB took 5.9 GiB before it was refused."""
    table_of(CountFilter(1000, 2)).save(tmp_path)
    resealed(tmp_path, lambda content: content["admission"]["state"].update(capacity=capacity))
    refused_within(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read as Linux gives it")
def test_rows_take_no_memory_that_their_parts_do_not_fill(tmp_path):
    table_of().save(tmp_path)

    def grow(content):
        content["config"]["max_capacity"] = content["rows"] = 2**31
        content["parts"][0]["rows"] = 2**31

    resealed(tmp_path, grow)
    refused_within(tmp_path)


def test_a_pickled_filter_takes_no_memory_that_its_cells_do_not_fill():
    state = CountFilter(1000, 2).__getstate__()
    state["state"]["capacity"] = 2**48
    with pytest.raises(ValueError, match=r"expected .* cells for capacity 281474976710656, got"):
        CountFilter.__new__(CountFilter).__setstate__(state)


def test_filters_come_back(tmp_path):
    counter = CountFilter(1000, 2)
    counter.add(np.arange(500))
    for admission in (counter, ProbabilisticFilter(3.0, seed=4)):
        table_of(admission).save(tmp_path)
        found = Table.load(tmp_path).admission
        assert repr(found) == repr(admission)
    assert (
        CountFilter.restored(counter.state_dict(), 2).counts(np.arange(600))
        == counter.counts(np.arange(600))
    ).all()


def kinds(path):
    """What may stand where a file should: each is refused and none is waited for."""
    os.mkfifo(path)
    yield "a pipe"
    path.unlink()
    path.mkdir()
    yield "a directory"
    path.rmdir()
    path.symlink_to("/dev/zero")
    yield "a device"
    path.unlink()


@pytest.mark.skipif(sys.platform != "linux", reason="pipes and devices as Linux has them")
@pytest.mark.timeout(60)
def test_what_is_no_file_is_refused(tmp_path):
    manifest = tmp_path / snapshots.MANIFEST
    for got in kinds(manifest):
        with refused(f"[Table.load] …: expected a regular file, got {got}", FormatError):
            Table.load(tmp_path)
        with refused(f"expected a regular file, got {got}", FormatError):
            table_of().save(tmp_path)
    table_of().save(tmp_path)
    part = tmp_path / entries(tmp_path)["parts"][0]["file"]
    part.unlink()
    for got in kinds(part):
        with refused(f"expected a regular file, got {got}", FormatError):
            Table.load(tmp_path)


def test_a_file_of_another_program_is_not_read_further_than_its_beginning(tmp_path):
    """A terabyte each: whoever reads it whole does not get far."""
    path = tmp_path / snapshots.MANIFEST
    for start, text in (
        (b"something else", "expected a snapshot's manifest, got b'something else"),
        (manifests.PREFIX, "expected a manifest of at most 268435456 bytes, got a larger one"),
    ):
        with open(path, "wb") as file:
            file.write(start)
            file.truncate(1 << 40)
        with pytest.raises(FormatError, match=text):
            Table.load(tmp_path)
    with open(path, "wb") as file:
        file.write((1 << 41).to_bytes(8, "little") + container.PREFIX)
        file.truncate(1 << 40)
    text = "expected a header of at most 1048576 bytes, got 2199023255552"
    with pytest.raises(FormatError, match=text):
        container.decode(disk.read(path), "it")


SHRINKS = """
import os, sys
import numpy as np
from hotloop.table import Table
from hotloop.table.files import container, disk
real = container.decode
def shrunk(data, path, **rest):
    os.truncate(path, 4096)
    return real(data, path, **rest)
container.decode = shrunk
Table.load(sys.argv[1])
print("loaded")
"""


def test_a_part_that_shrinks_while_it_is_read_does_not_end_the_process(tmp_path):
    """It was mapped, and the process died of SIGBUS."""
    table = Table(64)
    table.insert_or_assign(np.arange(2000), np.ones((2000, 64), np.float32))
    table.save(tmp_path)
    assert printed(SHRINKS, str(tmp_path)) == "loaded\n"


def test_a_part_that_was_shorter_than_its_size_is_a_format_error(tmp_path, monkeypatch):
    table_of().save(tmp_path)
    real = os.preadv
    monkeypatch.setattr(
        disk.os,
        "preadv",
        lambda fd, buffers, at: real(fd, [buffers[0][:100]], at) if at < 100 else 0,
    )
    with pytest.raises(FormatError):
        Table.load(tmp_path)
