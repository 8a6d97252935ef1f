# SPDX-License-Identifier: Apache-2.0
"""The container: every bit of it counts, hostile headers are refused, and it is a safetensors file."""

from __future__ import annotations

import json
import re
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from hotloop.table.files import container, deltas, manifests, snapshots
from hotloop.table.files.container import FormatError, NewerFormatError, RawArray, decode, encode
from hypothesis import given, settings
from hypothesis import strategies as st
from table_checks import refused
from table_file_cases import (
    TABLE_ID,
    any_array,
    assert_same,
    flipped,
    join,
    rows,
    sealed,
    sealed_arrays,
)

DOCS = Path(__file__).resolve().parent.parent.parent / "docs" / "table-format.md"
SMALL = b"".join(encode(rows(5), {"kind": "test", "note": "éß"}))
LARGE = b"".join(encode(rows(5000), {"kind": "test"}))  # about 190 KB


def header_size(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


@settings(deadline=None, max_examples=200)
@given(
    arrays=st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=0, max_size=5), any_array(), max_size=5
    ),
    metadata=st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=5), st.text(st.characters(codec="utf-8"))
    ),
)
def test_any_arrays_and_texts_come_back(arrays, metadata):
    data = b"".join(encode(arrays, metadata))
    found, texts = decode(data, "x")
    assert texts == metadata
    assert_same(found, arrays)
    assert data == b"".join(encode(arrays, metadata))


def test_views_are_read_only_aligned_and_not_copied():
    block = {**rows(1001), "a": np.zeros(3, np.int8)}  # odd sizes, and names in no good order
    data = np.frombuffer(b"".join(encode(block, {})), np.uint8)
    arrays, _ = decode(data, "x")
    for array in map(container.numbers, arrays.values()):
        assert np.shares_memory(array, data)
        assert not array.flags.writeable
        assert (array.ctypes.data - data.ctypes.data) % array.itemsize == 0
    assert header_size(data.tobytes()) % container.ALIGNMENT == 0


def test_contiguous_arrays_are_not_copied_to_be_written():
    block = rows(1000)
    keys = block["keys"]
    buffers = encode(block, {})
    assert any(np.shares_memory(np.frombuffer(buffer, np.uint8), keys) for buffer in buffers)


def test_the_safetensors_package_reads_it():
    safetensors = pytest.importorskip("safetensors")
    numpy = pytest.importorskip("safetensors.numpy")
    block = {**rows(7), "none": np.zeros((0, 3), np.float16), "one": np.array(2.5)}
    data = b"".join(encode(block, {"note": "é"}))
    entries = dict(safetensors.deserialize(data))
    assert set(entries) == set(block)
    assert entries["values"]["dtype"] == "BF16"
    assert bytes(entries["values"]["data"]) == block["values"].bits.tobytes()
    plain = {name: array for name, array in block.items() if name != "values"}
    assert_same(numpy.load(b"".join(encode(plain, {}))), plain)


def test_the_safetensors_package_reads_the_metadata_and_bfloat16_of_a_file(tmp_path):
    safetensors = pytest.importorskip("safetensors")
    torch = pytest.importorskip("torch")
    path = tmp_path / "x.safetensors"
    block = rows(7)
    path.write_bytes(b"".join(encode(block, {"note": "é"})))
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata()["note"] == "é"
        values = file.get_tensor("values")
    assert values.dtype == torch.bfloat16
    assert values.view(torch.uint16).numpy().tobytes() == block["values"].bits.tobytes()


def test_every_flipped_bit_of_the_header_is_found():
    decode(SMALL, "x")
    for bit in range(header_size(SMALL) * 8):
        with refused("[decode] x: expected …, got …. … again", FormatError) as caught:
            decode(flipped(SMALL, bit), "x")
        assert not isinstance(caught.value, NewerFormatError), "it is damage"


def test_a_thousand_flipped_bits_of_the_body_are_found():
    bits = np.random.default_rng(1).choice(
        np.arange(header_size(LARGE) * 8, len(LARGE) * 8), 1000, replace=False
    )
    for bit in bits:
        with pytest.raises(FormatError, match=r"expected checksum .* got"):
            decode(flipped(LARGE, int(bit)), "x")


def test_every_truncation_is_found():
    for length in range(len(SMALL)):
        with pytest.raises(FormatError, match=r"got .*\. .* again"):
            decode(SMALL[:length], "x")
    for length in np.random.default_rng(2).integers(0, len(LARGE), 300):
        with pytest.raises(FormatError):
            decode(LARGE[:length], "x")


def test_a_truncation_says_so():
    with pytest.raises(FormatError, match=f"its header promises {len(LARGE)} bytes"):
        decode(LARGE[:-5], "x")


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
def test_every_extension_is_found(data):
    generator = np.random.default_rng(3)
    for count in (1, 2, 3, 4, 7, 8, 63, 64, 4096):
        for more in (b"\0" * count, b" " * count, generator.bytes(count), (data * 9)[:count]):
            with pytest.raises(FormatError):
                decode(data + more, "x")


def test_swapped_and_repeated_pages_are_found():
    page = 4096
    pages = [LARGE[i : i + page] for i in range(0, len(LARGE), page)]
    for i in range(1, len(pages) - 2):
        with pytest.raises(FormatError):
            decode(b"".join([*pages[:i], pages[i + 1], pages[i], *pages[i + 2 :]]), "x")
        with pytest.raises(FormatError):
            decode(b"".join([*pages[:i], bytes(page), *pages[i + 1 :]]), "x")


def test_another_seed_adds_nothing_to_a_crc():
    """The reason for one CRC-32 and not two: what one misses, the same with another start misses."""
    a, b = SMALL, flipped(SMALL, 77)
    assert len({zlib.crc32(a, seed) ^ zlib.crc32(b, seed) for seed in (0, 1, 0xDEADBEEF)}) == 1


def test_a_newer_version_is_refused_as_such():
    data = sealed('","format":"hotloop-table","version":"2"},"future":"anything"}')
    text = "[decode] x: expected format version 1 or lower, got 2. … upgrade hotloop"
    with refused(text, NewerFormatError):
        decode(data, "x")


@pytest.mark.parametrize(
    ("header", "text"),
    [
        ('","format":"other","version":"1"}}', "expected format 'hotloop-table', got 'other'"),
        ('","version":"1"}}', "expected format 'hotloop-table', got None"),
        ('","format":"hotloop-table","version":"x"}}', "expected a format version, got 'x'"),
        ('","format":"hotloop-table","version":"0"}}', "expected a format version, got '0'"),
        ('","format":"hotloop-table"}}', "expected a format version, got None"),
        ('","format":"hotloop-table","version":1}}', "expected metadata of strings"),
        ('","format":', "expected a JSON header"),
        ('","a":"1","a":"2"}}', "a name given twice"),
        ('"},"a":1,"a":2}', "a name given twice"),
        ('","a":NaN}}', "the number NaN"),
        ('","a":' + "[" * 100_000 + "]" * 100_000 + "}}", "expected a JSON header"),
        (b'","a":"\xff"}}', "expected a JSON header"),
    ],
)
def test_headers_with_a_valid_checksum_are_still_checked(header, text):
    with pytest.raises(FormatError, match=text):
        decode(sealed(header), "x")


GOOD = {"dtype": "I64", "shape": [2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"a": 5}, "expected dtype, shape and data_offsets of array 'a', got 5"),
        ({"a": {**GOOD, "more": 1}}, "expected dtype, shape and data_offsets"),
        ({"a": {**GOOD, "dtype": "I65"}}, "expected a dtype of .*BF16 of array 'a', got 'I65'"),
        ({"a": {**GOOD, "dtype": []}}, "expected a dtype"),
        ({"a": {**GOOD, "shape": 2}}, "expected a shape"),
        ({"a": {**GOOD, "shape": [True]}}, "expected a shape"),
        ({"a": {**GOOD, "shape": [2.0]}}, "expected a shape"),
        ({"a": {**GOOD, "shape": [-2]}}, "expected a shape"),
        ({"a": {**GOOD, "shape": [1] * 9}}, "expected a shape"),
        ({"a": {**GOOD, "shape": [1 << 63]}}, "expected a shape"),
        ({"a": {**GOOD, "shape": [10**1000]}}, "expected a shape"),
        ({"a": {**GOOD, "shape": [1 << 40, 1 << 40]}}, "data_offsets .* bytes apart"),
        ({"a": {**GOOD, "shape": [0, 1 << 61], "data_offsets": [0, 0]}}, "data_offsets 0 bytes"),
        ({"a": {**GOOD, "shape": [1 << 58]}}, "data_offsets .* bytes apart"),
        ({"a": {**GOOD, "data_offsets": [0]}}, "two data_offsets"),
        ({"a": {**GOOD, "data_offsets": [0, 16.0]}}, "two data_offsets"),
        ({"a": {**GOOD, "data_offsets": [-16, 0]}}, "two data_offsets"),
        ({"a": {**GOOD, "data_offsets": [16, 0]}}, "bytes apart"),
        ({"a": {**GOOD, "data_offsets": [16, 32]}}, "data_offsets that start at 0"),
        ({"a": GOOD, "b": GOOD}, "data_offsets that start at 16"),
        ({"a": {**GOOD, "shape": [1 << 50], "data_offsets": [0, 1 << 53]}}, "bytes of arrays, got"),
        (
            {"a": {**GOOD, "shape": [1], "data_offsets": [0, 8]}},
            "expected 8 bytes of arrays, got 16",
        ),
        ({}, "expected 0 bytes of arrays, got 16"),
    ],
)
def test_hostile_entries_are_refused_without_memory(arrays, text):
    data = sealed_arrays(arrays, bytes(16))
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=text):
            decode(data, "x")
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_the_hostile_cases_start_from_a_good_one():
    arrays, _ = decode(sealed_arrays({"a": GOOD}, bytes(16)), "x")
    assert arrays["a"].shape == (2,)


def test_a_header_length_beyond_the_file_is_not_believed():
    for length in (len(SMALL), 1 << 40, (1 << 64) - 1):
        with pytest.raises(FormatError, match=f"expected a header of at most .* got {length}"):
            decode(length.to_bytes(8, "little") + SMALL[8:], "x")


def test_a_header_longer_than_the_limit_is_neither_written_nor_read():
    with pytest.raises(ValueError, match=r"\[save\] metadata: expected a header of at most"):
        encode({}, {"long": "x" * container.MAX_HEADER}, op="save")
    data = sealed('","long":"' + "x" * container.MAX_HEADER + '"}}')
    with pytest.raises(FormatError, match="expected a header of at most"):
        decode(data, "x")


@settings(deadline=None, max_examples=300)
@given(data=st.binary(max_size=200), prefixed=st.booleans())
def test_garbage_raises_nothing_but_format_errors(data, prefixed):
    with pytest.raises(FormatError):
        decode(sealed(data) if prefixed else data, "x")


@pytest.mark.parametrize(
    ("arrays", "metadata", "error", "text"),
    [
        (
            {"a": [1]},
            {},
            TypeError,
            r"arrays\['a'\]: expected ndarray or RawArray, got list",
        ),
        ({"a": np.zeros(1, complex)}, {}, TypeError, "expected dtype uint8, .*, got complex128"),
        ({"a": np.array(["x"])}, {}, TypeError, "expected dtype"),
        ({"a": np.array([None])}, {}, TypeError, "expected dtype"),
        ({"a": np.zeros((1,) * 9)}, {}, ValueError, "expected at most 8 dimensions"),
        ({"__metadata__": np.zeros(1)}, {}, ValueError, "expected another name"),
        ({"\ud800": np.zeros(1)}, {}, ValueError, "text that UTF-8 can hold"),
        ({5: np.zeros(1)}, {}, TypeError, "arrays: expected str, got int"),
        ({}, {"a": 5}, TypeError, r"metadata\['a'\]: expected str, got int"),
        ({}, {"a": "\ud800"}, ValueError, r"metadata\['a'\]: expected text that UTF-8 can hold"),
        ({}, {"version": "7"}, ValueError, "expected other names than .*, got 'version'"),
    ],
)
def test_what_cannot_be_written_is_refused(arrays, metadata, error, text):
    with pytest.raises(error, match=text):
        encode(arrays, metadata)


def test_raw_arrays_hold_the_bits_of_a_known_type():
    with pytest.raises(ValueError, match=r"\[RawArray\] dtype: expected one of bfloat16, got 'x'"):
        RawArray("x", np.zeros(1, np.uint16))
    with refused("[RawArray] bits: expected a NumPy array of uint16, got", TypeError):
        RawArray("bfloat16", np.zeros(1, np.float32))
    with pytest.raises(TypeError, match="got list"):
        RawArray("bfloat16", [1])
    array = RawArray("bfloat16", np.arange(6, dtype=np.uint16).reshape(3, 2))
    assert len(array) == 3 and array.shape == (3, 2) and array[1:].bits.tolist() == [[2, 3], [4, 5]]


@pytest.mark.source
def test_the_reader_of_the_docs_reads_what_we_write(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S)
    assert len(blocks) == 1 and len(blocks[0].splitlines()) <= 60
    reader: dict = {}
    exec(compile(blocks[0], DOCS.name, "exec"), reader)

    block = rows(100)
    snapshots.save(tmp_path, {"dim": 3}, [block], part_bytes=1000)
    config, found = reader["read_snapshot"](tmp_path)
    assert config == {"dim": 3}
    bits = {name: container.numbers(array) for name, array in block.items()}
    assert_same(join(found), bits)

    delta = deltas.Delta(TABLE_ID, 3, 9, block, np.array([5, 6]))
    deltas.publish(tmp_path / "deltas", deltas.encode_delta(delta))
    path = tmp_path / "deltas" / "delta-3-9.safetensors"
    arrays, metadata = reader["read_container"](path.read_bytes())
    assert_same(arrays, {**bits, "erased": np.array([5, 6])})
    assert (metadata["table_id"], metadata["since"], metadata["until"]) == (TABLE_ID, "3", "9")

    for bit in range(header_size(SMALL) * 8):
        with pytest.raises((ValueError, KeyError)):
            reader["read_container"](flipped(SMALL, bit))
    manifest = tmp_path / "table.json"
    data = manifest.read_bytes()
    for bit in range(0, len(data) * 8, 7):
        manifest.unlink()  # quicker on ext4 than to truncate it
        manifest.write_bytes(flipped(data, bit))
        with pytest.raises((ValueError, KeyError)):
            reader["read_snapshot"](tmp_path)


@pytest.mark.source
def test_the_docs_state_the_constants():
    text = DOCS.read_text()
    for value in (
        container.PREFIX.decode(),
        f"{container.DIGITS} to {container.BODY - 1}",
        *container.TAGS.values(),
    ):
        assert value in text, value
    for value in (
        "BF16",
        snapshots.MANIFEST,
        manifests.FORMAT,
        container.FORMAT,
        str(container.VERSION),
    ):
        assert value in text, value
    assert json.dumps(snapshots.PREFIX.decode())[1:-1].replace('\\"', '"') in text
