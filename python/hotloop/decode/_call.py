# SPDX-License-Identifier: Apache-2.0
"""What the front doors of this room share: checks of drafts, seeds and lengths, and outputs."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..front import arrays, check, environment
from ..front.check import integer
from ..front.impl import on_cpu, on_cuda
from ..reference.decode.draws import drawn, is_generator
from ..reference.decode.law import Law
from ..reference.decode.results import Verified
from .law import check_ids, check_law, packed_number

WITH_CUDA = {"cuda": on_cuda, "cpu": on_cpu, "reference": on_cpu}


Drafted = tuple[Any, Any, Any, Any, Any, Any]
"""A drafted chain or tree as the caller passed it: ids, laws of target and draft, lengths, seed, offset."""


def check_drafted(
    op: str, drafted: Drafted, *, target_name: str = "target_probs", tree: bool = False
) -> tuple[Any, Law, Law | None]:
    """(ids, target, draft) of a verification, checked: a chain of K tokens, or a tree of M nodes.

    The target has one row more than tokens. The draft has one per token of a chain; of a tree as many as the target.
    """
    ids, target_law, draft_law, lengths, seed, offset = drafted
    target = check_law(op, target_name, target_law, 3)
    check.array(op, "draft_token_ids", ids, arrays.INTEGERS, 2)
    check.same_place(op, "draft_token_ids", ids, target_name, target.values)
    batch, n = map(int, ids.shape)
    vocabulary = int(target.values.shape[2])
    why = "for that many nodes" if tree else "for that many draft tokens"
    check.shape(op, target_name, target.values, (batch, n + 1, vocabulary), why)
    draft = None
    if draft_law is not None:
        draft = check_law(op, "draft_probs", draft_law, 3)
        check.same_place(op, "draft_probs", draft.values, target_name, target.values)
        shape, rows = tuple(map(int, draft.values.shape)), n + tree
        if shape[0] != batch or shape[1] < rows or shape[2] != vocabulary:
            raise ValueError(
                f"[{op}] draft_probs: expected shape ({batch}, {rows}, {vocabulary}), got {shape}."
            )
    check_lengths(op, "num_nodes" if tree else "num_draft_tokens", lengths, batch, n, ids)
    check_stream(op, seed, offset, batch, ids)
    if environment.checks_on():
        check_ids(op, "draft_token_ids", ids, vocabulary)
    return ids, target, draft


def check_stream(op: str, seed: Any, offset: Any, batch: int, like: Any) -> None:
    """Seeds and offsets: an int for all requests, or int64 arrays (B,); a seed may also be None or a generator."""
    # Plain numbers first: small calls pass them, and count microseconds.
    if type(seed) is int and 0 <= seed < 2**64:
        pass
    elif is_generator(seed):
        _check_generator(op, seed, like)
    elif seed is not None:
        _check(op, "seed", seed, 2**64 - 1, batch, like)
    if not (type(offset) is int and 0 <= offset < 2**63):
        _check(op, "offset", offset, 2**63 - 1, batch, like)


def _check(op: str, name: str, value: Any, most: int, batch: int, like: Any) -> None:
    if isinstance(value, (int, np.integer)):
        integer(op, name, value, at_least=0, at_most=most)
        return
    check.array(op, name, value, ("int64",), 1)
    check.same_place(op, name, value, "the other arrays", like)
    if tuple(value.shape) != (batch,):
        raise ValueError(
            f"[{op}] {name}: expected an integer or shape ({batch},), got shape {tuple(value.shape)}."
        )


def _check_generator(op: str, generator: Any, like: Any) -> None:
    got = f"{type(generator).__module__}.{type(generator).__name__}"
    if isinstance(like, np.ndarray):
        if not isinstance(generator, (np.random.Generator, np.random.RandomState)):
            raise TypeError(
                f"[{op}] seed: expected a numpy.random.Generator for NumPy arrays, got {got}. "
                "Use numpy.random.default_rng(...)."
            )
        return
    if arrays.kind(like) == "cupy":
        raise TypeError(
            f"[{op}] seed: expected an integer, an int64 array or None for CuPy arrays, got {got}. "
            "Leave it out and call cupy.random.seed(...)."
        )
    if not hasattr(generator, "device"):
        raise TypeError(
            f"[{op}] seed: expected a torch.Generator for torch tensors, got {got}. "
            "Use torch.Generator(device=...)."
        )
    if generator.device.type != like.device.type:
        raise ValueError(
            f"[{op}] seed: expected a generator on {like.device} like the other arrays, got one on "
            f"{generator.device}. Use torch.Generator(device={str(like.device)!r})."
        )


def check_lengths(op: str, name: str, lengths: Any, batch: int, most: int, like: Any) -> None:
    if lengths is None:
        return
    check.alike(op, name, lengths, arrays.INTEGERS, (batch,), "the other arrays", like)
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


def verified_like(ids: Any, batch: int, width: int) -> Verified:
    """Outputs of a verification, to be written, in the place of ``ids``."""
    return Verified(
        arrays.empty(ids, (batch, width), arrays.dtype(ids)),
        arrays.empty(ids, (batch,), "int64"),
        arrays.empty(ids, (batch, width), "float32"),
        arrays.empty(ids, (batch,), "int64"),
    )
