# SPDX-License-Identifier: Apache-2.0
"""The one container of the room's files: a safetensors file that notices any change of its bytes.

``__metadata__`` comes first in the header and its first entry is the CRC-32 of the whole file with the eight digits
of that entry read as zeros. The digits therefore lie at the same place in every file and a reader needs no JSON to
check them. ``docs/table-format.md`` describes the bytes, and says why one CRC-32: it takes 3.3 GB/s on one core (zlib
1.2.13, 256 MiB).
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from ...front import check

FORMAT = "hotloop-table"
VERSION = 1
PREFIX = b'{"__metadata__":{"hotloop_crc32":"'
DIGITS = 8 + len(PREFIX)  # where the checksum lies in the file
BODY = DIGITS + 8  # the first byte behind it
RESERVED = ("hotloop_crc32", "format", "version")
# A handful of arrays need 1 KB; JSON of 100 MB would cost GBs of Python objects.
MAX_HEADER = 1 << 20
MAX_NDIM = 8
ALIGNMENT = 64  # the first array of a mapped file starts on a cache line

TAGS = {
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "float16": "F16",
    "uint32": "U32",
    "int32": "I32",
    "float32": "F32",
    "uint64": "U64",
    "int64": "I64",
    "float64": "F64",
}
RAW_TAGS = {"bfloat16": ("BF16", "uint16")}
"""Types that NumPy lacks: their tag, what holds the bits."""

_DTYPES: dict[str, np.dtype[Any]] = {
    tag: np.dtype(name).newbyteorder("<") for name, tag in TAGS.items()
}
_RAW: dict[str, tuple[str, np.dtype[Any]]] = {
    tag: (name, np.dtype(bits).newbyteorder("<")) for name, (tag, bits) in RAW_TAGS.items()
}

Buffer: TypeAlias = "bytes | bytearray | memoryview"


class FormatError(ValueError):
    """Bytes that are not a whole, undamaged file of this format."""


class NewerFormatError(FormatError):
    """An undamaged file of a later format version than this hotloop reads."""


@dataclass(frozen=True, eq=False)
class RawArray:
    """An array of a type that NumPy lacks, as the unsigned integers that hold its bits."""

    dtype: str
    bits: np.ndarray

    def __post_init__(self) -> None:
        check.choice("RawArray", "dtype", self.dtype, tuple(RAW_TAGS))
        wanted = RAW_TAGS[self.dtype][1]
        if not isinstance(self.bits, np.ndarray) or self.bits.dtype != wanted:
            got = getattr(self.bits, "dtype", type(self.bits).__name__)
            raise TypeError(
                f"[RawArray] bits: expected a NumPy array of {wanted}, got {got}. Pass array.view({wanted!r})."
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return self.bits.shape

    def __len__(self) -> int:
        return len(self.bits)

    def __getitem__(self, index: Any) -> RawArray:
        return RawArray(self.dtype, self.bits[index])


Array: TypeAlias = "np.ndarray | RawArray"


def numbers(array: Array) -> np.ndarray:
    """What holds the array's bits."""
    return array.bits if isinstance(array, RawArray) else array


def tag(op: str, name: str, array: Any) -> str:
    """The safetensors name of an array's type; anything but an array of a known type is refused."""
    if isinstance(array, RawArray):
        return RAW_TAGS[array.dtype][0]
    check.instance(op, name, array, np.ndarray, RawArray, hint="Use numpy.asarray(...).")
    found = TAGS.get(array.dtype.newbyteorder("=").name)
    if found is None:
        raise TypeError(
            f"[{op}] {name}: expected dtype {', '.join(TAGS)}, got {array.dtype}. Convert it first."
        )
    return found


def storage(tag: str) -> np.dtype[Any]:
    """The NumPy type, as it lies in a file, that holds the bits of a tag's numbers."""
    return _RAW[tag][1] if tag in _RAW else _DTYPES[tag]


def shown(tag: str, bits: np.ndarray) -> Array:
    """Bits as the array that they stand for."""
    return RawArray(_RAW[tag][0], bits) if tag in _RAW else bits


def known_tag(value: Any) -> bool:
    return isinstance(value, str) and (value in _DTYPES or value in _RAW)


def checksum(buffers: Iterable[Buffer], start: int = 0) -> int:
    for buffer in buffers:
        start = zlib.crc32(buffer, start)
    return start


def encode(
    arrays: Mapping[str, Array],
    metadata: Mapping[str, str],
    *,
    op: str = "encode",
    version: int = VERSION,
) -> list[Buffer]:
    """Return the file's bytes as buffers to be written one after the other; contiguous arrays are not copied.

    The checksum is taken here: write the buffers before the arrays change.
    """
    for key, value in metadata.items():
        if key in RESERVED:
            raise ValueError(
                f"[{op}] metadata: expected other names than {', '.join(RESERVED)}, got {key!r}. Rename it."
            )
        _encodable(op, "metadata", key)
        _encodable(op, f"metadata[{key!r}]", value)
    header: dict[str, Any] = {
        "__metadata__": {
            "hotloop_crc32": "0" * 8,
            "format": FORMAT,
            "version": str(version),
            **dict(sorted(metadata.items())),
        }
    }
    tags = {}
    for name, array in arrays.items():
        _encodable(op, "arrays", name)
        if name == "__metadata__":
            raise ValueError(f"[{op}] arrays: expected another name than {name!r}. Rename it.")
        tags[name] = tag(op, f"arrays[{name!r}]", array)
        if len(array.shape) > MAX_NDIM:
            raise ValueError(
                f"[{op}] arrays[{name!r}]: expected at most {MAX_NDIM} dimensions, got shape {array.shape}."
            )
    body: list[Buffer] = []
    offset = 0
    # wide numbers first: without gaps, which safetensors forbids, every array is still aligned to its type
    for name in sorted(tags, key=lambda name: (-storage(tags[name]).itemsize, name)):
        bits = numbers(arrays[name])
        flat = bits.astype(storage(tags[name]), order="C", copy=False).reshape(-1).view(np.uint8)
        header[name] = {
            "dtype": tags[name],
            "shape": list(bits.shape),
            "data_offsets": [offset, offset + flat.nbytes],
        }
        offset += flat.nbytes
        if flat.nbytes:
            body.append(flat.data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    if len(text) > MAX_HEADER:
        raise ValueError(
            f"[{op}] metadata: expected a header of at most {MAX_HEADER} bytes, got {len(text)}. Shorten it."
        )
    head = len(text).to_bytes(8, "little") + text
    digits = b"%08x" % checksum([head, *body])
    return [head[:DIGITS] + digits + head[BODY:], *body]


MANIFEST_PREFIX = b'{\n "hotloop_crc32": "'
"""What the manifest of a snapshot begins with."""
MAX_MANIFEST = 256 << 20  # a part of 64 MiB takes 150 bytes of it: 100 TB
BEGINNING = max(BODY, len(MANIFEST_PREFIX))


def begins_well(start: bytes, size: int) -> bool:
    """Whether the first bytes are those of a file of this room, of a size that such a file can have."""
    if start.startswith(MANIFEST_PREFIX):
        return size <= MAX_MANIFEST
    return start[8:DIGITS] == PREFIX and int.from_bytes(start[:8], "little") <= MAX_HEADER


def decode(
    buffer: Any, what: str, *, op: str = "decode", newest: int = VERSION
) -> tuple[dict[str, Array], dict[str, str]]:
    """Check every byte of a file and return its arrays, read-only views of ``buffer``, and its metadata.

    Args:
        buffer: the bytes of the whole file: bytes, a memory map, anything with the buffer protocol.
        what: the name of the file, for errors.
        newest: the latest version of this kind of file that is read. Default ``VERSION``.
    Raises:
        NewerFormatError: the file is whole, of a later format version.
        FormatError: anything else is wrong with it.
    """
    view = memoryview(buffer).cast("B")
    text = _header(view, what, op)
    stored, found = checksums(view, DIGITS)
    if stored != found:
        wanted = f"checksum {stored} over {len(view)} bytes"
        raise damaged(op, what, wanted, found + _size_note(view, text))
    try:
        header = parsed(text)
    except (ValueError, RecursionError) as error:
        raise damaged(op, what, "a JSON header", error) from None
    metadata = header.pop("__metadata__")  # there: PREFIX is
    if not all(isinstance(value, str) for value in metadata.values()):
        raise damaged(op, what, "metadata of strings", "others")
    name, version = metadata.pop("format", None), metadata.pop("version", None)
    check_version(name, version, FORMAT, what, op, newest)
    del metadata["hotloop_crc32"]
    body = view[8 + len(text) :]
    return _arrays(header, body, what, op), metadata


DAMAGED = "The file is damaged: fetch it again, or restore it from a copy."


def damaged(op: str, what: str, wanted: object, got: object) -> FormatError:
    return FormatError(f"[{op}] {what}: expected {wanted}, got {got}. {DAMAGED}")


def checksums(data: Any, at: int) -> tuple[str, str]:
    """The digits that stand at a place, and those of the bytes around it."""
    found = checksum([data[:at], b"0" * 8, data[at + 8 :]])
    return bytes(data[at : at + 8]).decode("ascii", "replace"), f"{found:08x}"


def parsed(text: bytes) -> Any:
    return json.loads(text, object_pairs_hook=_distinct, parse_constant=_refuse_constant)


def check_version(
    name: Any, version: Any, wanted: str, what: str, op: str, newest: int = VERSION
) -> None:
    """Refuse an undamaged file of another format, or of a later version of it."""
    if name != wanted:
        raise FormatError(
            f"[{op}] {what}: expected format {wanted!r}, got {name!r}. Pass a file that hotloop.table wrote."
        )
    if not re.fullmatch(r"[1-9][0-9]{0,8}", str(version)):
        raise damaged(op, what, "a format version", repr(version))
    if int(version) > newest:
        raise NewerFormatError(
            f"[{op}] {what}: expected format version {newest} or lower, got {version}. "
            "A newer hotloop wrote the file: upgrade hotloop to read it."
        )


def _encodable(op: str, name: str, value: Any) -> None:
    check.instance(op, name, value, str, hint="Use str(...).")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"[{op}] {name}: expected text that UTF-8 can hold, got {value!r}. Remove the surrogates."
        ) from None


def _header(view: memoryview, what: str, op: str) -> bytes:
    """The header's bytes, copied only once their length is known to be sane."""
    if len(view) < BODY:
        raise damaged(op, what, f"at least {BODY} bytes", len(view))
    if view[8:DIGITS] != PREFIX:
        raise FormatError(
            f"[{op}] {what}: expected the header to start with {PREFIX.decode()}, "
            f"got {bytes(view[8:DIGITS])!r}. Another program wrote the file, or it is damaged: fetch it again."
        )
    length = int.from_bytes(view[:8], "little")
    if length > MAX_HEADER:
        raise damaged(op, what, f"a header of at most {MAX_HEADER} bytes", length)
    if length > len(view) - 8:
        wanted = f"a header of at most {len(view) - 8} bytes in a file of {len(view)}"
        raise damaged(op, what, wanted, length)
    return bytes(view[8 : 8 + length])


def _size_note(view: memoryview, text: bytes) -> str:
    """What a header that may be damaged says about the size, if it still says anything."""
    try:
        header = json.loads(text)
        del header["__metadata__"]
        size = 8 + len(text) + max((x["data_offsets"][1] for x in header.values()), default=0)
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return ""
    return f" (its header promises {size} bytes)" if size != len(view) else ""


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name given twice")
    return found


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"the number {text}")


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_count, value))


def _arrays(header: dict[str, Any], body: memoryview, what: str, op: str) -> dict[str, Array]:
    """Views of the body, after every offset, shape and type is known to fit it."""

    def refuse(name: str, wanted: str, got: Any) -> FormatError:
        return damaged(op, what, f"{wanted} of array {name!r}", repr(got))

    spans = []
    for name, entry in header.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise refuse(name, "dtype, shape and data_offsets", entry)
        shape, offsets = entry["shape"], entry["data_offsets"]
        if not known_tag(entry["dtype"]):
            raise refuse(name, f"a dtype of {', '.join([*_DTYPES, *_RAW])}", entry["dtype"])
        if not are_counts(shape) or len(shape) > MAX_NDIM:
            raise refuse(name, "a shape", shape)
        if not are_counts(offsets) or len(offsets) != 2:
            raise refuse(name, "two data_offsets", offsets)
        size = outer = storage(entry["dtype"]).itemsize
        for n in shape:
            size *= n
            outer *= max(n, 1)  # NumPy bounds this one, even where a dimension is 0
        if outer >= 1 << 63 or offsets[1] - offsets[0] != size:
            raise refuse(name, f"data_offsets {size} bytes apart for shape {shape}", offsets)
        spans.append((offsets[0], offsets[1], name))
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            raise refuse(name, f"data_offsets that start at {end}", [start, stop])
        end = stop
    if end != len(body):
        raise damaged(op, what, f"{end} bytes of arrays", len(body))
    arrays: dict[str, Array] = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        bits = np.frombuffer(body[start:stop], storage(entry["dtype"])).reshape(entry["shape"])
        bits.flags.writeable = False
        arrays[name] = shown(entry["dtype"], bits)
    return arrays


def stored_checksum(buffer: Any) -> str:
    """The digits that a container carries, unchecked."""
    return bytes(memoryview(buffer)[DIGITS:BODY]).decode("ascii", "replace")
