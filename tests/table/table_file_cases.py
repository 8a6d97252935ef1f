# SPDX-License-Identifier: Apache-2.0
"""What the tests of the table's files share: blocks of rows, files with a valid checksum and any header, equality."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from hotloop.table.files import container, manifests, snapshots
from hotloop.table.files.container import Array, RawArray
from hypothesis import strategies as st

TABLE_ID = "0123456789abcdef0123456789abcdef"


def rows(count: int, *, first: int = 0, dim: int = 3) -> dict[str, Array]:
    """Rows whose every number follows from their place, as a table with all its columns has them."""
    place = np.arange(first, first + count)
    values = (place[:, None] * 7 + np.arange(dim)).astype(np.uint16)
    return {
        "keys": (place.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)).view(np.int64),
        "values": RawArray("bfloat16", values),
        "state": (place[:, None] / np.arange(1.0, dim + 1)).astype(np.float32),
        "score": place.astype(np.uint64) << np.uint64(40),
        "last_use": place.astype(np.uint32),
    }


def join(blocks: Iterator[dict[str, Array]]) -> dict[str, Array]:
    """All blocks as one; the empty dict for none."""
    found = list(blocks)
    if not found:
        return {}
    joined: dict[str, Array] = {}
    for name, array in found[0].items():
        bits = np.concatenate([container.numbers(block[name]) for block in found])
        joined[name] = RawArray(array.dtype, bits) if isinstance(array, RawArray) else bits
    return joined


def assert_same(found: Mapping[str, Array], wanted: Mapping[str, Array]) -> None:
    """Names, types, shapes and every bit are equal."""
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        assert type(found[name]) is type(array), name
        assert found[name].shape == array.shape, name
        assert container.tag("test", name, found[name]) == container.tag("test", name, array), name
        wanted_bits = container.numbers(array)
        wanted_bits = wanted_bits.astype(wanted_bits.dtype.newbyteorder("<"))
        assert container.numbers(found[name]).tobytes() == wanted_bits.tobytes(), name


def sealed(header: str | bytes, body: bytes = b"") -> bytes:
    """A file of any header behind the fixed first bytes, with the checksum that makes it look undamaged."""
    text = container.PREFIX + b"0" * 8 + (header.encode() if isinstance(header, str) else header)
    data = len(text).to_bytes(8, "little") + text + body
    return data[: container.DIGITS] + b"%08x" % zlib.crc32(data) + data[container.BODY :]


def sealed_arrays(arrays: dict[str, Any], body: bytes = b"") -> bytes:
    """A file whose metadata is right and whose entries of arrays are any JSON."""
    entries = "".join(f",{json.dumps(name)}:{json.dumps(entry)}" for name, entry in arrays.items())
    return sealed(f'","format":"hotloop-table","version":"1"}}{entries}}}', body)


def resealed(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest of a snapshot and give it the checksum that fits."""
    path = directory / snapshots.MANIFEST
    content = json.loads(path.read_bytes())
    change(content)
    reseal(path, json.dumps(content, indent=1).encode() + b"\n")


def reseal(path: Path, text: bytes) -> None:
    start = len(manifests.PREFIX)
    assert text.startswith(manifests.PREFIX)
    zeroed = text[:start] + b"0" * 8 + text[start + 8 :]
    path.write_bytes(text[:start] + b"%08x" % zlib.crc32(zeroed) + text[start + 8 :])


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@st.composite
def any_array(draw: st.DrawFn, lengths: st.SearchStrategy[int] | None = None) -> Array:
    """Any bits of any type the container knows, of 0 to 3 dimensions; C, Fortran or reversed order, either endian."""
    name = draw(st.sampled_from([*container.TAGS, *container.RAW_TAGS]))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3 if lengths is None else 2)))
    if lengths is not None:
        shape = (draw(lengths), *shape)
    raw = name in container.RAW_TAGS
    dtype = np.dtype(container.RAW_TAGS[name][1] if raw else name)
    size = int(np.prod(shape, dtype=int)) * dtype.itemsize
    data = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).bytes(size)
    array = np.frombuffer(data, dtype).reshape(shape)
    order = draw(st.sampled_from(["C", "F", "reversed", "big-endian"]))
    if order == "F":
        array = np.asfortranarray(array).reshape(shape)
    elif order == "reversed" and array.ndim:
        array = array[::-1]
    elif order == "big-endian" and not raw:
        array = array.astype(dtype.newbyteorder(">"))
    return RawArray(name, array) if raw else array
