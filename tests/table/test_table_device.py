# SPDX-License-Identifier: Apache-2.0
"""What a table says of devices where there is none to use: without a GPU, and without a build for one."""

from __future__ import annotations

import copy
import types

import numpy as np
import pytest
from hotloop.front import native
from hotloop.table import Table, _device
from table_checks import grouped, refused


def without(monkeypatch: pytest.MonkeyPatch, module: object) -> None:
    monkeypatch.setitem(vars(native), "cuda", module)


NO_DEVICE = types.SimpleNamespace(device_count=lambda: 0)
DEVICES = {
    NotImplementedError: [
        (None, "cuda:1", "device: expected a build with hotloop._cuda for cuda:1, got one without"),
    ],
    RuntimeError: [(NO_DEVICE, "cuda:0", "device: expected one of 0 CUDA device(s), got cuda:0")],
    ValueError: [
        (None, device, 'device: expected "cpu", "cuda" or "cuda:<index>"')
        for device in ("gpu", "cuda:x", "cuda:-1", "cpu:1", 0, "cuda:²")
    ],
}


@pytest.mark.parametrize(("kind", "module", "device", "text"), grouped(DEVICES))
def test_devices_that_cannot_be_used(monkeypatch, kind, module, device, text):
    without(monkeypatch, module)
    with refused(f"[Table] {text}", kind):
        Table(4, device=device)


def test_int8_rows_stay_on_the_cpu(monkeypatch):
    without(monkeypatch, None)
    text = "[Table] dtype: expected float32, … on cuda:0, got int8"
    with refused(text, NotImplementedError):
        Table(4, dtype="int8", device="cuda:0")


@pytest.mark.parametrize("device", [None, "cpu"])
def test_the_cpu_never_asks_for_cuda(monkeypatch, device):
    def asked(name: str) -> None:
        raise AssertionError("a table on the CPU loaded the CUDA module")

    native.core.simd_level()  # loaded before
    monkeypatch.delitem(vars(native), "cuda", raising=False)
    monkeypatch.setattr(native, "__getattr__", asked)
    table = Table(2, device=device)
    assert table.device == "cpu"
    keys = np.array([3, -1])
    table.insert_or_assign(keys, np.ones((2, 2), np.float32))
    assert table.find(keys).found.all()
    assert copy.deepcopy(table).device == "cpu"
    assert table.quantized("float16").find(keys).values.tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_filters_answer_in_bytes():
    """How a table on a device asks a filter, which lives on the host."""
    from hotloop.table import CountFilter

    assert _device._asked(None) is None
    keys, counts = np.array([5, 6], np.int64), np.array([1, 3], np.uint32)
    counter = CountFilter(100, threshold=1)
    ask = _device._asked((counter._native, counter.threshold))
    assert ask(keys.tobytes(), counts.tobytes()) == b"\0\0"
    assert ask(keys.tobytes(), counts.tobytes()) == b"\1\1"
    always = _device._asked((7, 1, 0.0, False))
    assert always(keys.tobytes(), counts.tobytes()) == b"\1\1"
    likely = _device._asked((7, 1, 3.0, False))
    many = np.arange(3000, dtype=np.int64)
    let_in = np.frombuffer(likely(many.tobytes(), np.ones(3000, np.uint32).tobytes()), np.uint8)
    assert 850 < let_in.sum() < 1150


@pytest.mark.parametrize("fits", [True, False])
def test_a_batch_that_did_not_fit_was_not_seen(fits):
    from hotloop.table import CountFilter

    class Full(Exception):
        pass

    class FakeTable:
        def __init__(self, *_: object) -> None:
            pass

        def upsert(self, n, keys, values, moment, ask, keep, rows, found):
            assert ask(keys.tobytes(), np.ones(n, np.uint32).tobytes()) == b"\0\0"
            if not fits:
                raise Full
            return 0

    settings = {"max_rows": 1, "strategy": "none"}
    module = types.SimpleNamespace(table=types.SimpleNamespace(Table=FakeTable, TableFull=Full))
    table = _device.DeviceTable(module, settings, 0)
    counter, keys = CountFilter(100, threshold=1), np.array([5, 6], np.int64)
    counter.add(np.array([5]))
    admission = (counter._native, 9)
    if fits:
        table.upsert(2, keys, None, None, admission, False, None, None)
        assert counter.add(keys).tolist() == [2, 1]
    else:
        with pytest.raises(Full):
            table.upsert(2, keys, None, None, admission, False, None, None)
        assert counter.add(keys).tolist() == [1, 0]


@pytest.mark.parametrize("checks", [False, True])
def test_gradients_on_a_device_are_looked_at_only_where_checks_are_on(monkeypatch, checks):
    """Whoever asks whether all are finite waits for the device; a meta tensor cannot be asked at all."""
    torch = pytest.importorskip("torch")
    from hotloop.table import _convert

    monkeypatch.setenv("HOTLOOP_CHECK", "1" if checks else "0")
    grads = torch.ones(2, 3, device="meta")
    if checks:
        with pytest.raises(RuntimeError, match="meta"):
            _convert.check_gradients("Table.update", grads, torch.arange(2))
    else:
        _convert.check_gradients("Table.update", grads, torch.arange(2))


@pytest.mark.parametrize("update", ["backward", "step"])
def test_only_step_counts_on_a_device(monkeypatch, update):
    torch = pytest.importorskip("torch")
    from hotloop.table import SGD, HashEmbedding, _store

    module, asked = HashEmbedding(2, optimizer=SGD(), update=update), []
    moved = _store.Store._update

    def noted(self, *args):
        asked.append(len(args) == 7 or args[7])
        return moved(self, *args)

    monkeypatch.setattr(_store.Store, "_update", noted)
    module(torch.arange(3)).sum().backward()
    module.step()
    assert asked == [update == "step"]
