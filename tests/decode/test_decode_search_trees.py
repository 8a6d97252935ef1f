# SPDX-License-Identifier: Apache-2.0
"""Both tree searches: hand examples, programs with one object per node, laws, ties as a distribution."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from decode_calls import both, kinds, make
from helpers import strided, with_threads
from hotloop.decode import PuctTree, StarTree
from hotloop.decode import search as s
from hypothesis import given, settings
from hypothesis import strategies as st


def random_parents(
    rng: np.random.Generator, trees: int, slots: int, holes: float = 0.1
) -> np.ndarray:
    """Trees of all shapes and sizes, with slots that are not in use."""
    parents = np.full((trees, slots), -1)
    for b in range(trees):
        used = [0]
        for i in range(1, int(rng.integers(1, slots + 1))):
            if rng.random() < holes:
                continue
            parents[b, i] = used[int(rng.integers(max(0, len(used) - 6), len(used)))]
            used.append(i)
    return parents


def used_nodes(parents: np.ndarray) -> list[int]:
    return [0, *np.flatnonzero(parents >= 0).tolist()]


def random_star(
    rng: np.random.Generator, trees: int, slots: int, real: Any, whole: Any, coarse: bool
) -> StarTree:
    values = rng.random((trees, slots))
    values = np.round(values * 4) / 4 if coarse else values
    visits = rng.integers(0, 4, (trees, slots))
    return StarTree(
        random_parents(rng, trees, slots).astype(whole), values.astype(real), visits.astype(whole)
    )


def random_puct(
    rng: np.random.Generator, trees: int, slots: int, real: Any, whole: Any, coarse: bool
) -> PuctTree:
    shape = (trees, slots)
    q, v, values, logps = (rng.standard_normal(shape).astype(real) for _ in range(4))
    if coarse:
        q, logps = np.round(q), np.zeros_like(logps)
    visits, lengths = rng.integers(0, 4, shape), rng.integers(1, 20, shape)
    whole_arrays = [x.astype(whole) for x in (random_parents(rng, trees, slots), visits, lengths)]
    return PuctTree(whole_arrays[0], q, v, whole_arrays[1], values, -np.abs(logps), whole_arrays[2])


def random_nodes(rng: np.random.Generator, parents: np.ndarray, least: int) -> np.ndarray:
    choices = [used_nodes(p) + ([-1] if least < 0 else []) for p in parents]
    return np.array([int(rng.choice(c)) for c in choices], int)


def copied(tree: Any) -> Any:
    return type(tree)(*(x.copy() for x in tree))


def equal(a: Any, b: Any) -> None:
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@kinds
@both
def test_star_hand_example_of_two_levels(kind: str, impl: str) -> None:
    """Root 0 with children 1 and 2; 2 has child 3, which is rolled out from 0.5 to (0.5 + 0.9) / 2."""
    tree = StarTree(
        make(kind, [[-1, 0, 0, 2]]),
        make(kind, [[0.5, 0.6, 0.4, 0.5]]),
        make(kind, [[3, 1, 1, 0]]),
    )
    step = s.mcts_star_step(tree, make(kind, [3]), make(kind, [0.9]), impl=impl)
    assert tree.visits.tolist() == [[4, 1, 2, 1]]
    assert tree.values[0].tolist() == pytest.approx([(0.6 * 1 + 0.7 * 2) / 3, 0.6, 0.7, 0.7])
    scores = [
        0.6 + 0.7 * math.sqrt(2 * math.log(4) / 1),
        0.7 + 0.7 * math.sqrt(2 * math.log(4) / 2),
    ]
    assert scores[0] > scores[1]
    assert (step.nodes.tolist(), step.depths.tolist(), step.ended.tolist()) == ([1], [1], [False])
    assert type(step.nodes).__module__.startswith(kind)
    assert s.mcts_star_step(tree, end_gate=0.6, impl=impl).ended.tolist() == [True]


@both
def test_a_single_child_gives_its_value_to_its_parent(impl: str) -> None:
    tree = StarTree(np.array([[-1, 0]]), np.array([[0.1, 0.3]]), np.zeros((1, 2), int))
    s.mcts_star_step(tree, np.array([1]), np.array([0.8]), alpha=0.25, impl=impl)
    assert tree.values[0, 0] == tree.values[0, 1] == pytest.approx(0.75 * 0.3 + 0.25 * 0.8)


@both
def test_star_leaf_without_rollout(impl: str) -> None:
    """A step that ended keeps its value; one whose children were all visited before takes their mean."""
    tree = StarTree(np.array([[-1, 0, 1]]), np.array([[0.0, 0.2, 0.8]]), np.array([[2, 2, 1]]))
    s.mcts_star_step(tree, np.array([2]), np.array([np.nan]), impl=impl)
    assert tree.visits.tolist() == [[3, 3, 2]]
    assert tree.values[0].tolist() == pytest.approx([0.8, 0.8, 0.8])
    fresh = StarTree(np.array([[-1, 0]]), np.array([[0.3, 0.9]]), np.array([[1, 0]]))
    s.mcts_star_step(fresh, np.array([0]), impl=impl)
    assert fresh.values.tolist() == [[0.3, 0.9]] and fresh.visits.tolist() == [[2, 0]]


@both
def test_unvisited_children_come_first_by_value(impl: str) -> None:
    tree = StarTree(
        np.array([[-1, 0, 0, 0]]), np.array([[0.0, 9.0, 0.1, 0.4]]), np.array([[5, 2, 0, 0]])
    )
    assert s.mcts_star_step(tree, impl=impl).nodes.tolist() == [3]
    assert s.mcts_star_step(tree, unvisited_bonus=1.0, impl=impl).nodes.tolist() == [1]
    assert s.mcts_star_step(tree, unvisited_bonus=10.0, c=0.0, impl=impl).nodes.tolist() == [3]
    tree.values[0, 3] = np.nan
    assert s.mcts_star_step(tree, impl=impl).nodes.tolist() == [2]


class StarNode:
    def __init__(self, value: float) -> None:
        self.value, self.visits, self.children = value, 0, []

    def best(self, c: float) -> int:
        fresh = [(child.value, -i) for i, child in enumerate(self.children) if child.visits == 0]
        if fresh:
            return -max(fresh)[1]
        n = max(self.visits, 1)
        bonus = [x.value + c * math.sqrt(2 * math.log(n) / x.visits) for x in self.children]
        return int(np.argmax(bonus))


@both
@pytest.mark.parametrize("seed", range(4))
def test_star_search_against_one_object_per_node(impl: str, seed: int) -> None:
    """Thirty iterations: select, expand by three, roll out the best new child, back up."""
    rng = np.random.default_rng(seed)
    slots, tree_of = 100, StarNode(0.0)
    tree = StarTree(np.full((1, slots), -1), np.zeros((1, slots)), np.zeros((1, slots), int))
    nodes, count = [tree_of], 1
    step = s.mcts_star_step(tree, impl=impl)
    for _ in range(30):
        path = [tree_of]
        while path[-1].children:
            path.append(path[-1].children[path[-1].best(0.7)])
        leaf = int(step.nodes[0])
        assert nodes[leaf] is path[-1] and int(step.depths[0]) == len(path) - 1
        for value in rng.random(3):
            child = StarNode(float(value))
            path[-1].children.append(child)
            nodes.append(child)
            tree.parents[0, count], tree.values[0, count] = leaf, value
            count += 1
        chosen = s.mcts_star_step(tree, starts=np.array([leaf]), impl=impl).nodes
        rolled = path[-1].children[path[-1].best(0.7)]
        assert nodes[int(chosen[0])] is rolled
        rollout = float(rng.random())
        rolled.value, rolled.visits = rolled.value * 0.5 + rollout * 0.5, rolled.visits + 1
        for node in reversed(path):
            node.visits += 1
            node.value = sum(x.value * x.visits for x in node.children) / sum(
                x.visits for x in node.children
            )
        step = s.mcts_star_step(tree, chosen, np.array([rollout]), impl=impl)
        assert tree.visits[0, :count].tolist() == [x.visits for x in nodes]
        np.testing.assert_allclose(tree.values[0, :count], [x.value for x in nodes], rtol=1e-14)


@kinds
@both
def test_puct_hand_example_of_depth_two(kind: str, impl: str) -> None:
    tree = PuctTree(
        parents=make(kind, [[-1, 0, 0, 1, 1, -1]]),
        q=make(kind, [[0.0, 0.3, 0.2, 0.5, -0.1, 9.0]]),
        v=make(kind, [[0.0, 0.0, 0.0, 0.1, 0.0, 0.0]]),
        visits=make(kind, [[4, 2, 1, 0, 0, 0]]),
        values=make(kind, [[0.1, 0.4, 0.3, 0.9, 0.3, 0.0]]),
        logps=make(kind, [[0.0, -1.0, -2.0, -0.5, -0.5, 0.0]]),
        lengths=make(kind, [[1, 2, 3, 1, 1, 0]]),
    )
    step = s.puct_select_backup(tree, make(kind, [3]), gamma=0.9, impl=impl)
    q3 = (0.9 - 0.4) + 0.9 * 0.1
    v1 = (1 * q3 + 1 * -0.1) / 2
    q1 = (0.4 - 0.1) + 0.9 * v1
    assert tree.visits.tolist() == [[5, 3, 1, 1, 0, 0]]
    v0 = (3 * q1 + 1 * 0.2) / 4  # node 1 has its third visit when its parent is averaged
    assert tree.v[0].tolist() == pytest.approx([v0, v1, 0.0, 0.1, 0.0, 0.0])
    assert tree.q[0].tolist() == pytest.approx([0.0, q1, 0.2, q3, -0.1, 9.0])
    p = [math.exp(-1.0 / 2**1.25), math.exp(-2.0 / 3**1.25)]
    scores = [q1 + p[0] * math.sqrt(5) / 4, 0.2 + p[1] * math.sqrt(5) / 2]
    below = [q3 + math.exp(-0.5) * math.sqrt(3) / 2, -0.1 + math.exp(-0.5) * math.sqrt(3) / 1]
    expected = (3 if below[0] > below[1] else 4) if scores[0] > scores[1] else 2
    assert step.nodes.tolist() == [expected]


@both
def test_puct_value_of_unvisited_children_is_their_plain_mean(impl: str) -> None:
    rng = np.random.default_rng(0)
    tree = random_puct(rng, 1, 6, np.float64, np.int64, False)
    tree.parents[:], tree.visits[:] = [[-1, 0, 0, 0, 0, 4]], 0
    s.puct_select_backup(tree, np.array([5]), impl=impl)
    assert tree.v[0, 4] == pytest.approx(tree.q[0, 5])
    assert tree.v[0, 0] == pytest.approx(tree.q[0, 1:5].mean())


class PuctNode:
    def __init__(self, parent: PuctNode | None, value: float, logp: float, length: int) -> None:
        self.parent, self.value, self.logp, self.length = parent, value, logp, length
        self.children: list[PuctNode] = []
        self.n, self.v = 0, 0.0
        self.q = 0.0 if parent is None else parent.v + self.reward

    @property
    def reward(self) -> float:
        return self.value - (self.parent.value if self.parent else 0.0)

    def score(self) -> float:
        p = math.exp(self.logp / self.length**1.25)
        return self.q + p * math.sqrt(self.parent.n) / (1 + self.n)


@both
@pytest.mark.parametrize("seed", range(4))
def test_puct_search_against_one_object_per_node(impl: str, seed: int) -> None:
    """The authors' iteration: one more visit of the root, then expand and back up all the way to the depth limit."""
    rng = np.random.default_rng(seed)
    slots, limit = 400, 4
    root = PuctNode(None, 0.0, 0.0, 1)
    real, whole = (lambda: np.zeros((1, slots))), (lambda: np.zeros((1, slots), int))
    tree = PuctTree(np.full((1, slots), -1), real(), real(), whole(), real(), real(), whole() + 1)
    nodes, count = [root], 1
    for _ in range(20):
        root.n += 1
        tree.visits[0, 0] += 1
        path = [root]
        while path[-1].children and len(path) <= limit:
            path.append(max(path[-1].children, key=PuctNode.score))
        leaf = s.puct_select_backup(tree, max_depth=limit, impl=impl).nodes
        assert nodes[int(leaf[0])] is path[-1]
        while len(path) <= limit:
            for value, logp in zip(rng.random(3), -3 * rng.random(3)):
                node, at = (
                    PuctNode(path[-1], float(value), float(logp), int(rng.integers(1, 9))),
                    int(leaf[0]),
                )
                path[-1].children.append(node)
                nodes.append(node)
                tree.parents[0, count], tree.q[0, count] = (
                    at,
                    tree.v[0, at] + value - tree.values[0, at],
                )
                tree.values[0, count], tree.logps[0, count] = value, logp
                tree.lengths[0, count] = node.length
                count += 1
            if len(path) > 1:
                back_up(path)
                leaf = s.puct_select_backup(
                    tree, leaf, starts=leaf, max_depth=limit, impl=impl
                ).nodes
            else:
                leaf = s.puct_select_backup(tree, starts=leaf, max_depth=limit, impl=impl).nodes
            path.append(max(path[-1].children, key=PuctNode.score))
            assert nodes[int(leaf[0])] is path[-1]
        back_up(path)
        s.puct_select_backup(tree, leaf, impl=impl)
        assert tree.visits[0, :count].tolist() == [x.n for x in nodes]
        np.testing.assert_allclose(tree.v[0, :count], [x.v for x in nodes], rtol=1e-13, atol=1e-13)
        np.testing.assert_allclose(tree.q[0, :count], [x.q for x in nodes], rtol=1e-13, atol=1e-13)


def back_up(path: list[PuctNode]) -> None:
    path[-1].q, path[-1].n = path[-1].reward + path[-1].v, path[-1].n + 1
    for node in reversed(path[:-1]):
        total = sum(max(1, x.n) for x in node.children)
        node.v = sum(max(1, x.n) * x.q for x in node.children) / total
        node.n += 1
        if node.parent is not None:
            node.q = node.reward + node.v


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 2**32), st.integers(0, 5), st.integers(0, 30), st.sampled_from([np.float32, np.float64]),
    st.sampled_from([np.int32, np.int64]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_random_trees_agree_with_the_reference(
    seed: int, trees: int, slots: int, real: Any, whole: Any, coarse: bool, star: bool
) -> None:
    """Bit for bit: both round where the arrays do, in the same order of children."""
    rng = np.random.default_rng(seed)
    tree: Any = (random_star if star else random_puct)(
        rng, trees, max(slots, 1), real, whole, coarse
    )
    if slots == 0:
        tree = type(tree)(*(x[:, :0] for x in tree))
        leaves = starts = roots = None
    else:
        leaves, starts = (random_nodes(rng, tree.parents, -1) for _ in range(2))
        roots = random_nodes(rng, tree.parents, 0)
    options: dict[str, Any] = {"max_depth": None if rng.random() < 0.5 else int(rng.integers(0, 4))}
    places: tuple[Any, ...] = (leaves, starts, roots)
    if star:
        rollouts = np.where(rng.random(trees) < 0.3, np.nan, rng.random(trees)).astype(real)
        places = (leaves, rollouts if leaves is not None else None, starts, roots)
        options |= {
            "seed": int(rng.integers(2**62)) if coarse else None,
            "offset": int(rng.integers(9)),
        }
        options["unvisited_bonus"] = 1.0 if rng.random() < 0.5 else math.inf
    op: Any = s.mcts_star_step if star else s.puct_select_backup
    ours, theirs = copied(tree), copied(tree)
    before = tree.visits.sum()
    found = op(ours, *places, impl="cpu", **options)
    equal(found, op(theirs, *places, impl="reference", **options))
    equal(ours, theirs)
    assert (ours.visits >= tree.visits).all() and ours.visits.sum() >= before
    equal((ours.parents,), (tree.parents,))
    for b, node in enumerate(found.nodes):
        assert node == -1 or node in used_nodes(tree.parents[b])


@both
@pytest.mark.parametrize("star", [True, False])
def test_backing_up_leaves_other_branches_and_trees_alone(star: bool, impl: str) -> None:
    rng = np.random.default_rng(7)
    tree: Any = (random_star if star else random_puct)(rng, 3, 40, np.float64, np.int64, False)
    tree.parents[1] = np.arange(40) - 1  # a chain
    op: Any = s.mcts_star_step if star else s.puct_select_backup
    after = copied(tree)
    op(after, np.array([-1, 39, -1]), roots=np.array([0, 30, 0]), impl=impl)
    for name in tree._fields:
        x, y = getattr(tree, name), getattr(after, name)
        assert np.array_equal(x[[0, 2]], y[[0, 2]]) and np.array_equal(x[1, :30], y[1, :30])
    assert (after.visits[1, 30:] - tree.visits[1, 30:]).tolist() == [1] * 10
    selected = op(
        after, starts=np.array([-1, 33, -1]), roots=np.array([0, 30, 0]), max_depth=5, impl=impl
    )
    assert selected.nodes.tolist() == [-1, 35, -1] and int(selected.depths[1]) == 5


@both
@pytest.mark.parametrize("star", [True, False])
def test_trees_in_torch_and_in_parts_of_larger_arrays(star: bool, impl: str) -> None:
    rng = np.random.default_rng(9)
    tree: Any = (random_star if star else random_puct)(rng, 4, 25, np.float32, np.int64, False)
    op: Any = s.mcts_star_step if star else s.puct_select_backup
    leaves = random_nodes(rng, tree.parents, -1)
    plain = copied(tree)
    found = op(plain, leaves, impl=impl)
    parts = type(tree)(*(np.repeat(np.repeat(x, 2, 0), 3, 1)[::2, ::3] for x in tree))
    tensors = type(tree)(*(strided(torch.from_numpy(x.copy())) for x in tree))
    columns = type(tree)(*(np.asfortranarray(x) for x in tree))
    for other, at in ((parts, leaves), (tensors, torch.from_numpy(leaves)), (columns, leaves)):
        equal(op(other, at, impl=impl), found)
        equal(other, plain)


def test_threads_do_not_change_trees() -> None:
    rng = np.random.default_rng(4)
    tree = random_puct(rng, 300, 100, np.float64, np.int64, False)
    leaves = random_nodes(rng, tree.parents, -1)
    one, two = copied(tree), copied(tree)
    equal(
        with_threads(1, lambda: s.puct_select_backup(one, leaves)),
        with_threads(2, lambda: s.puct_select_backup(two, leaves)),
    )
    equal(one, two)


def chi_square(counts: np.ndarray) -> float:
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum())


@both
def test_ties_are_drawn_evenly(impl: str) -> None:
    """Chi-square with 4 degrees of freedom, false alarm 1e-4 (23.5); draws that favour one child must fail it."""
    n = 2000 if impl == "cpu" else 400
    parents = np.tile([-1, 0, 0, 0, 0, 0, 0], (n, 1))
    values = np.tile([0.0, 0.5, 0.1, 0.5, 0.5, 0.5, 0.5], (n, 1))
    tree = StarTree(parents, values, np.zeros((n, 7), int))
    nodes = s.mcts_star_step(tree, seed=11, impl=impl).nodes
    counts = np.bincount(nodes, minlength=7)
    assert counts[[0, 2]].tolist() == [0, 0]
    assert chi_square(counts[[1, 3, 4, 5, 6]]) < 23.5
    biased = np.where(np.arange(n) % 4 == 0, 1, nodes)
    assert chi_square(np.bincount(biased, minlength=7)[[1, 3, 4, 5, 6]]) > 23.5
    assert np.array_equal(s.mcts_star_step(tree, seed=11, impl=impl).nodes, nodes)
    assert not np.array_equal(s.mcts_star_step(tree, seed=11, offset=1, impl=impl).nodes, nodes)
    assert (s.mcts_star_step(tree, impl=impl).nodes == 1).all()
