# SPDX-License-Identifier: Apache-2.0
"""Arguments whose elements make no sense: found where HOTLOOP_CHECK=1; harmless, never a made-up token, where not.

Numbers that are no probabilities are found by whoever reads them, checks on or off: test_decode_no_probabilities.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import hotloop.decode as d
import numpy as np
import pytest
import torch
from decode_calls import CALLS, LAW_ARGUMENTS, NEAR, PARENTS, PATHS, B, K, P, V, X, Z, refused

LOGIT_ARGUMENTS = {
    "greedy_speculative_accept": "target_logits",
    "entropy_adaptive_temperature": "logits",
    "geometric_mixture_logits": "logits",
    "value_augmented_logits": "logits",
}
WITH_IDS = [op for op, (_, base) in CALLS.items() if "draft_token_ids" in base]


def checked(monkeypatch: pytest.MonkeyPatch, op: str, changes: dict[str, Any], text: str) -> None:
    """Refused with checks on, not with checks off, "0" or empty."""
    call, base = CALLS[op]
    for off in (None, "0", ""):
        if off is not None:
            monkeypatch.setenv("HOTLOOP_CHECK", off)
        call(**{**base, **changes})
    monkeypatch.setenv("HOTLOOP_CHECK", "1")
    call(**base)
    refused(op, ValueError, rf"^\[{op}\] {text}", changes)
    monkeypatch.delenv("HOTLOOP_CHECK")


def with_element(x: np.ndarray, value: float) -> tuple[np.ndarray, str]:
    y = x.copy()
    at = tuple(n - 1 for n in y.shape)
    y[at] = value
    return y, re.escape(str(list(at)))


@pytest.mark.parametrize("op", LAW_ARGUMENTS)
def test_checks_find_what_is_no_law(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unset = r" \(\d+ of \d+\)\. Unset HOTLOOP_CHECK to let it pass\."
    for name in LAW_ARGUMENTS[op]:
        rows = CALLS[op][1][name]
        for value in (np.nan, -0.25, np.inf):
            bad, at = with_element(rows, value)
            monkeypatch.setenv("HOTLOOP_CHECK", "1")
            text = rf"{name}: expected probabilities from 0 to 1, got {value} at {at} \(1 of \d+\)\. Wrap logits in"
            refused(op, ValueError, rf"^\[{op}\] {text}", {name: bad})
            monkeypatch.delenv("HOTLOOP_CHECK")
        bad, _ = with_element(rows, 0.9)
        text = rf"{name}: expected rows that sum to 1, got 1\.7 at \[.*\]" + unset
        checked(monkeypatch, op, {name: bad}, text)
        checked(
            monkeypatch,
            op,
            {name: d.Probs(0 * rows, top_k=2)},
            rf"{name}: expected rows that sum to 1, got 0\.0 at",
        )
        for value in (np.nan, np.inf):
            bad, at = with_element(rows, value)
            text = rf"{name}: expected logits below \+inf, got {value} at {at}" + unset
            checked(monkeypatch, op, {name: d.Logits(bad)}, text)
        nothing = np.zeros_like(rows)
        nothing[-1, ..., :] = -np.inf
        text = rf"{name}: expected a finite logit in every row, got -inf at \[1.*\]" + unset
        checked(monkeypatch, op, {name: d.Logits(nothing)}, text)
        bad, at = with_element(rows, np.nan)
        law = d.Logits(np.zeros_like(rows), reference=bad)
        text = rf"{name}\.reference: expected logits below \+inf, got nan at {at}"
        checked(monkeypatch, op, {name: law}, text)
        bias = np.array([[0.0, np.nan]] * B, np.float32)
        ids = np.array([[0, 1]] * B)
        law = d.Logits(np.zeros_like(rows), bias_ids=ids, bias=bias)
        text = rf"{name}\.bias: expected logits below \+inf, got nan at \[0, 1\]"
        checked(monkeypatch, op, {name: law}, text)
        law = d.Logits(np.zeros_like(rows), bias_ids=ids + V - 1, bias=0 * ids.astype(np.float32))
        text = (
            rf"{name}\.bias_ids: expected token ids from 0 to 4 \(-1 for none\), got 5 at \[0, 1\]"
        )
        checked(monkeypatch, op, {name: law}, text)


@pytest.mark.parametrize("op", LOGIT_ARGUMENTS)
def test_checks_find_what_are_no_logits(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = LOGIT_ARGUMENTS[op]
    for value in (np.nan, np.inf):
        bad, at = with_element(CALLS[op][1][name], value)
        text = rf"{name}: expected logits below \+inf, got {value} at {at} \(1 of \d+\)\. Unset"
        checked(monkeypatch, op, {name: bad}, text)


def test_half_precision_sums_less_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOTLOOP_CHECK", "1")
    p = np.random.default_rng(0).dirichlet(np.full(1000, 0.5), size=3)
    for dtype in (torch.bfloat16, torch.float16):
        d.sample(torch.from_numpy(p).to(dtype))
    with pytest.raises(ValueError, match=r"expected rows that sum to 1, got 1\.005 at"):
        d.sample(p * 1.005)


@pytest.mark.parametrize("op", WITH_IDS)
def test_checks_find_ids_out_of_range(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "draft_token_ids"
    for value in (V, -2, 2**40):
        bad, at = with_element(CALLS[op][1][name], value)
        text = rf"{name}: expected token ids from 0 to 4 \(-1 for none\), got {value} at {at}"
        checked(monkeypatch, op, {name: bad}, text)


def test_checks_find_bad_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    bad, _ = with_element(NEAR, V)
    text = r"neighbors: expected token ids from 0 to 4 \(-1 for none\), got 5 at \[4, 3\]"
    checked(monkeypatch, "lantern_relaxed_accept", {"neighbors": bad}, text)


@pytest.mark.parametrize("value", [K + 1, -1])
def test_checks_find_bad_lengths(value: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for op in WITH_IDS:
        name = "num_nodes" if op == "tree_speculative_verify" else "num_draft_tokens"
        text = rf"{name}: expected 0 to 3, got {value} at \[1\] \(\d+ of \d+\)\."
        checked(monkeypatch, op, {name: np.array([0, value])}, text)


def test_checks_find_a_tree_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    op = "tree_speculative_verify"
    for row, at, got in (
        ([-1, 2, 1], 1, 2),  # a child before its parent, and a cycle
        ([0, 0, 0], 0, 0),  # its own parent
        ([-1, -2, 0], 1, -2),
        ([-1, 0, 3], 2, 3),
    ):
        text = (
            rf"parents: expected -1 or an earlier node, got {got} at \[1, {at}\] \(\d+ of \d+\)\. "
            r"List every parent before its children; a tree has no cycle\."
        )
        checked(monkeypatch, op, {"parents": np.array([[-1, 0, 1], row])}, text)
    monkeypatch.setenv("HOTLOOP_CHECK", "1")
    call, base = CALLS[op]
    # What lies beyond a tree's own nodes is not looked at.
    call(**{**base, "parents": np.array([[-1, 0, 99]] * B), "num_nodes": np.array([2, 2])})


N = 400
BAD_IDS = (-1, -2, -(2**31), 2**31 - 1, V, V + 1, 10**6, -(2**63), 2**63 - 1)
RNG = np.random.default_rng(1)


def bad_ids(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Ids of which most are none."""
    limits = np.iinfo(dtype)
    choices = [x for x in (*BAD_IDS, *range(V)) if limits.min <= x <= limits.max]
    return RNG.choice(np.array(choices, dtype), shape)


def bad_rows(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Rows of NaN, infinities, huge and negative numbers, among sound ones."""
    rows = RNG.normal(size=(*shape, V))
    kinds = (
        np.full(V, np.nan),
        np.full(V, -np.inf),
        np.full(V, np.inf),
        np.array([np.nan, 0.0, -np.inf, 1.0, np.nan]),
        np.array([np.inf, 0.0, 0.2, 0.3, 0.5]),
        np.array([-1.0, -2.0, -np.inf, -0.5, -3.0]),
        np.array([1e30, -1e30, 1e300, 0.0, 5.0]),
        np.zeros(V),
        np.array([0.2, np.nan, 0.3, -np.inf, 0.5]),
    )
    flat = rows.reshape(-1, V)
    for i in range(len(flat)):
        if RNG.random() < 0.7:
            flat[i] = kinds[RNG.integers(len(kinds))]
    with np.errstate(over="ignore"):
        return rows.astype(dtype)


def odd_probabilities(rows: np.ndarray) -> np.ndarray:
    """The same rows with every number between 0 and 1: rows of zeros, of ones, and others of any sum among them."""
    return np.nan_to_num(np.abs(rows), nan=0.0).clip(0, 1).astype(rows.dtype)


def laws(rows: np.ndarray) -> list[Any]:
    n = rows.shape[0]
    ids = bad_ids((n, 3), np.int64)
    bias = RNG.choice(np.array([0.0, np.nan, np.inf, -np.inf, 2.0], np.float32), (n, 3))
    sound = odd_probabilities(rows)
    out = [
        sound,
        d.Probs(sound, top_k=3),
        d.Probs(sound, top_p=0.5, min_p=0.2),
        d.Logits(rows),
        d.Logits(rows, temperature=0.0),
        d.Logits(rows, temperature=1e-30),
        d.Logits(rows, top_k=2, top_p=0.4, min_p=0.1, filter_order="joint"),
        d.Logits(rows, top_p=0.999999),
        d.Logits(rows, reference=rows[::-1]),
        d.Logits(rows, bias_ids=ids, bias=bias),
    ]
    return out


def emitted(done: Any, width: int) -> None:
    """A token of the vocabulary or -1, no gap, and counts that fit."""
    ids, accepted = np.asarray(done.output_token_ids), np.asarray(done.num_accepted)
    assert ids.shape[1] == width
    assert ((ids >= -1) & (ids < V)).all()
    written = (ids >= 0).sum(-1)
    assert ((ids >= 0) == (np.arange(width) < written[:, None])).all(), "a gap"
    assert ((accepted >= 0) & (accepted < width)).all()
    assert ((written == accepted) | (written == accepted + 1)).all()
    assert (np.asarray(done.rows_read) >= 0).all()


def both(op: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """What the compiled loop does with it; it has to be what the reference does."""
    done = op(*arguments, **keywords, impl="cpu")
    part = [x[:60] if isinstance(x, np.ndarray) and x.shape[0] == N else x for x in arguments]
    for i, x in enumerate(part):
        if isinstance(x, (d.Logits, d.Probs)):
            cut = {k: v[:60] if isinstance(v, np.ndarray) else v for k, v in vars(x).items()}
            part[i] = type(x)(**cut)
    less = {k: v[:60] if isinstance(v, np.ndarray) else v for k, v in keywords.items()}
    fewer = op(*part, **less, impl="cpu")
    wanted = op(*part, **less, impl="reference")
    for a, b in zip(fewer, wanted):
        if a.dtype.kind != "f":
            np.testing.assert_array_equal(a, b)
    return done


@pytest.mark.parametrize("ids", [np.int32, np.int64])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_nothing_is_made_up(dtype: Any, ids: Any) -> None:
    lengths = RNG.choice(np.array([-5, 0, 1, K, K + 1, 2**31 - 1], np.int64), N)
    more = {"num_draft_tokens": lengths, "seed": 5}
    target, draft = bad_rows((N, K + 1), dtype), bad_rows((N, K), dtype)
    x = bad_ids((N, K), ids)
    for p, q in zip(laws(target), [*laws(draft)[1:], None]):
        for op in (d.chain_speculative_sampling, d.block_speculative_sampling):
            emitted(both(op, q, x, p, **more), K + 1)
        near = bad_ids((V, 4), np.int32)
        emitted(both(d.lantern_relaxed_accept, q, x, p, near, delta=0.7, **more), K + 1)
        if (
            q is not None
            and not isinstance(q, np.ndarray)
            and getattr(q, "reference", None) is None
        ):
            streams = type(q)(**{**vars(q), "values": q.values[:, :, None]})
            emitted(d.speculative_streaming_verify(streams, x, p, **more), K + 1)
    for p, q in zip(laws(target), [*laws(bad_rows((N, K + 1), dtype))[2:], None, None]):
        parents = RNG.choice(np.array([-(2**31), -2, -1, 0, 1, 2, 3, 99]), (N, K))
        for replacement in (False, True):
            done = both(
                d.tree_speculative_verify,
                x,
                parents,
                p,
                q,
                replacement=replacement,
                num_nodes=lengths,
                seed=6,
            )
            emitted(done, K + 1)
            assert ((done.accepted_nodes >= -1) & (done.accepted_nodes < K)).all()
    paths, rows = bad_ids((N, 2, K + 1), ids), bad_rows((N, 2, K + 1), dtype)
    for p in laws(rows):
        emitted(both(d.typical_accept, paths, p, alpha=0.0, **more), K + 1)
    emitted(both(d.greedy_speculative_accept, x, target, num_draft_tokens=lengths), K + 1)
    emitted(both(d.greedy_speculative_accept, paths, rows, num_draft_tokens=lengths), K + 1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_sampling_from_anything(dtype: Any) -> None:
    for law in laws(bad_rows((N, 2), dtype)):
        done = both(d.sample, law, seed=7)
        assert ((done.token_ids >= -1) & (done.token_ids < V)).all()
        assert not np.isnan(done.logprobs).any()
        top = both(d.top_logprobs, law, 3)
        assert ((top.token_ids >= -1) & (top.token_ids < V)).all()
        p = d.law_probs(law)
        assert ((p >= 0) & (p <= 1)).all()
        picked = done.token_ids >= 0
        chosen = np.take_along_axis(p, np.maximum(done.token_ids, 0)[..., None], -1)[..., 0]
        assert (chosen[picked] > 0).all()


def one_row(op: str, rows: np.ndarray) -> np.ndarray:
    """The tokens an op emits where every row is the same bad one."""
    many = np.broadcast_to(rows, (B, K + 1, V))
    z = d.Logits(many)
    if op == "sample":
        return np.asarray(d.sample(z).token_ids)
    if op == "tree":
        return np.asarray(d.tree_speculative_verify(X, PARENTS, z).output_token_ids)
    if op == "typical":
        wide = d.Logits(np.broadcast_to(rows, (B, 2, K + 1, V)))
        return np.asarray(d.typical_accept(PATHS, wide).output_token_ids)
    if op == "greedy":
        return np.asarray(d.greedy_speculative_accept(X, many).output_token_ids)
    if op == "lantern":
        return np.asarray(d.lantern_relaxed_accept(None, X, z, NEAR).output_token_ids)
    call = {"chain": d.chain_speculative_sampling, "block": d.block_speculative_sampling}[op]
    return np.asarray(call(P[:, :K], X, z).output_token_ids)


@pytest.mark.parametrize("op", ["chain", "block", "tree", "lantern", "greedy", "typical", "sample"])
@pytest.mark.parametrize("value", [np.nan, -np.inf, np.inf])
def test_a_row_without_a_law_emits_nothing(op: str, value: float) -> None:
    assert (one_row(op, np.full(V, value, np.float32)) == -1).all()


@pytest.mark.parametrize("op", ["chain", "block", "tree", "lantern", "greedy", "typical", "sample"])
def test_nan_is_never_the_token(op: str) -> None:
    z = np.array([np.nan, -3.0, np.nan, 2.0, np.nan], np.float32)
    assert set(np.unique(one_row(op, z))) <= {-1, 1, 3}


def test_a_law_may_end_in_the_middle_of_a_chain() -> None:
    """What was accepted before the bad row is kept, and nothing follows it."""
    z = Z.copy()
    z[:, 2] = np.nan
    done = d.chain_speculative_sampling(d.Logits(Z[:, :K]), X, d.Logits(z), seed=1)
    assert done.output_token_ids.tolist() == [[1, 1, -1, -1]] * B
    assert done.num_accepted.tolist() == [2, 2]
    assert done.rows_read.tolist() == [3, 3]


def test_branches_that_are_none() -> None:
    ids = np.array([[1, 2, -1]] * 6)
    accepted = np.array([-1, 0, 1, 2, 3, 2**40])
    roots = np.full((6, 3, 2), -1)
    roots[:, 1] = 2
    branches = np.arange(6 * 3 * 2 * 2).reshape(6, 3, 2, 2)
    for impl in ("cpu", "reference"):
        done = d.mirror_sd_branch_reuse(ids, accepted, roots, branches, impl=impl)
        assert done.reused.tolist() == [False, False, True, False, False, False]
        assert done.branch.tolist() == [-1, -1, 0, -1, -1, -1]
        assert (done.next_token_ids[~done.reused] == -1).all()


def test_value_augmentation_of_ids_that_are_none() -> None:
    ids = np.array([[0, -1, V, 2**62]])
    values = np.array([[3.0, 9.0, 9.0, 9.0]], np.float32)
    for impl in ("cpu", "reference"):
        z = d.value_augmented_logits(Z[:1, 0], ids, values, impl=impl)
        assert not z.any()  # one valid token: its value is the mean


@pytest.mark.parametrize("m", [0.0, 0.5, 1.0])
def test_log_probabilities_of_rows_that_are_none(m: float) -> None:
    """NaN is a token without mass, and a row without a law has none at all: -inf, not 0."""
    z = np.array([[0.0, np.nan, 1.0], [-np.inf] * 3, [np.inf, 0.0, 0.0], [np.nan] * 3])
    for dtype in (np.float32, np.float64):
        for impl in ("cpu", "reference"):
            both_ = z.astype(dtype)
            found = d.geometric_mixture_logits(both_, both_, mixture=m, impl=impl)
            assert (found[1:] == -np.inf).all()
            assert found[0, 1] == -np.inf
            np.testing.assert_allclose(np.exp(found[0, ::2]), [0.26894142, 0.73105858], rtol=1e-6)
