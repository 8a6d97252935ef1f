# SPDX-License-Identifier: Apache-2.0
"""The catalogue: every public op, and every public class that computes or holds state, room by room.

A file of this folder is a room, and nothing else makes one: ``hotloop.<room>``, ``hotloop.catalog()``, ``python -m
hotloop info`` and the pages that ``make docs`` writes follow from it. Only the standard library is imported here, so
the list can be read where nothing else works.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from dataclasses import asdict, dataclass
from typing import Any

IMPLS = ("reference", "cpu", "cuda", "triton")
FLOATS = ("float32", "float64", "float16", "bfloat16")
MATURITIES = ("experimental", "tested")

# What each implementation has been through. After a GPU run add a line, {"decode": {"cuda": "run on NVIDIA H200"}}: for
# a room, or for one entry by its full name, which comes before its room.
STATUS: dict[str, dict[str, str]] = {
    "": {
        "reference": "tested",
        "cpu": "tested",
        "cuda": "compiled",  # and run by the C++ tests on an emulated GPU
        "triton": "interpreted",  # and compiled ahead of time
    },
}


@dataclass(frozen=True)
class Paper:
    """A paper that an entry computes something of, and the settings that the paper uses."""

    title: str
    source: str = ""  # arXiv id, or venue and year
    settings: str = ""

    @property
    def link(self) -> str:
        return f"https://arxiv.org/abs/{self.source}" if self.source[:4].isdigit() else ""


@dataclass(frozen=True)
class Op:
    """One public function or class."""

    name: str
    room: str
    papers: tuple[Paper, ...]
    impls: tuple[str, ...]
    dtypes: tuple[str, ...] = FLOATS
    gradient: bool = False
    compiles: bool = False
    deterministic: bool = True
    maturity: str = "tested"
    needs_torch: bool = False
    implements: tuple[str, ...] = ()
    """Names in the numeric catalogue of what this computes, where they are not its own name."""

    @property
    def full_name(self) -> str:
        return f"{self.room}.{self.name}"

    @property
    def is_class(self) -> bool:
        return self.name[0].isupper()

    def status(self, impl: str) -> str | None:
        """What ``impl`` has been through; None where there is no such implementation."""
        if impl not in self.impls:
            return None
        found = (STATUS.get(key, {}).get(impl) for key in (self.full_name, self.room, ""))
        return next(text for text in found if text)

    def facts(self) -> dict[str, Any]:
        """The entry for JSON: ``impls`` says what each implementation has been through."""
        facts = asdict(self) | {"name": self.full_name}
        return facts | {"impls": {impl: self.status(impl) for impl in self.impls}}

    def load(self) -> Any:
        """Import the room and return the function or class."""
        return getattr(importlib.import_module(f"hotloop.{self.room}"), self.name)


class Room:
    """Collects the entries of one file; the keywords given here hold for each entry that does not say otherwise."""

    def __init__(self, module: str, **common: Any) -> None:
        self.name = module.rpartition(".")[2]
        self.common = common
        self.entries: list[Op] = []

    def __call__(self, name: str, *papers: Paper, **facts: Any) -> None:
        self.entries.append(Op(name, self.name, papers, **{**self.common, **facts}))


def pointwise_room(module: str) -> Room:
    """A room of losses over the pointwise loop."""
    impls = ("reference", "cpu", "cuda")
    return Room(module, impls=impls, gradient=True, compiles=True, needs_torch=True)


def rooms() -> tuple[str, ...]:
    return tuple(module.name for module in pkgutil.iter_modules(__path__))


@functools.cache
def of_room(room: str) -> tuple[Op, ...]:
    return tuple(importlib.import_module(f"{__name__}.{room}").op.entries)


def catalog() -> tuple[Op, ...]:
    """Return every public op and class, each with name, room, papers, impls, dtypes, gradient, compiles, ..."""
    return tuple(op for room in rooms() for op in of_room(room))


def rooms_with_torch() -> tuple[str, ...]:
    """The rooms that nothing works in without torch."""
    return tuple(room for room in rooms() if all(op.needs_torch for op in of_room(room)))
