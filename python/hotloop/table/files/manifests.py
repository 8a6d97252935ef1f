# SPDX-License-Identifier: Apache-2.0
"""The manifest of a snapshot: which parts there are, and the checks of its entries.

Nothing is opened, allocated or built from an entry before the entry is known to have the right type and to fit the
bytes that the files have.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
from dataclasses import dataclass
from typing import Any

from . import container, disk
from .disk import PathLike

MANIFEST = "table.json"
FORMAT = "hotloop-table-snapshot"
PREFIX = container.MANIFEST_PREFIX
PART = re.compile(r"part-([0-9a-f]{16})-([0-9]{6,})\.safetensors")

_CRC32 = re.compile(r"[0-9a-f]{8}")


@dataclass(frozen=True)
class Summary:
    """What a snapshot holds: its token, rows, parts, and bytes of all parts."""

    snapshot: str
    rows: int
    parts: int
    bytes: int


@dataclass(frozen=True)
class Part:
    file: str
    bytes: int
    rows: int
    crc32: str


@dataclass(frozen=True)
class AdmissionParts:
    """Of the filter: what JSON holds of its state, and the parts that hold the rest."""

    state: dict[str, Any]
    arrays: dict[str, Any]
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Manifest:
    snapshot: str
    config: dict[str, Any]
    rows: int
    arrays: dict[str, Any]
    parts: tuple[Part, ...]
    admission: AdmissionParts | None = None

    @property
    def files(self) -> tuple[Part, ...]:
        return self.parts + (() if self.admission is None else self.admission.parts)

    @property
    def summary(self) -> Summary:
        total = sum(part.bytes for part in self.files)
        return Summary(self.snapshot, self.rows, len(self.files), total)


def part_name(token: str, index: int) -> str:
    return f"part-{token}-{index:06d}.safetensors"


def manifest_bytes(manifest: Manifest) -> bytes:
    content = {
        "hotloop_crc32": "0" * 8,
        "format": FORMAT,
        "version": container.VERSION,
        "snapshot": manifest.snapshot,
        "rows": manifest.rows,
        "config": manifest.config,
        "arrays": manifest.arrays,
        "parts": [vars(part) for part in manifest.parts],
    }
    if manifest.admission is not None:
        parts = [vars(part) for part in manifest.admission.parts]
        content["admission"] = {**vars(manifest.admission), "parts": parts}
    data = json.dumps(content, indent=1).encode() + b"\n"
    start = len(PREFIX)
    return data[:start] + b"%08x" % container.checksum([data]) + data[start + 8 :]


def read_manifest(op: str, directory: PathLike) -> Manifest | None:
    """The checked manifest; None if there is none."""
    path = os.path.join(directory, MANIFEST)
    try:
        data = bytes(disk.read(path, op=op))
    except FileNotFoundError:
        return None

    refuse = functools.partial(container.damaged, op, path)
    start = len(PREFIX)
    if data.startswith(PREFIX) and len(data) <= container.BEGINNING:
        raise refuse(
            f"a manifest of at most {container.MAX_MANIFEST} bytes", "a larger one, or none of it"
        )
    if not data.startswith(PREFIX) or len(data) < start + 8:
        raise refuse("a snapshot's manifest", repr(data[:start]))
    stored, found = container.checksums(data, start)
    if stored != found:
        raise refuse(f"checksum {stored} over {len(data)} bytes", found)
    try:
        content = container.parsed(data)
    except (ValueError, RecursionError) as error:
        raise refuse("JSON", error) from None
    container.check_version(content.get("format"), content.get("version"), FORMAT, path, op)
    try:
        return _checked_manifest(content)
    except (LookupError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise refuse("the entries of a manifest", repr(error)) from None


def _checked_manifest(content: dict[str, Any]) -> Manifest:
    """Entries of the right types, and no part outside of the directory."""
    parts = _checked_parts(content, content["snapshot"], 0)
    admission = content.get("admission")
    if admission is not None:
        own = _checked_parts(admission, content["snapshot"], len(parts))
        admission = AdmissionParts(admission["state"], admission["arrays"], own)
        if not isinstance(admission.state, dict):
            raise TypeError("a state of admission that is no dict")
    rows, config = content["rows"], content["config"]
    if type(rows) is not int or rows != sum(part.rows for part in parts):
        raise ValueError(f"{rows!r} rows, another number than the parts'")
    if not isinstance(config, dict):
        raise TypeError("config or arrays that are no dicts")
    return Manifest(str(content["snapshot"]), config, rows, content["arrays"], parts, admission)


def _checked_parts(content: dict[str, Any], token: Any, first: int) -> tuple[Part, ...]:
    """Parts of a token, the first of which has this number, whose rows can lie in as many bytes as they are said to.

    What is allocated for the rows goes by their number, and files are known to have their bytes.
    """
    if not isinstance(content["arrays"], dict):
        raise TypeError("config or arrays that are no dicts")
    row_bytes = 0
    for name, entry in content["arrays"].items():
        shape = entry["shape"]
        if set(entry) != {"dtype", "shape"} or not container.known_tag(entry["dtype"]):
            raise ValueError(f"array {name!r} of {entry!r}")
        if not container.are_counts(shape):
            raise ValueError(f"array {name!r} of shape {shape!r}")
        row_bytes += container.storage(entry["dtype"]).itemsize * math.prod(shape)
    parts = tuple(Part(**part) for part in content["parts"])
    for index, part in enumerate(parts, first):
        if part.file != part_name(token, index) or not PART.fullmatch(part.file):
            raise ValueError(f"part {index} named {part.file!r}")
        if not (container.is_count(part.bytes) and container.is_count(part.rows)):
            raise ValueError(f"part {index} of {part.rows!r} rows in {part.bytes!r} bytes")
        if part.rows * max(row_bytes, 1) > part.bytes:
            raise ValueError(f"{part.rows} rows of {row_bytes} bytes in a part of {part.bytes}")
        if not isinstance(part.crc32, str) or not _CRC32.fullmatch(part.crc32):
            raise ValueError(f"part {index} of checksum {part.crc32!r}")
    return parts
