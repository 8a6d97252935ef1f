# SPDX-License-Identifier: Apache-2.0
"""Snapshots in a directory: what comes back, what is deleted and what is not, savers and readers at once."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import table_file_cases
from hotloop.table.files import container, disk, snapshots
from hotloop.table.files.container import FormatError, NewerFormatError
from hotloop.table.files.snapshots import load, save, verify
from hypothesis import given, settings
from hypothesis import strategies as st
from table_checks import refused
from table_file_cases import any_array, assert_same, flipped, join, rows

FORKSERVER = multiprocessing.get_context("forkserver")


def parts(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name.startswith("part-"))


def loaded(directory: Path, **options: bool) -> tuple[dict, dict]:
    config, blocks = load(directory, **options)
    return config, join(blocks)


def resealed(directory: Path, **entries: object) -> None:
    table_file_cases.resealed(directory, lambda content: content.update(entries))


@pytest.mark.parametrize("count", [1, 2, 12, 13, 14, 1000])  # parts of 13 rows
def test_rows_come_back_in_order(tmp_path, count):
    row_bytes = 8 + 6 + 12 + 8 + 4
    block = rows(count)
    summary = save(tmp_path, {"dim": 3}, [block], part_bytes=13 * row_bytes)
    config, found = loaded(tmp_path)
    assert config == {"dim": 3}
    assert_same(found, block)
    assert summary == verify(tmp_path)
    assert (summary.rows, summary.parts) == (count, -(-count // 13))
    assert summary.bytes == sum((tmp_path / name).stat().st_size for name in parts(tmp_path))


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_blocks_come_back(tmp_path_factory, data):
    """Blocks of any sizes, 0 too, of any types, in parts of any size."""
    names = data.draw(
        st.lists(st.text("abc\x00é", min_size=1), min_size=1, max_size=3, unique=True)
    )
    length = data.draw(st.integers(0, 40))
    whole = {name: data.draw(any_array(st.just(length))) for name in names}
    cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=4)))
    blocks = [
        {name: array[start:stop] for name, array in whole.items()}
        for start, stop in zip([0, *cuts], [*cuts, length])
    ]
    directory = tmp_path_factory.mktemp("snapshot")
    save(directory, {}, blocks, part_bytes=data.draw(st.integers(1, 500)))
    found = loaded(directory)[1]
    if length:
        assert_same(found, whole)
    else:
        assert not found
    shutil.rmtree(directory)


@pytest.mark.parametrize("blocks", [[], [rows(0)], [rows(0), rows(0)]])
def test_a_table_without_rows_has_no_parts(tmp_path, blocks):
    save(tmp_path, {"dim": 3}, [rows(5)])
    summary = save(tmp_path, {"dim": 4}, blocks)
    assert (summary.rows, summary.parts, summary.bytes) == (0, 0, 0)
    assert loaded(tmp_path) == ({"dim": 4}, {})
    assert verify(tmp_path) == summary
    assert not parts(tmp_path)


def test_parts_are_bounded_and_a_larger_row_has_its_own(tmp_path):
    save(tmp_path, {}, [rows(1000)], part_bytes=4096)
    assert all((tmp_path / name).stat().st_size <= 4096 + 1024 for name in parts(tmp_path))
    assert save(tmp_path, {}, [rows(4, dim=100)], part_bytes=1).parts == 4


def test_saving_and_loading_hold_one_part_and_one_block(tmp_path):
    part, block = 1 << 20, 1 << 18

    def blocks():
        for first in range(0, 20 * part, block):
            yield {"keys": np.arange(first // 8, (first + block) // 8)}

    def read():
        found = load(tmp_path)[1]
        assert sum(len(block["keys"]) for block in found) == 20 * part // 8

    tracemalloc.start()
    try:
        for call, most in (
            (lambda: save(tmp_path, {}, blocks(), part_bytes=part), part + block + 65536),
            (read, 2.5 * part),  # the loop's block, the next part
            (lambda: verify(tmp_path), 2.5 * part),
        ):
            tracemalloc.reset_peak()
            call()
            assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


def test_the_old_snapshot_goes_and_what_is_not_ours_stays(tmp_path):
    save(tmp_path, {}, [rows(50)], part_bytes=500)
    old = parts(tmp_path)
    token = "0" * 16
    foreign = ["part-1.safetensors", "model.safetensors", "part-XYZ-000000.safetensors"]
    foreign += [f"part-{token}-000000.safetensors.bak", f"part-{token}-12.safetensors"]
    foreign += ["notes.txt", ".x.hotloop-tmp"]
    for name in foreign:
        (tmp_path / name).write_text("mine")
    (tmp_path / f"part-{token}-000000.safetensors").mkdir()
    (tmp_path / f"part-{token}-000001.safetensors").symlink_to(tmp_path / "notes.txt")
    orphans = [f"part-{'1' * 16}-{index:06d}.safetensors" for index in (0, 1, 12, 1_000_000)]
    orphans += [f"part-{'2' * 16}-000003.safetensors", f".table.json.{'3' * 16}.hotloop-tmp"]
    for name in orphans:
        (tmp_path / name).write_text("left by a killed save")
    before = set(os.listdir(tmp_path))
    save(tmp_path, {}, [rows(50)], part_bytes=500)
    after = set(os.listdir(tmp_path))
    assert before - after == {*old, *orphans}
    assert (tmp_path / "notes.txt").read_text() == "mine"
    verify(tmp_path)


def test_a_reader_keeps_the_snapshot_it_started(tmp_path):
    save(tmp_path, {"generation": 1}, [rows(50)], part_bytes=500)
    config, blocks = load(tmp_path)
    first = next(blocks)
    for generation in (2, 3):
        save(tmp_path, {"generation": generation}, [rows(9)], part_bytes=500)
    assert config == {"generation": 1}
    assert_same(join(iter([first, *blocks])), rows(50))
    assert loaded(tmp_path)[0] == {"generation": 3}
    save(tmp_path, {"generation": 4}, [rows(9)], part_bytes=500)
    assert {name[5:21] for name in parts(tmp_path)} == {verify(tmp_path).snapshot}


@pytest.mark.parametrize("how", ["close", "with", "drop", "end"])
def test_a_reader_lets_go(tmp_path, how):
    save(tmp_path, {}, [rows(50)], part_bytes=500)
    blocks = load(tmp_path)[1]
    next(blocks)
    if how == "close":
        blocks.close()
    elif how == "with":
        with blocks:
            next(blocks)
    elif how == "end":
        list(blocks)
    if how == "drop":
        del blocks
    else:
        assert list(blocks) == []
    save(tmp_path, {}, [rows(9)], part_bytes=500)
    assert len({name[5:21] for name in parts(tmp_path)}) == 1


def test_views_outlive_the_reader_and_the_files(tmp_path):
    save(tmp_path, {}, [rows(50)])
    block = next(load(tmp_path)[1])
    shutil.rmtree(tmp_path)
    assert_same(block, rows(50))


def test_every_flipped_bit_and_truncation_of_the_manifest_is_found(tmp_path):
    save(tmp_path, {"dim": 3}, [rows(5)])
    path = tmp_path / snapshots.MANIFEST
    data = path.read_bytes()
    changed = [flipped(data, bit) for bit in range(len(data) * 8)]
    changed += [data[:length] for length in range(len(data))] + [data + b"\n", data + b"\0"]
    for content in changed:
        path.unlink()  # ext4 writes a file that is truncated through to the disk: 2 ms each
        path.write_bytes(content)
        with refused("[load] …table.json: expected …, got …. … copy", FormatError):
            load(tmp_path)
    path.write_bytes(data)
    verify(tmp_path)


@pytest.mark.parametrize("index", [0, 1, 3])
@pytest.mark.parametrize("change", ["flip", "cut", "extend", "delete", "swap", "older", "renumber"])
def test_a_part_that_is_not_the_one_is_found_before_its_rows_are_given_out(tmp_path, index, change):
    older = tmp_path / "older"
    save(older, {}, [rows(50)], part_bytes=500)
    directory = tmp_path / "snapshot"
    save(directory, {}, [rows(50)], part_bytes=500)
    path = directory / parts(directory)[index]
    data = path.read_bytes()
    if change == "flip":
        path.write_bytes(flipped(data, len(data) * 7))
    elif change == "cut":
        path.write_bytes(data[:-1])
    elif change == "extend":
        path.write_bytes(data + b"\0")
    elif change == "delete":
        path.unlink()
    elif change == "swap":  # two whole parts, each in the other's place
        other = directory / parts(directory)[2]
        other_data = other.read_bytes()
        other.write_bytes(data)
        path.write_bytes(other_data)
    elif change == "older":  # whole, of the same size, of another snapshot
        path.write_bytes((older / parts(older)[index]).read_bytes())
    else:
        arrays, metadata = container.decode(data, "x")
        path.write_bytes(b"".join(container.encode(arrays, {**metadata, "part": "9"})))
    given: list[dict] = []
    found = rf"{directory}/part-\w+-00000[2{index}].safetensors: expected"  # a swap is one of two
    with pytest.raises(FormatError, match=found + r".* got .*\. .* copy"):
        given.extend(load(directory)[1])
    assert len(given) <= index
    with pytest.raises(FormatError, match=r"\[verify\]"):
        verify(directory)


def test_missing_and_short_parts_are_found_before_the_first_row(tmp_path):
    save(tmp_path, {}, [rows(50)], part_bytes=500)
    last = tmp_path / parts(tmp_path)[-1]
    data = last.read_bytes()
    last.write_bytes(data[:-1])
    with pytest.raises(FormatError, match=rf"expected {len(data)} bytes, got {len(data) - 1}"):
        load(tmp_path)
    last.unlink()
    with pytest.raises(FormatError, match="expected a part of the snapshot, got none"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        ({"rows": 6}, "6 rows, another number"),
        ({"rows": True}, "True rows"),
        ({"config": []}, "config or arrays"),
        ({"arrays": None}, "config or arrays"),
        ({"parts": 5}, "entries of a manifest"),
        ({"parts": [{}]}, "entries of a manifest"),
        ({"snapshot": "../../etc/passwd"}, "part 0 named"),
        ({"parts": [{"file": "../x", "bytes": 1, "rows": 5, "crc32": ""}]}, "part 0 named '../x'"),
    ],
)
def test_a_manifest_with_a_valid_checksum_is_still_checked(tmp_path, entries, text):
    save(tmp_path, {}, [rows(5)])
    resealed(tmp_path)
    verify(tmp_path)
    resealed(tmp_path, **entries)
    with pytest.raises(FormatError, match=text):
        load(tmp_path)


def test_a_manifest_whose_parts_are_of_another_size_is_refused(tmp_path):
    save(tmp_path, {}, [rows(5)])
    part = json.loads((tmp_path / snapshots.MANIFEST).read_bytes())["parts"][0]
    for change, text in [
        ({"bytes": -1}, "in -1 bytes"),
        ({"rows": 4}, "expected 4 rows, got"),
        ({"crc32": "0badbeef"}, "expected checksum 0badbeef as in table.json"),
    ]:
        resealed(tmp_path, parts=[{**part, **change}], rows=change.get("rows", 5))
        with pytest.raises(FormatError, match=text):
            verify(tmp_path)
    resealed(tmp_path, parts=[part], rows=5, arrays={})
    with pytest.raises(FormatError, match=r"expected arrays \{\}, got"):
        verify(tmp_path)


def test_a_part_that_says_it_is_another_is_refused_even_if_the_manifest_takes_it(tmp_path):
    save(tmp_path, {}, [rows(5)])
    part = json.loads((tmp_path / snapshots.MANIFEST).read_bytes())["parts"][0]
    path = tmp_path / part["file"]
    arrays, metadata = container.decode(path.read_bytes(), "x")
    for change in ({"part": "1"}, {"snapshot": "0" * 16}, {"kind": "delta"}):
        data = b"".join(container.encode(arrays, {**metadata, **change}))
        path.unlink()
        path.write_bytes(data)
        entry = {**part, "bytes": len(data), "crc32": container.stored_checksum(data)}
        resealed(tmp_path, parts=[entry])
        with pytest.raises(FormatError, match=r"expected metadata .*'kind': 'part', .* got"):
            verify(tmp_path)


def test_a_newer_snapshot_is_refused_as_such(tmp_path):
    save(tmp_path, {}, [rows(5)])
    resealed(tmp_path, version=2)
    with pytest.raises(NewerFormatError, match=r"\[load\] .*version 1 or lower, got 2\. .*upgrade"):
        load(tmp_path)
    resealed(tmp_path, version=1, format="other")
    with pytest.raises(FormatError, match="expected format 'hotloop-table-snapshot', got 'other'"):
        load(tmp_path)


def test_a_damaged_manifest_keeps_its_parts_until_a_save_has_succeeded(tmp_path):
    save(tmp_path, {}, [rows(50)], part_bytes=500)
    old = parts(tmp_path)
    path = tmp_path / snapshots.MANIFEST
    path.write_bytes(path.read_bytes() + b" ")

    def failing():
        yield rows(50)
        raise RuntimeError("the table broke")

    with pytest.raises(RuntimeError, match="the table broke"):
        save(tmp_path, {}, failing(), part_bytes=500)
    assert set(old) <= set(parts(tmp_path))
    save(tmp_path, {}, [rows(9)])
    assert len(parts(tmp_path)) == 1
    verify(tmp_path)


def test_blocks_that_raise_leave_the_old_snapshot_and_no_parts(tmp_path):
    save(tmp_path, {"generation": 1}, [rows(50)], part_bytes=500)
    before = sorted(os.listdir(tmp_path))

    def failing():
        yield rows(50)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, {"generation": 2}, failing(), part_bytes=500)
    assert sorted(os.listdir(tmp_path)) == before
    assert loaded(tmp_path)[0] == {"generation": 1}


def test_no_snapshot_is_said_to_be_none(tmp_path):
    for directory in (tmp_path, tmp_path / "missing"):
        with refused("[load] directory: expected a snapshot", FileNotFoundError) as e:
            load(directory)
        assert e.value.filename == str(directory)


def test_a_file_of_another_program_is_not_replaced(tmp_path):
    (tmp_path / "table.json").write_text('{"mine": 1}')
    with refused("[save] directory: expected a snapshot's table.json", FileExistsError):
        save(tmp_path, {}, [rows(5)])
    assert os.listdir(tmp_path) == ["table.json"]


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"a": (1, 2)}, "JSON gives back unchanged"),
        ({1: 2}, "JSON gives back unchanged"),
        ([], "expected a dict that JSON gives back"),
        ({"a": float("nan")}, "expected what JSON can hold"),
        ({"a": object()}, "expected what JSON can hold"),
        ({"a": "\ud800"}, "expected what JSON can hold"),
    ],
)
def test_a_config_that_json_changes_is_refused(tmp_path, config, text):
    with pytest.raises(ValueError, match=rf"\[save\] config: .*{text}"):
        save(tmp_path, config, [rows(5)])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("blocks", "error", "text"),
    [
        ([[1]], TypeError, "blocks: expected dicts of arrays, got list"),
        ([{}], TypeError, "blocks: expected dicts of arrays, got none"),
        ([{"a": [1]}], TypeError, r"blocks\['a'\]: expected ndarray or RawArray"),
        ([{"a": np.array(1)}], ValueError, r"blocks\['a'\]: expected one entry per row, got shape"),
        ([{"a": np.zeros(2), "b": np.zeros(3)}], ValueError, "one number of rows, got"),
        ([rows(2), rows(2, dim=4)], ValueError, "like the first block, got"),
        ([{"a": np.zeros(2)}, {"b": np.zeros(2)}], ValueError, "like the first block"),
        ([{"a": np.zeros(2)}, {"a": np.zeros(2, np.float32)}], ValueError, "like the first block"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(tmp_path, blocks, error, text):
    with pytest.raises(error, match=rf"\[save\] .*{text}"):
        save(tmp_path, {}, blocks, part_bytes=1)
    assert os.listdir(tmp_path) == []


def test_part_bytes_has_a_range(tmp_path):
    with pytest.raises(ValueError, match=r"\[save\] part_bytes: expected an integer >= 1, got 0"):
        save(tmp_path, {}, [], part_bytes=0)


def _save_often(directory: str, saver: int, times: int, ready: object) -> None:
    ready.wait()
    for i in range(times):
        block = rows(40, first=1000 * saver + i)
        save(directory, {"saver": saver, "first": 1000 * saver + i}, [block], part_bytes=400)


def _load_often(directory: str, until: object, seen: object, ready: object) -> None:
    ready.wait()
    count = 0
    try:
        while not until.is_set():
            config, blocks = load(directory)
            assert_same(join(blocks), rows(40, first=config["first"]))
            count += 1
    except BaseException as error:
        seen.put(repr(error))
        raise
    seen.put(count)


@pytest.mark.parametrize("savers", [1, 3])
def test_savers_and_readers_at_once_see_whole_snapshots(tmp_path, savers):
    """The last save to finish stays; a reader gets one snapshot whole, however many are saved meanwhile."""
    save(tmp_path, {"saver": 0, "first": 0}, [rows(40)], part_bytes=400)
    until, seen = FORKSERVER.Event(), FORKSERVER.Queue()
    ready = FORKSERVER.Barrier(savers + 2)
    times = 60 // savers
    processes = [
        FORKSERVER.Process(target=_save_often, args=(str(tmp_path), saver, times, ready))
        for saver in range(1, savers + 1)
    ]
    readers = [
        FORKSERVER.Process(target=_load_often, args=(str(tmp_path), until, seen, ready))
        for _ in range(2)
    ]
    for process in processes + readers:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    until.set()
    counts = [seen.get(timeout=30) for _ in readers]
    for reader in readers:
        reader.join()
        assert reader.exitcode == 0
    assert all(isinstance(count, int) and count > 0 for count in counts), counts
    config, found = loaded(tmp_path)
    assert config["first"] == 1000 * config["saver"] + times - 1
    assert_same(found, rows(40, first=config["first"]))
    summary = save(tmp_path, {}, [rows(9)])
    assert parts(tmp_path) == [snapshots.manifests.part_name(summary.snapshot, 0)]


def test_a_save_under_way_is_not_swept_by_another(tmp_path):
    """The other one finishes in the middle of ours, and deletes all that nobody uses."""

    def blocks():
        yield rows(40)
        save(tmp_path, {"who": "inner"}, [rows(9)], part_bytes=400)
        yield rows(40, first=40)

    save(tmp_path, {"who": "outer"}, blocks(), part_bytes=400)
    config, found = loaded(tmp_path)
    assert config == {"who": "outer"}
    assert_same(found, rows(80))
    assert len({name[5:21] for name in parts(tmp_path)}) == 1


def test_a_snapshot_committed_while_another_tidies_up_is_kept(tmp_path, monkeypatch):
    """A manifest read before the lock is taken may be older than the snapshot that is about to be deleted."""
    directory, other = tmp_path / "snapshot", tmp_path / "other"
    save(directory, {"who": "first"}, [rows(9)])
    save(other, {"who": "second"}, [rows(40)], part_bytes=400)
    for name in parts(other):  # its writer is done with the parts, and the manifest is next
        shutil.copy(other / name, directory / name)
    real, committed = disk.claim, []

    def claim(path):
        committed.append(path)
        shutil.copy(other / snapshots.MANIFEST, directory / snapshots.MANIFEST)
        return real(path)

    monkeypatch.setattr(disk, "claim", claim)
    snapshots._tidy(directory)
    assert committed
    assert loaded(directory)[0] == {"who": "second"}


def test_a_reader_that_is_overtaken_starts_over(tmp_path, monkeypatch):
    """The snapshot is replaced between the manifest and the first part."""
    save(tmp_path, {"generation": 1}, [rows(9)])
    real, raced = snapshots._hold, []

    def hold(directory, manifest):
        if not raced:
            raced.append(True)
            save(tmp_path, {"generation": 2}, [rows(40)])
        return real(directory, manifest)

    monkeypatch.setattr(snapshots, "_hold", hold)
    assert loaded(tmp_path)[0] == {"generation": 2}
    assert raced


def test_without_locks_only_the_replaced_snapshot_is_deleted(tmp_path, monkeypatch):
    class NoLocks:
        LOCK_SH = LOCK_EX = LOCK_NB = 0

        def flock(self, fd, how):
            raise OSError(38, "Function not implemented")

    monkeypatch.setattr(disk, "fcntl", NoLocks())
    orphan = tmp_path / f"part-{'0' * 16}-000000.safetensors"
    orphan.write_text("perhaps of a save under way")
    save(tmp_path, {"generation": 1}, [rows(50)], part_bytes=500)
    blocks = load(tmp_path)[1]
    next(blocks)
    save(tmp_path, {"generation": 2}, [rows(9)])
    assert len(parts(tmp_path)) == 2 and orphan.exists()
    assert loaded(tmp_path)[0] == {"generation": 2}
    with pytest.raises(FormatError, match="got none: it was deleted while it was read"):
        next(blocks)


@pytest.mark.alone
def test_a_save_is_not_slow(tmp_path):
    """A guard against quadratic listing: many small parts cost about the same each."""
    begin = time.perf_counter()
    save(tmp_path, {}, [rows(300)], part_bytes=1)
    verify(tmp_path)
    assert time.perf_counter() - begin < 20
