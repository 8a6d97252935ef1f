"""What the front doors of this room share: the choice of an implementation, seeds, lengths, outputs."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..front import arrays, check, environment
from ..front.impl import on_cpu, on_cuda
from ._law import Law, packed_number
from ._seeds import check_stream as check_stream
from ._seeds import drawn

WITH_CUDA = {"cuda": on_cuda, "cpu": on_cpu, "reference": on_cpu}


def check_lengths(op: str, name: str, lengths: Any, batch: int, most: int, like: Any) -> None:
    if lengths is None:
        return
    check.array(op, name, lengths, arrays.INTEGERS, 1)
    check.same_place(op, name, lengths, "the other arrays", like)
    check.shape(op, name, lengths, (batch,))
    if environment.checks_on():
        n = arrays.to_numpy(lengths)
        check.refuse(op, name, n, (n < 0) | (n > most), f"0 to {most}", check.UNSET)


def packed_stream(seed: Any, offset: Any, batch: int, like: Any) -> tuple[Any, Any]:
    if type(seed) is int and type(offset) is int:
        return seed, offset
    seed = drawn(seed, batch, like)
    return (
        int(seed) if isinstance(seed, (int, np.integer)) else arrays.dense(seed),
        int(offset) if isinstance(offset, (int, np.integer)) else arrays.dense(offset),
    )


def packed_lengths(lengths: Any, most: int) -> Any:
    return most if lengths is None else packed_number(lengths, "int64")


def check_draft(op: str, draft: Law, target: Law, rows: int) -> None:
    """A draft law over the same place, requests and vocabulary as the target, with enough rows."""
    check.same_place(op, "draft_probs", draft.values, "target_probs", target.values)
    shape, wanted = tuple(draft.values.shape), tuple(target.values.shape)
    if shape[0] != wanted[0] or shape[1] < rows or shape[-1] != wanted[-1]:
        raise ValueError(
            f"[{op}] draft_probs: expected shape ({wanted[0]}, {rows}, {wanted[-1]}), got {shape}."
        )
