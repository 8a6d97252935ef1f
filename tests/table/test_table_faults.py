# SPDX-License-Identifier: Apache-2.0
"""What must not lose a table: full disks, system calls that fail, power that goes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hotloop.table.files import deltas, disk
from hotloop.table.files.container import FormatError
from hotloop.table.files.deltas import Delta, DeltaError, encode_delta, pending, prune, publish
from hotloop.table.files.disk import write_atomic
from hotloop.table.files.snapshots import load, save
from table_checks import refused
from table_file_cases import TABLE_ID, assert_same, flipped, join, rows

CALLS = ("open", "write", "fsync", "replace")  # what a writer does to the disk, apart from deleting


def save_generation(directory: Path, generation: int) -> None:
    """Three parts, all of whose rows say which generation they are."""
    block = rows(12, first=100 * generation)
    save(directory, {"generation": generation}, [block], part_bytes=5 * 38)


def generation(directory: Path) -> int:
    config, blocks = load(directory)
    assert_same(join(blocks), rows(12, first=100 * config["generation"]))
    return config["generation"]


def save_with_filter(directory: Path, generation: int) -> None:
    """Three parts of rows and one of the filter's cells."""
    cells = np.arange(13, dtype=np.uint16) + np.uint16(generation)

    def admission() -> tuple:
        return {"generation": generation}, [{"cells": cells}]

    block = rows(12, first=100 * generation)
    config = {"generation": generation}
    save(directory, config, [block], admission=admission, part_bytes=5 * 38)


def generation_with_filter(directory: Path) -> int:
    config, blocks = load(directory)
    state, parts = blocks.admission()
    assert state == config
    cells = np.concatenate([part["cells"] for part in parts])
    assert (cells == np.arange(13) + config["generation"]).all()
    assert_same(join(blocks), rows(12, first=100 * config["generation"]))
    return config["generation"]


def publish_generation(directory: Path, generation: int) -> None:
    delta = Delta(TABLE_ID, generation - 1, generation, rows(12), np.arange(2))
    publish(directory, encode_delta(delta))


def published(directory: Path) -> int:
    found = pending(directory, TABLE_ID, 0)
    for delta in found:
        assert_same(delta.rows, rows(12))
    return len(found)


Write = Callable[[Path, int], None]
Read = Callable[[Path], int]
BOTH = pytest.mark.parametrize(
    ("write", "read"),
    [
        (save_generation, generation),
        (save_with_filter, generation_with_filter),
        (publish_generation, published),
    ],
    ids=["save", "save with filter", "publish"],
)


class Calls:
    """``os`` whose calls go through ``hook(name, arguments, call)``; only the writers see it."""

    def __init__(self, hook: Callable) -> None:
        self._hook = hook

    def __getattr__(self, name: str) -> object:
        real = getattr(os, name)
        if name not in (*CALLS, "unlink", "mkdir", "close"):
            return real
        return lambda *arguments, **options: self._hook(
            name, arguments, lambda: real(*arguments, **options)
        )


@contextlib.contextmanager
def hooked(hook: Callable) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (disk, deltas):
            patch.setattr(module, "os", Calls(hook))
        yield


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def snapshots(directory: Path) -> set[str]:
    return {name.split("-")[1] for name in names(directory) if name.startswith("part-")}


def raised(write: Write, directory: Path) -> OSError | None:
    try:
        write(directory, 2)
    except OSError as error:
        return error
    return None


@BOTH
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
def test_every_call_that_can_fail_leaves_the_old_or_the_new(tmp_path, write, read, code):
    """The k-th call fails, for every k; then the disk is mended and the next write leaves nothing behind."""
    counted: list[str] = []

    def count(name, arguments, call):
        if name in CALLS:
            counted.append(name)
        return call()

    write(tmp_path / "count", 1)
    with hooked(count):
        write(tmp_path / "count", 2)
    assert set(counted) == set(CALLS)
    for k in range(len(counted)):
        directory = tmp_path / str(k)
        write(directory, 1)
        before, left = names(directory), [k]

        def fail(name, arguments, call, left=left):
            if name in CALLS:
                left[0] -= 1
                if left[0] == -1:
                    raise OSError(code, os.strerror(code))
            return call()

        with hooked(fail):
            error = raised(write, directory)
        if error is None:  # only what tells whether a file is still in use may fail in silence
            assert counted[k] == "open"
        else:
            assert error.errno == code
            if "expected to write" in str(error):
                assert str(directory) in str(error) and "Free space or mend" in str(error)
            else:  # the sync of a directory, or its lock
                assert counted[k] in ("open", "fsync")
        assert read(directory) == (2 if error is None or "replace" in counted[:k] else 1)
        if read(directory) == 1:
            assert names(directory) == before
        write(directory, 2)
        write(directory, 3)
        assert read(directory) == 3
        assert not [name for name in names(directory) if name.endswith(".hotloop-tmp")]
        assert len(snapshots(directory)) <= 1


@BOTH
def test_short_writes_are_continued(tmp_path, write, read):
    def short(name, arguments, call):
        if name == "write" and len(arguments[1]) > 1:
            return os.write(arguments[0], arguments[1][: len(arguments[1]) // 2])
        return call()

    with hooked(short):
        write(tmp_path, 1)
    assert read(tmp_path) == 1


def test_an_error_names_the_file_the_bytes_and_the_cause(tmp_path):
    path = tmp_path / "x"
    write_atomic(path, [b"old"])

    def full(name, arguments, call):
        if name == "write":
            raise OSError(errno.ENOSPC, "No space left on device")
        return call()

    text = "[write_atomic] path: expected to write 11 bytes, got No s"
    with hooked(full), refused(text, OSError) as e:
        write_atomic(path, [b"12345", b"678901"])
    assert e.value.errno == errno.ENOSPC and e.value.filename == str(path)
    assert "The old file, if any, is untouched. Free space" in str(e.value)
    assert names(tmp_path) == ["x"] and path.read_bytes() == b"old"


@pytest.mark.parametrize("code", [errno.EIO, errno.EINVAL], ids=errno.errorcode.get)
def test_a_failed_sync_of_the_directory_says_that_the_new_file_is_there(tmp_path, code):
    """That a directory cannot be synced at all is no error."""

    def fail(name, arguments, call):
        if name == "fsync" and os.path.isdir(f"/proc/self/fd/{arguments[0]}"):
            raise OSError(code, os.strerror(code))
        return call()

    path = tmp_path / "x"
    failed = refused("The new file is in place, but may not outlive", OSError)
    with hooked(fail), failed if code == errno.EIO else contextlib.nullcontext():
        write_atomic(path, [b"new"])
    assert path.read_bytes() == b"new"


def test_an_interrupt_leaves_no_file(tmp_path):
    def interrupt(name, arguments, call):
        if name == "fsync":
            raise KeyboardInterrupt
        return call()

    with hooked(interrupt), pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "x", [b"new"])
    assert names(tmp_path) == []


def test_the_next_write_sweeps_up_dead_writers_and_no_others(tmp_path):
    dead = tmp_path / f".y.{'0' * 16}.hotloop-tmp"
    alive = tmp_path / f".y.{'1' * 16}.hotloop-tmp"
    mine = [
        tmp_path / name
        for name in (".y.hotloop-tmp", f".y.{'2' * 16}.tmp", f"y.{'3' * 16}.hotloop-tmp")
    ]
    for path in (dead, alive, *mine):
        path.write_text("")
    with alive.open("rb+") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        write_atomic(tmp_path / "x", [b"new"])
        assert names(tmp_path) == sorted(path.name for path in (alive, *mine, tmp_path / "x"))
    write_atomic(tmp_path / "x", [b"newer"])
    assert not alive.exists()


def test_a_writer_is_not_swept_up_by_another_in_the_middle(tmp_path):
    def other(name, arguments, call):
        if name == "fsync":
            disk.sweep_temporaries(tmp_path)
        return call()

    with hooked(other):
        write_atomic(tmp_path / "x", [b"new"])
    assert (tmp_path / "x").read_bytes() == b"new"


@pytest.mark.parametrize("sweeps", [1, 3])
def test_a_writer_swept_up_before_it_took_its_lock_starts_over(tmp_path, monkeypatch, sweeps):
    """Between the creation of a file and its lock another process may take it for a dead one's."""
    real, left = disk.share, [sweeps]

    def share(fd):
        if left[0]:
            left[0] -= 1
            os.unlink(os.readlink(f"/proc/self/fd/{fd}"))
        return real(fd)

    monkeypatch.setattr(disk, "share", share)
    write_atomic(tmp_path / "x", [b"new"])
    assert names(tmp_path) == ["x"]
    left[0] = sweeps
    save_generation(tmp_path / "snapshot", 1)
    assert generation(tmp_path / "snapshot") == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    directory = tmp_path / "small"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(directory)]
    if (
        not shutil.which("mount")
        or subprocess.run(mount, capture_output=True, check=False).returncode
    ):
        pytest.skip("a tmpfs cannot be mounted here")
    yield directory
    subprocess.run(["umount", "-l", str(directory)], check=True)


def test_a_full_disk_keeps_the_old_snapshot_and_is_not_filled_for_good(small_disk):
    directory = small_disk / "table"
    save(directory, {"generation": 1}, [rows(1000)], part_bytes=20_000)  # 38 KB
    used = shutil.disk_usage(small_disk).used
    for _ in range(3):
        with refused("[save] path: expected to write … got No space left", OSError) as e:
            save(directory, {"generation": 2}, [rows(100_000)], part_bytes=20_000)
        assert e.value.errno == errno.ENOSPC
        assert shutil.disk_usage(small_disk).used == used
    config, blocks = load(directory)
    assert config == {"generation": 1}
    assert_same(join(blocks), rows(1000))
    save(directory, {"generation": 3}, [rows(1000)], part_bytes=20_000)
    assert len(snapshots(directory)) == 1


def test_what_killed_saves_left_on_a_full_disk_makes_room_for_the_next(small_disk):
    directory = small_disk / "table"
    save(directory, {}, [rows(1000)])
    space = shutil.disk_usage(small_disk).free
    (directory / f"part-{'0' * 16}-000000.safetensors").write_bytes(bytes(space - 8192))
    save(directory, {}, [rows(2000)])
    assert len(snapshots(directory)) == 1


def test_a_full_disk_keeps_the_published_deltas(small_disk):
    directory = small_disk / "deltas"
    publish_generation(directory, 1)
    big = encode_delta(Delta(TABLE_ID, 1, 2, rows(10_000), np.arange(0)))
    with pytest.raises(OSError, match=r"\[publish\] path: expected to write .* got No space left"):
        publish(directory, big)
    assert names(directory) == ["delta-0-1.safetensors"]
    publish_generation(directory, 2)
    assert published(directory) == 2


LIMITED = """
import resource, signal, sys
import numpy as np
from hotloop.table.files.snapshots import save
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
try:
    save(sys.argv[1], {"generation": 2}, [{"keys": np.arange(5000)}])
except OSError as error:
    print(error)
"""


def test_a_file_beyond_the_limit_of_the_process_keeps_the_old_snapshot(tmp_path):
    """EFBIG comes from the kernel in the middle of a part, after a short write."""
    assert hasattr(resource, "RLIMIT_FSIZE") and hasattr(signal, "SIGXFSZ")
    save_generation(tmp_path, 1)
    before = names(tmp_path)
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "[save] path: expected to write 40" in done.stdout and "File too large" in done.stdout
    assert names(tmp_path) == before and generation(tmp_path) == 1


class Disk:
    """Follows a writer's calls and tells what may be on the disk if the power goes after any of them.

    A file's bytes are safe once it was synced, a name once its directory was. Of the names that changed since, any
    may have reached the disk; of the bytes, none or all.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = str(directory)
        self.files: dict[int, list[bytes]] = {}  # by number: bytes synced, bytes written
        self.safe: dict[str, int] = {}  # names after the directory's last sync
        self.since: list[
            tuple[str, str, int]
        ] = []  # what happened to names since: verb, name, file
        self.open: dict[int, int | None] = {}  # descriptor to file; None is the directory
        self.states: list[tuple[dict[str, bytes], bool]] = []
        for name in names(directory) if directory.exists() else []:
            content = (directory / name).read_bytes()
            self.safe[name] = self._new(content, content)

    def _new(self, synced: bytes, written: bytes) -> int:
        self.files[len(self.files)] = [synced, written]
        return len(self.files) - 1

    def _now(self) -> dict[str, int]:
        return self._after(self.since)

    def _after(self, changes: list[tuple[str, str, int]]) -> dict[str, int]:
        found = dict(self.safe)
        for verb, name, file in changes:
            if verb == "add":
                for other in [other for other, there in found.items() if there == file]:
                    del found[other]  # a rename takes the old name away
                found[name] = file
            elif found.get(name) == file:
                del found[name]
        return found

    def hook(self, name: str, arguments: tuple, call: Callable) -> object:
        result = call()
        if name == "open" and os.path.realpath(arguments[0]) == self.directory:
            self.open[result] = None
        elif name == "open" and os.path.dirname(arguments[0]) == self.directory:
            base = os.path.basename(arguments[0])
            if arguments[1] & os.O_CREAT:
                self.open[result] = self._new(b"", b"")
                self.since.append(("add", base, self.open[result]))
            else:
                self.open[result] = self._now()[base]
        elif name == "close":
            self.open.pop(arguments[0], None)
        elif name == "write":
            self.files[self.open[arguments[0]]][1] += bytes(arguments[1])[:result]
        elif name == "fsync" and arguments[0] in self.open:
            file = self.open[arguments[0]]
            if file is None:
                self.safe, self.since = self._now(), []
            else:
                self.files[file][0] = self.files[file][1]
        elif name == "replace":
            file = self._now()[os.path.basename(arguments[0])]
            self.since.append(("add", os.path.basename(arguments[1]), file))
        elif name == "unlink":
            base = os.path.basename(arguments[0])
            self.since.append(("remove", base, self._now()[base]))
        if name != "close":
            self.note()
        return result

    def note(self, *, finished: bool = False) -> None:
        """Remember what the disk may hold now."""
        some = [self.since[:i] for i in range(len(self.since) + 1)]
        some += [[change] for change in self.since]
        some += [self.since[:i] + self.since[i + 1 :] for i in range(len(self.since))]
        for changes in some:
            for which in (0, 1):
                content = {n: self.files[file][which] for n, file in self._after(changes).items()}
                if (content, finished) not in self.states:
                    self.states.append((content, finished))


def put(directory: Path, content: dict[str, bytes]) -> Path:
    directory.mkdir()
    for name, data in content.items():
        (directory / name).write_bytes(data)
    return directory


@BOTH
@pytest.mark.parametrize("first", [True, False], ids=["first", "replaced"])
def test_power_that_goes_after_any_call_leaves_the_old_or_the_new(tmp_path, write, read, first):
    """And once a write has returned, the new one for sure."""
    directory = tmp_path / "x"
    directory.mkdir()
    new = 1 if first else 2
    if not first:
        write(directory, 1)
    disk = Disk(directory)
    with hooked(disk.hook):
        write(directory, new)
    disk.note(finished=True)
    assert len(disk.states) > (4 if write is publish_generation else 40)
    seen = set()
    for i, (content, finished) in enumerate(disk.states):
        after = put(tmp_path / str(i), content)
        try:
            found = read(after)
        except FileNotFoundError:  # of the snapshot itself: FormatError if it has parts missing
            found = 0
        assert found in ((new,) if finished else (new - 1, new)), sorted(content)
        seen.add(found)
        write(after, found + 1)  # and goes on from there
        assert read(after) == found + 1 and len(snapshots(after)) <= 1
    assert seen == {new - 1, new}


def test_the_model_of_the_disk_finds_a_writer_that_does_not_sync(tmp_path):
    """The negative control of the test above."""
    (tmp_path / "x").mkdir()
    disk = Disk(tmp_path / "x")

    def hook(name, arguments, call):
        return None if name == "fsync" else disk.hook(name, arguments, call)

    with hooked(hook):
        save_generation(tmp_path / "x", 1)
    broken = 0
    for i, (content, _) in enumerate(disk.states):
        try:
            generation(put(tmp_path / str(i), content))
        except FormatError:
            broken += 1
        except FileNotFoundError:
            pass
    assert broken > 3


class Killed(BaseException):
    pass


def test_whoever_is_killed_while_deleting_leaves_what_others_rely_on(tmp_path):
    """Part 0, which carries the lock, goes last; of a chain of deltas the rest is still a chain."""
    for kept in range(1, 4):
        left = [0]

        def unlink(name, arguments, call, left=left):
            if name == "unlink":
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
            return call()

        for write, read in (
            (save_generation, generation),
            (save_with_filter, generation_with_filter),
        ):
            directory = tmp_path / f"{read.__name__}-{kept}"
            write(directory, 1)
            old, parts = next(iter(snapshots(directory))), len(names(directory)) - 1
            left[0] = parts - kept
            with hooked(unlink), pytest.raises(Killed):
                write(directory, 2)
            there = [name for name in names(directory) if old in name]
            assert there == [f"part-{old}-{index:06d}.safetensors" for index in range(kept)]
            assert read(directory) == 2
            save_generation(directory, 3)  # it also takes the place of one with a filter
            assert len(snapshots(directory)) == 1 and load(directory)[1].admission() is None

        directory = tmp_path / f"deltas-{kept}"
        for i in range(1, 6):
            publish_generation(directory, i)
        left[0] = 3 - kept
        with hooked(unlink), pytest.raises(Killed):
            prune(directory, 5)
        assert len(pending(directory, TABLE_ID, 3 - kept)) == 2 + kept


@BOTH
def test_a_flipped_bit_on_the_disk_is_found_by_the_reader(tmp_path, write, read):
    write(tmp_path, 1)
    for name in names(tmp_path):
        path = tmp_path / name
        data = path.read_bytes()
        for bit in range(0, len(data) * 8, 101):
            path.unlink()
            path.write_bytes(flipped(data, bit))
            with pytest.raises((FormatError, DeltaError)):
                read(tmp_path)
        path.write_bytes(data)
    assert read(tmp_path) == 1
