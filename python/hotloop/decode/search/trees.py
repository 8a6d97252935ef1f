# SPDX-License-Identifier: Apache-2.0
"""Tree searches in place: MCTS* and PUCT."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ...front import arrays, check, native
from ...front.check import integer, number
from ...front.impl import Impl, choose
from ...reference.decode import search as reference
from ...reference.decode.results import PuctStep, PuctTree, StarStep, StarTree
from ...vocabulary import like
from .checks import check_tree, nodes_in_use


def mcts_star_step(
    tree: StarTree,
    leaves: Any = None,
    rollout_values: Any = None,
    starts: Any = None,
    roots: Any = None,
    *,
    c: float = 0.7,
    alpha: float = 0.5,
    unvisited_bonus: float = math.inf,
    end_gate: float = 0.9,
    max_depth: int | None = None,
    seed: int | None = None,
    offset: int = 0,
    impl: Impl = "auto",
) -> StarStep:
    """Back up what was evaluated and select the next node, in each of B trees (MCTS*). Updates the tree in place.

    Backup from leaf l with rollout value r: V_l <- (1 - alpha) V_l + alpha r, N_l += 1; then for each node above it up
    to the root: N += 1, V = sum_c V_c N_c / sum_c N_c over its children (V stays if none was visited). Without r a
    leaf is treated like the nodes above it. Select, from the start: while the node has children go to
    argmax_c V_c + c sqrt(2 ln N / N_c); unvisited children come first, by V. Ties go to the lowest index, or to one
    drawn with ``seed``. An iteration is: select; append children with the model's values; select with ``starts`` = the
    expanded node for the child to roll out; roll out; back up, which also selects the next node.

    Args:
        tree: ``StarTree``; float32 or float64 values, int64 or int32 parents and visits, any strides.
        leaves: node to back up from in each tree, -1 for none, (B,) integers. Default None: only select.
        rollout_values: r, (B,) floats, NaN for none. Default None.
        starts: node to select from, -1 for none, (B,) integers. Default: the roots.
        roots: node at which backing up ends and from which depth is counted, (B,) integers. Default node 0.
        c: exploration constant, >= 0. Default 0.7.
        alpha: weight of the rollout, in [0, 1]. Default 0.5.
        unvisited_bonus: added to V of an unvisited child; infinity (default) puts all of them first. The authors' code
            has 1.0, so that a visited child with a large bonus can go before them.
        end_gate: value from which a selected node counts as solved. Default 0.9.
        max_depth: greatest depth selected, >= 0. Default None: no limit.
        seed: draws ties with Philox, from 0 to 2^64 - 1. Default None: the lowest index.
        offset: position of this call in the seed's stream, >= 0: count the calls. Default 0.
        impl: "auto", "cpu" or "reference". Default "auto".

    Returns:
        ``StarStep``: nodes, depths, and whether V >= end_gate there.

    Raises:
        TypeError: not an array, a wrong dtype, or arrays of two libraries.
        ValueError: shapes do not fit, a node is not in the tree, or a number is out of range. The tree is unchanged.
        NotImplementedError: the forced impl cannot run these inputs.

    Examples:
        >>> import numpy as np
        >>> tree = StarTree(np.array([[-1, 0, 0]]), np.array([[0.0, 0.4, 0.6]]), np.zeros((1, 3), int))
        >>> child = mcts_star_step(tree).nodes
        >>> step = mcts_star_step(tree, child, np.array([0.8]))
        >>> child.tolist(), tree.values.round(2).tolist(), step.nodes.tolist()
        ([2], [[0.7, 0.4, 0.7]], [1])

    Reference:
        Zhang et al. 2024, ReST-MCTS*, arXiv:2406.03816, and the published code.
    """
    op = "mcts_star_step"
    check.instance(op, "tree", tree, StarTree, hint="Use StarTree(...).")
    parents = check_tree(op, tree, ("values",), ("visits",))
    numbers = (
        number(op, "c", c, at_least=0),
        number(op, "alpha", alpha, at_least=0, at_most=1),
        number(op, "unvisited_bonus", unvisited_bonus, at_least=0, at_most=math.inf),
        number(op, "end_gate", end_gate),
    )
    depth = -1 if max_depth is None else integer(op, "max_depth", max_depth, at_least=0)
    key = None if seed is None else integer(op, "seed", seed, at_least=0, at_most=2**64 - 1)
    place = integer(op, "offset", offset, at_least=0, at_most=2**64 - 1)
    places = nodes_in_use(op, parents, tree.parents, leaves, roots, starts)
    rollouts = None
    if rollout_values is not None:
        if leaves is None:
            raise ValueError(
                f"[{op}] rollout_values: expected leaves too, got None for them. Pass leaves."
            )
        like_trees = ((parents.shape[0],), "tree.parents", tree.parents)
        check.alike(op, "rollout_values", rollout_values, arrays.FLOATS, *like_trees)
        rollouts = arrays.dense(arrays.to_numpy(rollout_values), "float64")
    if choose(op, impl, "tree.parents", tree.parents) == "reference":
        return reference.mcts_star_step(
            tree, leaves, rollout_values, starts, roots, c=c, alpha=alpha, unvisited_bonus=unvisited_bonus,
            end_gate=end_gate, max_depth=max_depth, seed=seed, offset=offset,
        )  # fmt: skip
    trees = parents.shape[0]
    found = (np.empty(trees, np.int64), np.empty(trees, np.int64), np.empty(trees, bool))
    native.core.decode.star_step(tuple(tree), places, rollouts, depth, numbers, key, place, found)
    return StarStep(*(arrays.from_numpy(x, tree.parents) for x in found))


@like(mcts_star_step)
def puct_select_backup(
    tree: PuctTree,
    leaves: Any = None,
    starts: Any = None,
    roots: Any = None,
    *,
    c_puct: float = 1.0,
    gamma: float = 1.0,
    length_penalty: float = 1.25,
    max_depth: int | None = None,
    impl: Impl = "auto",
) -> PuctStep:
    """Back up what was evaluated and select the next node, in each of B trees (MCTS-DPO). Updates the tree in place.

    With r = value - value of the parent: backup sets Q = r + gamma V and N += 1 at the leaf; then, for each node above
    it up to the root, V = sum_c max(1, N_c) Q_c / sum_c max(1, N_c) over its children, N += 1, Q = r + gamma V. Select,
    from the start: while the node has children go to argmax_c Q_c + c_puct p_c sqrt(N) / (1 + N_c), p_c =
    exp(logp_c / length_c^length_penalty); ties to the lowest index. As in the authors' code Q of node 0 changes only
    when it is the leaf. They count one more visit of the root before each iteration; add it to ``visits`` for the same.

    Args:
        tree: ``PuctTree``; float32 or float64 and int64 or int32 arrays, any strides.
        c_puct: exploration constant, >= 0. Default 1.
        gamma: discount, in [0, 1]. Default 1.
        length_penalty: exponent of the length, >= 0; 1 is the mean log-probability. Default 1.25.
        max_depth: greatest depth selected, >= 0; the paper searches to 5. Default None: no limit.

    Returns:
        ``PuctStep``: nodes and depths.

    Examples:
        >>> values = np.array([[0.0, 0.2, 0.6]])
        >>> counts, logps = np.zeros((1, 3), int), np.full((1, 3), -1.0)
        >>> tree = PuctTree(np.array([[-1, 0, 0]]), values.copy(), 0 * values, counts, values, logps, counts + 1)
        >>> leaf = puct_select_backup(tree).nodes
        >>> _ = puct_select_backup(tree, leaf)
        >>> leaf.tolist(), tree.visits.tolist(), tree.v.round(2).tolist()
        ([2], [[1, 0, 1]], [[0.4, 0.0, 0.0]])

    Reference:
        Xie et al. 2024, MCTS-DPO, arXiv:2405.00451, and the published code.
    """
    op = "puct_select_backup"
    check.instance(op, "tree", tree, PuctTree, hint="Use PuctTree(...).")
    parents = check_tree(op, tree, ("q", "v"), ("visits",), ("values", "logps"), ("lengths",))
    numbers = (
        number(op, "c_puct", c_puct, at_least=0),
        number(op, "gamma", gamma, at_least=0, at_most=1),
        number(op, "length_penalty", length_penalty, at_least=0),
    )
    depth = -1 if max_depth is None else integer(op, "max_depth", max_depth, at_least=0)
    places = nodes_in_use(op, parents, tree.parents, leaves, roots, starts)
    if choose(op, impl, "tree.parents", tree.parents) == "reference":
        return reference.puct_select_backup(
            tree,
            leaves,
            starts,
            roots,
            c_puct=c_puct,
            gamma=gamma,
            length_penalty=length_penalty,
            max_depth=max_depth,
        )
    found = (np.empty(parents.shape[0], np.int64), np.empty(parents.shape[0], np.int64))
    native.core.decode.puct_step(tuple(tree), places, depth, numbers, found)
    return PuctStep(*(arrays.from_numpy(x, tree.parents) for x in found))
