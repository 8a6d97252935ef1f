# SPDX-License-Identifier: Apache-2.0
"""What the C++ side sees of an array: dtype, extents, strides, and what it refuses."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

NUMPY = {
    "float32": np.float32,
    "float64": np.float64,
    "float16": np.float16,
    "int64": np.int64,
    "int32": np.int32,
    "uint8": np.uint8,
}
TORCH = {name: getattr(torch, name) for name in (*NUMPY, "bfloat16")}


@pytest.mark.parametrize("name", NUMPY)
def test_numpy(name: str, native: ModuleType) -> None:
    found = native.describe(np.zeros((3, 5), NUMPY[name]))
    assert found == {"dtype": name, "shape": (3, 5), "stride": (5, 1), "read_only": False}


@pytest.mark.parametrize("name", TORCH)
def test_torch(name: str, native: ModuleType) -> None:
    found = native.describe(torch.zeros(3, 5, dtype=TORCH[name]))
    assert found == {"dtype": name, "shape": (3, 5), "stride": (5, 1), "read_only": False}


def test_bool_is_one_byte(native: ModuleType) -> None:
    assert native.describe(np.zeros(2, bool))["dtype"] == "uint8"
    assert native.describe(torch.zeros(2, dtype=torch.bool))["dtype"] == "uint8"


@pytest.mark.parametrize("make", [np.zeros, torch.zeros], ids=["numpy", "torch"])
def test_strides_count_elements(make: Any, native: ModuleType) -> None:
    x = make((4, 6))
    assert native.describe(x.T)["stride"] == (1, 6)
    assert native.describe(x[::2, 1::3])["stride"] == (12, 3)
    assert native.describe(x[1])["shape"] == (6,)
    assert native.describe(x[:, :, None, None])["shape"] == (4, 6, 1, 1)
    assert native.describe(make(()))["shape"] == ()


def test_negative_and_zero_strides(native: ModuleType) -> None:
    x = np.zeros((4, 6), np.float32)
    assert native.describe(x[::-1, ::-2])["stride"] == (-6, -2)
    assert native.describe(np.broadcast_to(x[0], (9, 6)))["stride"] == (0, 1)
    assert native.describe(torch.zeros(1, 3).expand(5, 3))["stride"] == (0, 1)


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (2, 0, 3)])
def test_empty(shape: tuple[int, ...], native: ModuleType) -> None:
    assert native.describe(np.zeros(shape, np.float32))["shape"] == shape
    assert native.describe(torch.zeros(shape))["shape"] == shape


def test_other_buffers(native: ModuleType) -> None:
    assert native.describe(b"abc") == {
        "dtype": "uint8",
        "shape": (3,),
        "stride": (1,),
        "read_only": True,
    }
    assert not native.describe(bytearray(3))["read_only"]
    assert native.describe(memoryview(np.zeros(3)))["dtype"] == "float64"


def test_versioned_dlpack_carries_the_read_only_flag(native: ModuleType) -> None:
    x = np.arange(6.0).reshape(2, 3)
    plain, versioned = x.__dlpack__(), x.__dlpack__(max_version=(1, 0))
    assert "versioned" not in repr(plain)
    for capsule in (plain, versioned):
        assert native.describe(capsule) == {
            "dtype": "float64", "shape": (2, 3), "stride": (3, 1), "read_only": False
        }  # fmt: skip
    x.flags.writeable = False
    assert native.describe(x.__dlpack__(max_version=(1, 0)))["read_only"]
    assert native.describe(x)["read_only"]


def test_a_capsule_is_read_and_not_consumed(native: ModuleType) -> None:
    capsule = torch.utils.dlpack.to_dlpack(torch.zeros(3))
    for _ in range(2):
        assert native.describe(capsule)["shape"] == (3,)


def test_a_consumed_capsule_is_refused(native: ModuleType) -> None:
    capsule = torch.utils.dlpack.to_dlpack(torch.zeros(3))
    torch.utils.dlpack.from_dlpack(capsule)
    with pytest.raises(
        TypeError, match=r"expected an unused DLPack capsule, got one that was consumed\. Export it"
    ):
        native.describe(capsule)


def test_memory_is_returned(native: ModuleType) -> None:
    """The array's buffer can be resized again, so nothing holds it."""
    x = bytearray(8)
    native.describe(x)
    x.extend(b"more")
    t = torch.zeros(3)
    before = t._use_count() if hasattr(t, "_use_count") else None
    native.describe(t)
    assert before is None or t._use_count() == before


def misaligned(n: int = 4) -> np.ndarray:
    return np.frombuffer(bytearray(4 * n + 1), np.uint8)[1:].view(np.float32)


def packed_records() -> np.ndarray:
    return np.zeros(3, np.dtype([("a", np.uint8), ("b", np.float32)]))["b"]


REFUSED = {
    "big-endian": (
        lambda: np.zeros(3, ">f4"), TypeError,
        r"in native byte order, got big-endian '>f'\. Use array\.astype\(array\.dtype\.newbyteorder\('='\)\)",
    ),
    "complex": (
        lambda: np.zeros(3, np.complex64), TypeError,
        r"expected float64, .* or uint8 in native byte order, got format 'Zf'\. Convert it first",
    ),
    "uint16": (lambda: np.zeros(3, np.uint16), TypeError, "got format 'H'"),
    "torch complex": (lambda: torch.zeros(3, dtype=torch.complex64), TypeError, "got DLPack type code 5 with 64 bits"),
    "torch int16": (lambda: torch.zeros(3, dtype=torch.int16), TypeError, "got DLPack type code 0 with 16 bits"),
    "misaligned": (misaligned, ValueError, "expected an aligned array, got one that starts inside an element"),
    "records": (packed_records, ValueError, "expected strides that are whole elements, got 5 bytes for items of 4"),
    "numpy rank 5": (lambda: np.zeros((1,) * 5), ValueError, "expected at most 4 dimensions, got 5"),
    "torch rank 5": (lambda: torch.zeros((1,) * 5), ValueError, "expected at most 4 dimensions, got 5"),
    "list": (lambda: [1.0, 2.0], TypeError, r"expected an array \(buffer protocol or DLPack\), got list"),
    "None": (lambda: None, TypeError, "got NoneType"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, native: ModuleType) -> None:
    make, kind, text = REFUSED[case]
    with pytest.raises(kind, match=rf"\[describe\] array: .*{text}"):
        native.describe(make())


def test_tensors_that_require_grad_are_read(native: ModuleType) -> None:
    """Losses pass them as they are: detaching is the dearest call of a small batch."""
    assert native.describe(torch.zeros(3, requires_grad=True))["shape"] == (3,)
    assert native.describe(torch.nn.Parameter(torch.zeros(2, 3)))["stride"] == (3, 1)


def test_map_writes_where_it_is_told(native: ModuleType) -> None:
    x, out = torch.tensor([0.0, 1.0]), torch.empty(2)
    native.map("exp", x, out)
    torch.testing.assert_close(out, x.exp())
    in_place = np.array([0.0, 1.0])
    native.map("exp", in_place, in_place)
    np.testing.assert_allclose(in_place, [1.0, np.e])
    native.map("exp", np.zeros(0), np.zeros(0))


def read_only() -> np.ndarray:
    x = np.zeros(4)
    x.flags.writeable = False
    return x


MAP_REFUSED = {
    "read-only": (
        np.zeros(4),
        read_only(),
        r"\[core.map\] out: expected a writable array, got a read-only one",
    ),
    "size": (np.zeros(4), np.zeros(3), r"\[core.map\] out: expected the size and dtype of x"),
    "dtype": (
        np.zeros(4),
        np.zeros(4, np.float32),
        r"\[core.map\] out: expected the size and dtype of x",
    ),
    "strided": (np.zeros(4), np.zeros(8)[::2], r"\[core.map\] out: expected a contiguous array"),
    "reversed": (np.zeros(4)[::-1], np.zeros(4), r"\[core.map\] x: expected a contiguous array"),
    "rank": (
        np.zeros((2, 2)),
        np.zeros(4),
        r"\[core.map\] x: expected 1 dimension\(s\), got shape \(2, 2\)",
    ),
    "int": (
        np.zeros(4, np.int32),
        np.zeros(4, np.int32),
        r"x: expected float32 or float64, got int32",
    ),
}


@pytest.mark.parametrize("case", MAP_REFUSED)
def test_map_refuses(case: str, native: ModuleType) -> None:
    x, out, text = MAP_REFUSED[case]
    with pytest.raises(ValueError, match=text):
        native.map("exp", x, out)


def test_map_refuses_an_unknown_function(native: ModuleType) -> None:
    with pytest.raises(
        ValueError, match=r"\[core.map\] name: got sin, which is none of the functions"
    ):
        native.map("sin", np.zeros(1), np.zeros(1))


@pytest.mark.parametrize(
    "out",
    [
        np.zeros((3, 4), np.int64),
        np.zeros((3, 3), np.int32),
        np.zeros((4, 3), np.int32).T,
        np.zeros(12, np.int32),
    ],
)
def test_philox_fill_refuses(out: np.ndarray, native: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"\[core.philox\] out: expected"):
        native.philox_fill(0, 0, 0, out)
