# SPDX-License-Identifier: Apache-2.0
"""Errors and warnings of hash modules: arguments of ``nn.Embedding``, misspelt ones, training that teaches nothing."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ..front.keywords import refusal
from .hashing import salted_hash_bucket

_F = TypeVar("_F", bound=Callable[..., None])

_CURES = {
    "num_embeddings": "Leave it out: every id gets a row when training first meets it (max_capacity=... bounds them).",
    "sparse": "Leave it out: gradients are sparse, and optimizer=... applies them.",
    "lr": "Give it to the row optimizer: optimizer=SGD(lr=...).",
    "max_norm": "Rows are not renormalised: bound gradients by TableOptimizer.clip_grad_norm_, or take a weight_decay.",
    "norm_type": "Rows are not renormalised: leave it out.",
    "scale_grad_by_freq": "Gradients of repeated ids are summed: leave it out.",
    "_weight": "Make the module, then table.insert_or_assign(ids, rows).",
    "_freeze": "Make the module, then requires_grad_(False).",
}


def answers(init: _F) -> _F:
    """Refuse what ``init`` does not take in the name of the class that was called."""
    names = tuple(inspect.signature(init).parameters)[1:]

    @functools.wraps(init)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        op = type(self).__name__
        if len(args) > 1:
            raise TypeError(
                f"[{op}] num_embeddings: expected embedding_dim alone and keywords, got {args!r}. "
                f"A hash table has no number of rows: {op}({args[1]!r}, ...) if that is the width."
            )
        unknown = next((n for n in kwargs if n not in names), None)
        if unknown is not None and type(self).__init__ is wrapped:
            raise TypeError(refusal(op, unknown, names, _CURES.get(unknown)))
        init(self, *args, **kwargs)

    return cast(_F, wrapped)


def renamed(op: str, error: Exception) -> Exception:
    """An error of ``Table`` in the name of the module that makes one."""
    text = str(error).removeprefix("[Table] ")
    if text.startswith("dim:"):
        text = "embedding_" + text
    return type(error)(f"[{op}] {text}")


def stays_here(op: str, what: str) -> Exception:
    return NotImplementedError(
        f"[{op}] module: expected to run in this process, got {what}: a program would hold rows of now, or the number "
        "of a table that another process does not have. Look rows up before (the module in eval(), or table.find), and "
        f"give {what} the model behind."
    )


def warn_untaught(op: str) -> None:
    warnings.warn(
        f"[{op}] optimizer: expected a row optimizer in train(), got None: rows learn nothing whatever optimizer of "
        "torch there is, and unknown ids get no row and give zeros. Pass optimizer=..., or say eval() or "
        "requires_grad_(False) to serve.",
        stacklevel=7,
    )


def warn_unreduced(op: str, ids: Tensor) -> bool:
    """Say once that DDP does not reduce rows; whether it is settled that it does not matter or has been said.

    Nothing to say where this rank holds its own shard of the ids, by ``salted_hash_bucket``, as docs/table.md shows.
    """
    ddp: Any = DistributedDataParallel._get_active_ddp_module()
    if ddp is None or not ids.numel():
        return False
    world, rank = ddp.process_group.size(), ddp.process_group.rank()
    if world > 1 and not bool((salted_hash_bucket(ids, world) == rank).all()):
        warnings.warn(
            f"[{op}] input: expected the shard of ids of rank {rank} of {world} under DistributedDataParallel, got "
            "ids of other ranks: rows are no parameters, so DDP does not reduce them, and every rank trains its own. "
            "Exchange the ids as docs/table.md shows, or set module.sharded = True if they are divided in another way.",
            stacklevel=7,
        )
    return True
