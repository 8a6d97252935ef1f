# SPDX-License-Identifier: Apache-2.0
"""Segment reductions: errors. Those in compiled graphs: tests/test_values_under_compile.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hotloop import core
from refusals import Table, assert_refused, refused
from segment_cases import NAMES, ours

CUBE = torch.zeros(1, 1, 3)
X, IDS, CUTS = torch.zeros(3), torch.tensor([0, 1, 1]), torch.tensor([0, 1, 3])
RISE = "expected offsets that rise from 0 to 3, the number of values, got"


def by_ids(ids: Any, count: Any) -> dict[str, Any]:
    return {"cu_seqlens": None, "segment_ids": ids, "num_segments": count}


WRONG: Table = {
    r"values: expected 1 or 2 or 3 dimension\(s\), got shape \(\)": X[0],
    r"values: expected 1 or 2 dimension\(s\) beside cu_seqlens or segment_ids, got shape \(1, 1, 3\)": CUBE,
    "segment_ids: expected None beside cu_seqlens, got an array": IDS,
    "cu_seqlens: expected offsets, or segment_ids, or a mask over": None,
    "num_segments: expected None without segment_ids, got 2": 2,
    "num_segments: expected the number of groups beside segment_ids, got None": by_ids(IDS, None),
    "num_segments: expected an integer >= 0 and <= 4611686018427387904, got -1": by_ids(IDS, -1),
    r"segment_ids: expected shape \(3,\), got \(2,\)": by_ids(IDS[:2], 2),
    r"segment_ids: expected 0 to 0, got 1 at \[1\] \(2 of 3\)": by_ids(IDS, 1),
    r"segment_ids: expected 0 to 1, got -1 at \[0\] \(1 of 3\)": by_ids(
        IDS - torch.tensor([1, 0, 0]), 2
    ),
    r"segment_ids: expected 0 to -1, got 0 at \[0\]": by_ids(IDS, 0),
    r"cu_seqlens: expected 1 dimension\(s\), got shape \(1, 3\)": CUTS[None],
    r"cu_seqlens: expected shape \(segments \+ 1,\), got \(0,\)": CUTS[:0],
    rf"cu_seqlens: {RISE} \[0, 2, 1, 3\]": torch.tensor([0, 2, 1, 3]),
    rf"cu_seqlens: {RISE} \[1, 3\]": CUTS[1:],
    rf"cu_seqlens: {RISE} \[0, 1\]": CUTS[:2],
    rf"cu_seqlens: {RISE} \[{'0, ' * 8}'...', 0, 0, 0, 0\]": torch.zeros(30, dtype=torch.int64),
    r"mask: expected shape \(3,\) like the rows of values, got \(2,\)": IDS[:2],
    r"mask: expected values \(B, T\) or \(B, T, d\) and a mask \(B, T\), got values \(3,\) and mask \(3,\)": {
        "cu_seqlens": None,
        "mask": IDS,
    },
    "impl: expected one of auto, reference, cpu, cuda, triton, got 'gpu'": "gpu",
}
WRONG_TYPES: Table = {
    "values: expected a NumPy, torch or CuPy array, got list": [1.0],
    "values: expected dtype float32": IDS,
    "segment_ids: expected dtype int64, int32, got float32": by_ids(X, 2),
    "cu_seqlens: expected dtype int64, int32, got float32": X,
    "mask: expected dtype bool, uint8, int32, int64, got float32": X,
    "cu_seqlens: expected a torch array like values, got numpy": CUTS.numpy(),
}


@pytest.mark.parametrize("impl", ["auto", "reference"])
@refused(WRONG, WRONG_TYPES)
def test_errors(changes: dict[str, Any], kind: type[Exception], text: str, impl: str) -> None:
    arguments = {"values": X, "cu_seqlens": CUTS, "impl": impl, **changes}
    for name in NAMES:
        assert_refused(ours(name), arguments, kind, text)


def test_impl_that_cannot_run() -> None:
    with pytest.raises(
        NotImplementedError,
        match=r"no implementation fits values \(3,\) float32 on cpu with impl='triton'",
    ):
        core.segment_sum(X, CUTS, impl="triton")
    with pytest.raises(ValueError, match=r"cu_seqlens: expected device meta like values, got cpu"):
        core.segment_sum(X.to("meta"), CUTS)


def test_checks_look_for_infinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOTLOOP_CHECK", "1")
    x = torch.tensor([1.0, np.inf, np.nan])
    with pytest.raises(
        ValueError,
        match=r"^\[segment_sum\] values: expected finite values, got inf at \[1\] \(2 of 3\)",
    ):
        core.segment_sum(x, CUTS)
    assert core.segment_max(x, CUTS)[0] == 1.0
    assert core.segment_sum(x, CUTS, mask=torch.tensor([1, 0, 0])).tolist() == [1.0, 0.0]
