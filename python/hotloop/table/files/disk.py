# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or absent: written beside their place, synced, renamed, and swept up after a killed writer.

Whether a file is in use is asked of the kernel: its writer (and, for a snapshot, its readers) hold a shared ``flock``,
which a killed process loses. A process that deletes it takes the exclusive lock first. Where the file system has no
locks, nothing that another process might still use is deleted. System calls go through ``os`` and ``fcntl`` by name,
so that tests can make them fail.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeAlias

import numpy as np

from .container import BEGINNING, Buffer, FormatError, begins_well

PathLike: TypeAlias = "str | os.PathLike[str]"

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.hotloop-tmp", re.DOTALL)
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP)  # a file system whose directories cannot be synced
_FLAGS = os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)


def new_token() -> str:
    return secrets.token_hex(8)


def write_atomic(path: PathLike, buffers: Iterable[Buffer], *, op: str = "write_atomic") -> None:
    """Replace a file by new bytes: a reader, or a machine that loses power, finds the old file or the new one.

    Raises:
        OSError: with the path and the bytes that were to be written. The old file is in place, unless the text
            says that only the sync of the directory failed.
    """
    directory, name = os.path.split(os.path.abspath(path))
    buffers = list(buffers)
    wanted = sum(len(buffer) for buffer in buffers)
    with _told(op, path, wanted, "The old file, if any, is untouched"):
        sweep_temporaries(directory)
        temporary, fd = _create_temporary(directory, name)
        try:
            _fill(fd, buffers)
            os.replace(temporary, path)
        except BaseException:
            remove(temporary)
            raise
        finally:
            os.close(fd)
    with _told(op, path, wanted, "The new file is in place, but may not outlive a loss of power"):
        sync_directory(directory)


def write_new(path: PathLike, buffers: Iterable[Buffer], *, op: str = "write_new") -> int | None:
    """Write and sync a file that must not exist yet; return its descriptor, which marks it as in use until closed.

    The name itself is durable only after ``sync_directory``. Returns None, and leaves no file, if a sweeper took
    the file in the instant before it was marked: call again with another name.
    """
    buffers = list(buffers)
    with _told(op, path, sum(len(buffer) for buffer in buffers), "The file was removed again"):
        fd = _create(path)
        if fd is None:
            return None
        try:
            _fill(fd, buffers)
        except BaseException:
            remove(path)
            os.close(fd)
            raise
        return fd


_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_regular(path: PathLike, *, op: str = "read") -> int:
    """The descriptor of a file to read; what is no file is refused, and nothing waits for a writer to a pipe.

    Raises:
        FileNotFoundError: there is none.
        FormatError: it is a directory, a pipe, a socket or a device.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return fd
    os.close(fd)
    got = next((name for test, name in _KINDS if test(mode)), "something else")
    raise FormatError(
        f"[{op}] {os.fspath(path)}: expected a regular file, got {got}. Correct the path, or fetch the file again."
    )


def read(path: PathLike, *, op: str = "read") -> memoryview:
    """The bytes of a file; of one that begins as no file of this room can, only its beginning.

    Copied: a file that shrinks meanwhile is short; under the views of a mapped one the process would die.

    Raises:
        FileNotFoundError: there is none.
        FormatError: it is no regular file.
    """
    fd = open_regular(path, op=op)
    try:
        size = os.fstat(fd).st_size
        start = os.pread(fd, BEGINNING, 0)
        if not begins_well(start, size):
            return memoryview(start)
        data = np.empty(size, np.uint8)  # unlike a bytearray, not written before it is read into
        filled = 0
        while filled < size:
            got = os.preadv(fd, [data[filled:].data], filled)
            if not got:
                break
            filled += got
        return data[:filled].data
    finally:
        os.close(fd)


def sync_directory(directory: PathLike) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            error.filename = os.fspath(directory)
            raise
    finally:
        os.close(fd)


def make_directory(directory: PathLike) -> None:
    """Create a directory, with its parents, durably."""
    path = os.path.abspath(directory)
    if not os.path.isdir(path):
        make_directory(os.path.dirname(path))
        with suppress(FileExistsError):
            os.mkdir(path)
        sync_directory(os.path.dirname(path))


def remove(path: PathLike) -> bool:
    """Delete a file if it is there and may be deleted."""
    try:
        os.unlink(path)
    except OSError:
        return False
    return True


def share(fd: int) -> bool:
    """Mark an open file as in use until it is closed; False if it was deleted meanwhile."""
    with suppress(OSError):  # a file system without locks: see the module's text
        fcntl.flock(fd, fcntl.LOCK_SH)
    return os.fstat(fd).st_nlink > 0


def claim(path: PathLike) -> int | None:
    """Return the descriptor of a file that is not in use, locked against use until closed; None if it may be in use.

    Raises:
        FileNotFoundError: there is no such file.
    """
    try:
        fd = os.open(path, os.O_RDWR | _FLAGS)
    except FileNotFoundError:
        raise
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    return fd


def locks(fd: int) -> bool:
    """Whether the file system of an open file has locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno == errno.EWOULDBLOCK
    return True


def sweep_temporaries(directory: PathLike) -> None:
    """Delete what killed writers left; files of writers that live, and all other files, stay."""
    with os.scandir(directory) as entries:
        names = [
            entry.name
            for entry in entries
            if _TEMPORARY.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)
        ]
    for name in names:
        path = os.path.join(directory, name)
        with suppress(FileNotFoundError):
            fd = claim(path)
            if fd is not None:
                remove(path)
                os.close(fd)


@contextmanager
def only_one(directory: PathLike) -> Iterator[None]:
    """Wait until no other process is in here for this directory; where the file system has no locks, do not wait."""
    fd = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _create(path: PathLike) -> int | None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _FLAGS, 0o666)
    if share(fd):
        return fd
    os.close(fd)
    return None


def _create_temporary(directory: str, name: str) -> tuple[str, int]:
    while True:
        # a name may have 255 bytes; the token alone tells two files apart
        path = os.path.join(directory, f".{name[:32]}.{new_token()}.hotloop-tmp")
        fd = _create(path)
        if fd is not None:
            return path, fd


def _fill(fd: int, buffers: Iterable[Buffer]) -> None:
    for buffer in buffers:
        rest = memoryview(buffer)
        while rest:
            rest = rest[os.write(fd, rest) :]
    os.fsync(fd)


@contextmanager
def _told(op: str, path: PathLike, wanted: int, state: str) -> Iterator[None]:
    """Say in an OSError what was written where, and what is there now."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"[{op}] path: expected to write {wanted} bytes, got {error.strerror or error}. {state}. "
            "Free space or mend the disk, then call again",
            os.fspath(path),
        ) from error
