# SPDX-License-Identifier: Apache-2.0
"""Checks that the searches share: trees whose nodes may be written, and nodes that are in use."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...front import arrays, check, environment
from ...reference.decode.results import PuctTree, StarTree

TREE_FLOATS = ("float32", "float64")
FLAGS = ("bool", "uint8")


def check_tree(
    op: str,
    tree: StarTree | PuctTree,
    reals: tuple[str, ...],
    counts: tuple[str, ...],
    fixed_reals: tuple[str, ...] = (),
    fixed_counts: tuple[str, ...] = (),
) -> np.ndarray:
    """Check every array of a tree, the first two groups for being writable, and return the parents."""
    check.array(op, "tree.parents", tree.parents, arrays.INTEGERS, 2)
    shape = tuple(int(n) for n in tree.parents.shape)
    for name in (*reals, *counts, *fixed_reals, *fixed_counts):
        x, whole = getattr(tree, name), name in counts or name in fixed_counts
        dtypes = arrays.INTEGERS if whole else TREE_FLOATS
        check.alike(op, f"tree.{name}", x, dtypes, shape, "tree.parents", tree.parents)
        if name in reals or name in counts:
            check.writable(op, f"tree.{name}", x)
    if arrays.device(tree.parents) != "cpu":
        return np.empty(shape, np.int64)
    parents = arrays.to_numpy(tree.parents)
    check.refuse(op, "tree.parents", parents, (parents < -1) | (parents >= np.arange(shape[1])),
            "-1 or an earlier node (-1 at node 0)", "Append children after their parent.")  # fmt: skip
    for name in counts:
        x = arrays.to_numpy(getattr(tree, name))
        check.refuse(op, f"tree.{name}", x, x < 0, "counts >= 0", "New nodes have 0.")
    for name in fixed_counts:
        x = arrays.to_numpy(getattr(tree, name))
        check.refuse(op, f"tree.{name}", x, (x < 1) & (parents >= 0), "at least one token per node")
    if environment.checks_on():
        for name in (*reals, *fixed_reals):
            x = arrays.to_numpy(getattr(tree, name))
            bad = ~np.isfinite(x) & ((parents >= 0) | (np.arange(shape[1]) == 0))
            check.refuse(op, f"tree.{name}", x, bad, "finite values", check.UNSET)
    return parents


def nodes_in_use(
    op: str, parents: np.ndarray, like: Any, leaves: Any, roots: Any, starts: Any
) -> tuple[Any, ...]:
    """(leaves, roots, starts) as the compiled loop takes them; each node is one in use."""
    found: list[Any] = []
    trees, slots = parents.shape
    for name, value, least in (("leaves", leaves, -1), ("roots", roots, 0), ("starts", starts, -1)):
        if value is None:
            found.append(None)
            continue
        check.alike(op, name, value, arrays.INTEGERS, (trees,), "tree.parents", like)
        x = (
            arrays.dense(arrays.to_numpy(value), "int64")
            if arrays.device(value) == "cpu"
            else np.zeros(trees, np.int64)
        )
        inside = (x >= least) & (x < slots)
        if slots > 0:
            inside &= (x <= 0) | (parents[np.arange(trees), np.clip(x, 0, slots - 1)] >= 0)
        wanted = "a node in use" if least == 0 else "a node in use, or -1 for none"
        check.refuse(op, name, x, ~inside, wanted, "Pass indices of the tree's nodes.")
        found.append(x)
    return tuple(found)
