# SPDX-License-Identifier: Apache-2.0
"""libcuckoo and absl::flat_hash_map: ``hash_maps.cpp``, compiled when first wanted.

Debian: ``apt install libcuckoo-dev libabsl-dev pkg-config``. Headers elsewhere are found through
``CPLUS_INCLUDE_PATH``, libraries through ``LIBRARY_PATH`` and ``LD_LIBRARY_PATH``.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .._case import Contender, Lazy, Missing
from .._check import first_line
from .._machine import ROOT

CUCKOO, ABSL, ABSL_AHEAD = "libcuckoo", "absl", "absl prefetched"
_SOURCE = Path(__file__).with_suffix(".cpp")
_CACHE = ROOT / "out"
_FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "-shared", "-fPIC", "-fopenmp")
_ABSL_PACKAGE = "absl_flat_hash_map"
_INSTALL = "apt install libcuckoo-dev libabsl-dev pkg-config"


def contender(name: str, build: Callable[[], Contender]) -> Lazy:
    """The contender, or why ``name`` cannot be had, when it is wanted."""

    def resolve() -> Contender | Missing:
        try:
            Pairs(name, 16)
            return build()
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            return Missing(name, first_line(error))

    return Lazy(name, resolve)


class Pairs:
    """int64 keys and values of 8 bytes, here two float32."""

    def __init__(self, name: str, slots: int) -> None:
        self._lib = library()
        self._serial = name != CUCKOO
        self._map = _made(self._lib.pairs_new(name.encode(), slots), name)

    def insert_or_assign(self, keys: Tensor, values: Tensor) -> None:
        # absl::flat_hash_map takes one writer.
        threads = 1 if self._serial else torch.get_num_threads()
        self._lib.pairs_insert(self._map, _at(keys), _at(values), len(keys), threads)

    def find(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        values = torch.empty(len(keys), 2)
        found = torch.empty(len(keys), dtype=torch.bool)
        self._lib.pairs_find(
            self._map, _at(keys), len(keys), _at(values), _at(found), torch.get_num_threads()
        )
        return values, found

    @property
    def size(self) -> int:
        return int(self._lib.pairs_size(self._map))

    @property
    def load_factor(self) -> float:
        return float(self._lib.pairs_load_factor(self._map))

    def __del__(self) -> None:
        if hasattr(self, "_map"):
            self._lib.pairs_delete(self._map)


class Rows:
    """int64 keys and the rows of an arena, copied out one by one."""

    def __init__(self, name: str, slots: int, keys: Tensor, arena: Tensor) -> None:
        self._lib = library()
        self._map = _made(self._lib.rows_new(name.encode(), slots), name)
        self._arena = arena.contiguous()
        self._lib.rows_insert(self._map, _at(keys), len(keys))

    def find(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        dim = self._arena.shape[1]
        values = torch.empty(len(keys), dim, dtype=self._arena.dtype)
        found = torch.empty(len(keys), dtype=torch.bool)
        self._lib.rows_gather(
            self._map, _at(keys), len(keys), _at(self._arena), dim * self._arena.itemsize,
            _at(values), _at(found), torch.get_num_threads(),
        )  # fmt: skip
        return values, found

    @property
    def load_factor(self) -> float:
        return float(self._lib.rows_load_factor(self._map))

    def __del__(self) -> None:
        if hasattr(self, "_map"):
            self._lib.rows_delete(self._map)


def _at(tensor: Tensor) -> int:
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def _made(map_: int | None, name: str) -> int:
    if not map_:
        raise RuntimeError(f"no headers of {name} ({_INSTALL})")
    return map_


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled source; compiled again when it, a flag or the compiler changes."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        raise RuntimeError("no C++ compiler (c++, or the one that CXX names)")
    absl = _absl_flags()
    words = [compiler, *_FLAGS]
    if platform.machine() == "x86_64":
        words.append("-march=x86-64-v3")
    words += [str(_SOURCE), *(absl or ["-DHOTLOOP_NO_ABSL"])]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    recipe = "\n".join([_SOURCE.read_text(), *words, version.stdout, _include_path()])
    target = _CACHE / f"hash_maps-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}.so"
    if not target.exists():
        print(f"compiling libcuckoo and absl into {target} (ten seconds)", file=sys.stderr)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        done = subprocess.run(
            [*words, "-o", str(partial)], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(f"{_SOURCE.name} does not compile: {done.stderr.strip()[:300]}")
        partial.replace(target)
    return _declared(ctypes.CDLL(str(target)))


def _absl_flags() -> list[str] | None:
    if shutil.which("pkg-config") is None:
        return None
    words = ["pkg-config", "--cflags", "--libs", _ABSL_PACKAGE]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout.split() if done.returncode == 0 else None


def _include_path() -> str:
    return os.environ.get("CPLUS_INCLUDE_PATH", "")


def _declared(lib: ctypes.CDLL) -> ctypes.CDLL:
    pointer, number, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    signatures: dict[str, tuple[object, ...]] = {
        "pairs_new": (pointer, ctypes.c_char_p, number),
        "pairs_delete": (None, pointer),
        "pairs_size": (number, pointer),
        "pairs_load_factor": (ctypes.c_double, pointer),
        "pairs_insert": (None, pointer, pointer, pointer, number, threads),
        "pairs_find": (None, pointer, pointer, number, pointer, pointer, threads),
        "rows_new": (pointer, ctypes.c_char_p, number),
        "rows_delete": (None, pointer),
        "rows_load_factor": (ctypes.c_double, pointer),
        "rows_insert": (None, pointer, pointer, number),
        "rows_gather": (
            None, pointer, pointer, number, pointer, number, pointer, pointer, threads,
        ),
    }  # fmt: skip
    for name, (result, *arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib
