# SPDX-License-Identifier: Apache-2.0
"""The same seed gives the same tokens: on every implementation, instruction set, thread count, layout and batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fixtures import CORE, LEVELS
from helpers import misaligned, strided
from hotloop.decode import (
    Logits,
    Probs,
    block_speculative_sampling,
    chain_speculative_sampling,
    greedy_speculative_accept,
    lantern_relaxed_accept,
    law_probs,
    sample,
    speculative_streaming_verify,
    top_logprobs,
    tree_speculative_verify,
    typical_accept,
)
from hotloop.front import impl as _impl

FLOATS = ("float32", "float64", "float16", "bfloat16")
# B 0: nothing. 1. 3: more than one request for each of two threads.
# K 0: the bonus only. 1. 4.
# V 1: one token. 7: a prime, less than a vector. 511, 512, 513: around a chunk. 1500: two chunks and a ragged third.
SHAPES = [
    (0, 4, 7),
    (1, 0, 7),
    (3, 4, 1),
    (3, 4, 7),
    (3, 1, 511),
    (3, 4, 512),
    (3, 0, 513),
    (1, 4, 513),
    (3, 4, 1500),
]


def same(a: Any, b: Any, what: Any = "") -> None:
    """Tokens and counts bit for bit; log-probabilities and probabilities to a few units in the last place."""
    assert type(a) is type(b)
    for x, y, name in zip(a, b, a._fields):
        assert type(x) is type(y), (what, name)
        assert x.dtype == y.dtype, (what, name)
        x, y = np.asarray(x), np.asarray(y)
        if x.dtype == np.float32:
            np.testing.assert_allclose(x, y, rtol=2e-6, atol=2e-6, err_msg=f"{what} {name}")
        else:
            np.testing.assert_array_equal(x, y, err_msg=f"{what} {name}")


class Inputs:
    """Random arguments of one shape, of either library, with per-request parameters where asked for."""

    def __init__(
        self, b: int, k: int, v: int, dtype: str, *, library: str = "torch", seed: int = 0
    ) -> None:
        self.b, self.k, self.v, self.dtype, self.library = b, k, v, dtype, library
        self.rng = np.random.default_rng([seed, b, k, v, FLOATS.index(dtype)])

    def array(self, x: np.ndarray, dtype: str) -> Any:
        if self.library == "numpy":
            return np.ascontiguousarray(x.astype(dtype))
        return torch.from_numpy(np.ascontiguousarray(x)).to(getattr(torch, dtype))

    def each(self, choices: list[Any], dtype: str) -> Any:
        return self.array(self.rng.choice(choices, self.b), dtype)

    def logits(self, *rows: int) -> Any:
        z = 2 * self.rng.normal(size=(self.b, *rows, self.v))
        z[self.rng.random(z.shape) < 0.05] = -np.inf
        z[..., 0] = self.rng.normal(size=z.shape[:-1])
        return self.array(z, self.dtype)

    def law(self, *rows: int) -> Logits:
        n = int(self.rng.integers(0, 4))
        bias_ids = self.array(self.rng.integers(-1, self.v, (self.b, n)), "int64")
        return Logits(
            self.logits(*rows),
            temperature=self.each([0.0, 0.5, 1.0, 1.7], "float32"),
            top_k=self.each([0, 1, 5, 400, self.v + 3], "int32"),
            top_p=self.each([0.3, 0.9, 1.0], "float64"),
            min_p=self.each([0.0, 0.05, 0.5], "float32"),
            filter_order="joint" if self.rng.random() < 0.5 else "top_k_first",
            reference=self.logits(*rows),
            mixture=0.25,
            bias_ids=bias_ids,
            bias=self.array(self.rng.normal(size=(self.b, n)), "float32"),
        )

    def probs(self, *rows: int) -> Any:
        p = self.rng.dirichlet(np.full(self.v, 0.3), size=(self.b, *rows))
        return self.array(p, self.dtype)

    def ids(self, *shape: int, dtype: str = "int64") -> Any:
        return self.array(self.rng.integers(0, self.v, (self.b, *shape)), dtype)

    def stream(self, own: bool) -> dict[str, Any]:
        if not own:
            return {"seed": int(self.rng.integers(0, 2**63)) + 2**62, "offset": 17}
        return {
            "seed": self.array(self.rng.integers(-(2**62), 2**62, self.b), "int64"),
            "offset": self.array(self.rng.integers(0, 99, self.b), "int64"),
        }

    def lengths(self) -> Any:
        return self.each(list(range(self.k + 1)), "int32")


def chain_calls(op: Callable[..., Any], x: Inputs, ids: str) -> list[tuple[Any, ...]]:
    tokens = x.ids(x.k, dtype=ids)
    return [
        (
            op,
            (x.law(x.k), tokens, x.law(x.k + 1)),
            x.stream(True) | {"num_draft_tokens": x.lengths()},
        ),
        (op, (x.probs(x.k), tokens, x.probs(x.k + 1)), x.stream(False)),
        (op, (None, tokens, Probs(x.probs(x.k + 1), top_k=3, top_p=0.9)), x.stream(False)),
        (op, (Logits(x.logits(x.k)), tokens, Logits(x.logits(x.k + 1))), x.stream(True)),
    ]


def calls(x: Inputs, ids: str) -> list[tuple[Any, ...]]:
    """(op, arguments, keywords) of every op that draws or decides, for one shape and dtype."""
    out = [
        *chain_calls(chain_speculative_sampling, x, ids),
        *chain_calls(block_speculative_sampling, x, ids),
    ]
    steps = -(-x.k // 2)
    out.append(
        (
            speculative_streaming_verify,
            (Logits(x.logits(steps, 2)), x.ids(x.k, dtype=ids), Logits(x.logits(x.k + 1))),
            x.stream(True),
        )
    )
    parents = x.array(
        np.array(
            [[int(x.rng.integers(-1, j)) for j in range(x.k)] for _ in range(x.b)], np.int64
        ).reshape(x.b, x.k),
        ids,
    )
    tree = (x.ids(x.k, dtype=ids), parents)
    for draft, replacement in ((None, False), (x.law(x.k + 1), False), (x.probs(x.k + 1), True)):
        more = x.stream(replacement) | {"replacement": replacement, "num_nodes": x.lengths()}
        out.append((tree_speculative_verify, (*tree, x.law(x.k + 1), draft), more))
    more = x.stream(False) | {"max_depth": min(x.k, 2)}
    out.append((tree_speculative_verify, (*tree, x.probs(x.k + 1), x.probs(x.k + 1)), more))
    near = x.array(np.argsort(x.rng.random((x.v, x.v)), axis=1)[:, : min(x.v, 6)], "int32")
    tokens = x.ids(x.k, dtype=ids)
    for draft, delta in ((x.probs(x.k), 0.2), (None, 1.5)):
        more = x.stream(True) | {"k": 4, "delta": delta}
        out.append((lantern_relaxed_accept, (draft, tokens, x.probs(x.k + 1), near), more))
    out.append(
        (lantern_relaxed_accept, (x.law(x.k), tokens, x.law(x.k + 1), near), x.stream(False))
    )
    out.append((greedy_speculative_accept, (tokens, x.logits(x.k + 1)), {}))
    paths = x.ids(2, x.k + 1, dtype=ids)
    out.append((greedy_speculative_accept, (paths, x.logits(2, x.k + 1)), {}))
    for eps in (0.0, 1e-5):
        more = x.stream(True) | {"entropy_eps": eps, "num_draft_tokens": x.lengths()}
        out.append((typical_accept, (paths, x.law(2, x.k + 1)), more))
    for law in (x.law(), x.law(3), x.probs(2), Probs(x.probs(), min_p=0.1)):
        out.append((sample, (law,), x.stream(True)))
        out.append((top_logprobs, (law, 3), {}))
    return out


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("b", "k", "v"), SHAPES)
def test_cpu_and_reference(b: int, k: int, v: int, dtype: str) -> None:
    for op, arguments, keywords in calls(Inputs(b, k, v, dtype), "int32" if b == 1 else "int64"):
        found = op(*arguments, **keywords, impl="cpu")
        assert _impl.last_impl(op.__name__) == "cpu"
        wanted = op(*arguments, **keywords, impl="reference")
        assert _impl.last_impl(op.__name__) == "reference"
        same(found, wanted, op.__name__)


@pytest.mark.parametrize("dtype", FLOATS[:3])
@pytest.mark.parametrize("ids", ["int32", "int64"])
def test_numpy_and_torch(dtype: str, ids: str) -> None:
    """The same numbers in either library: the same tokens, in arrays of that library."""
    pairs = zip(*(calls(Inputs(3, 4, 513, dtype, library=x), ids) for x in ("numpy", "torch")))
    for (op, with_numpy, more), (_, with_torch, more_torch) in pairs:
        a, b = op(*with_numpy, **more), op(*with_torch, **more_torch)
        assert all(isinstance(x, np.ndarray) for x in a)
        assert all(isinstance(x, torch.Tensor) for x in b)
        same(a, type(b)(*(x.numpy() for x in b)), op.__name__)
        if hasattr(a, "output_token_ids"):
            assert a.output_token_ids.dtype == ids


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_instruction_set_and_one_or_two_threads(dtype: str) -> None:
    made = [call for v in (7, 1500) for call in calls(Inputs(3, 4, v, dtype), "int64")]
    # Long enough for two threads to share one row.
    rng = np.random.default_rng(3)
    z = torch.from_numpy(rng.normal(size=(2, 3, 70_001))).to(getattr(torch, dtype))
    x = torch.from_numpy(rng.integers(0, 70_001, (2, 2)))
    made += [
        (sample, (Logits(z, top_p=0.9),), {"seed": 1}),
        (sample, (Logits(z),), {"seed": 2}),
        (chain_speculative_sampling, (Logits(z[:, 1:]), x, Logits(z)), {"seed": 3}),
        (block_speculative_sampling, (Logits(z[:, 1:]), x, Logits(z)), {"seed": 4}),
    ]
    wanted = None
    for level in LEVELS:
        CORE.force_simd_level(level)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found = [op(*arguments, **keywords) for op, arguments, keywords in made]
            assert CORE.last_simd_level() == level
            for a, b, call in zip(found, wanted or found, made):
                same(a, b, (call[0].__name__, level, threads))
            wanted = wanted or found


def strided_rows(x: torch.Tensor) -> torch.Tensor:
    """The same values, rows and requests further apart than they need be."""
    buffer = x.new_zeros((*(2 * n for n in x.shape[:-1]), x.shape[-1] + 5))
    view = buffer[tuple(slice(None, None, 2) for _ in x.shape[:-1])][..., 3 : 3 + x.shape[-1]]
    view.copy_(x)
    assert x.numel() == 0 or not view.is_contiguous()
    return view


def relaid(x: Any, how: Callable[[torch.Tensor], torch.Tensor], least: int = 1) -> Any:
    """Every array of an argument laid out otherwise."""
    if isinstance(x, torch.Tensor):
        return how(x) if x.ndim >= least else x
    if isinstance(x, (Logits, Probs)):
        return replace(x, **{name: relaid(y, how, least) for name, y in vars(x).items()})
    return x


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("how", [strided_rows, misaligned, strided])
def test_layouts(how: Callable[[torch.Tensor], torch.Tensor], dtype: str) -> None:
    """Rows any distance apart, arrays off by one element, and columns that are not neighbours."""
    least = 2 if how is strided_rows else 1
    for op, arguments, keywords in calls(Inputs(3, 4, 513, dtype), "int64"):
        wanted = op(*arguments, **keywords)
        found = op(
            *(relaid(x, how, least) for x in arguments),
            **{name: relaid(x, how, least) for name, x in keywords.items()},
        )
        same(found, wanted, op.__name__)


def test_one_row_for_all_requests() -> None:
    """A stride of 0: one law, many draws."""
    z = np.random.default_rng(0).normal(size=(1, 3, 7)).astype(np.float32)
    x = np.random.default_rng(1).integers(0, 7, (50, 2))
    rows = np.broadcast_to(z, (50, 3, 7))
    for op in (chain_speculative_sampling, block_speculative_sampling):
        a = op(Logits(rows[:, :2]), x, Logits(rows), seed=3)
        same(a, op(Logits(rows[:, :2].copy()), x, Logits(rows.copy()), seed=3))
        same(a, op(Logits(rows[:, :2]), x, Logits(rows), seed=3, impl="reference"))


def only(x: Any, at: np.ndarray) -> Any:
    """The requests of these indices, of an argument."""
    if isinstance(x, torch.Tensor):
        return x[at] if x.ndim >= 1 else x
    if isinstance(x, (Logits, Probs)):
        return replace(x, **{name: only(y, at) for name, y in vars(x).items()})
    return x


def test_a_request_with_its_own_seed_does_not_notice_its_batch() -> None:
    x = Inputs(5, 4, 513, "float32")
    made = [
        call
        for call in calls(x, "int64")
        if isinstance(call[2].get("seed"), torch.Tensor) and call[0] is not lantern_relaxed_accept
    ]
    assert len(made) >= 8
    for op, arguments, keywords in made:
        whole = op(*arguments, **keywords)
        for at in ([3], [4, 0, 2], [1, 1]):
            index = np.array(at)
            part = op(
                *(only(a, index) for a in arguments),
                **{name: only(a, index) for name, a in keywords.items()},
            )
            same(part, type(whole)(*(a[index] for a in whole)), op.__name__)


def test_the_parts_of_a_seed_all_count() -> None:
    """Seeds that differ in one bit, requests, positions: other tokens. A negative seed in an array is its bits."""
    z = Logits(np.zeros((1000, 1000), np.float32))
    base = sample(z, seed=5).token_ids
    for seed in (5 + 2**40, 5 + 2**63, 4):
        assert (sample(z, seed=seed).token_ids == base).mean() < 0.02
    assert (sample(z, seed=5, offset=2**40).token_ids == base).mean() < 0.02
    own = sample(z, seed=np.full(1000, -1)).token_ids
    assert (own == sample(Logits(z.values[:1]), seed=2**64 - 1).token_ids[0]).all()


def test_a_numpy_scalar_is_a_number() -> None:
    z = Logits(np.zeros((4, 50)))
    for impl in ("cpu", "reference"):
        found = sample(z, seed=np.int64(5), offset=np.uint8(3), impl=impl).token_ids
        assert np.array_equal(found, sample(z, seed=5, offset=3).token_ids)


@pytest.mark.parametrize("certain", [False, True])
@pytest.mark.parametrize("v", [2, 7, 600])
def test_a_tree_of_one_branch_is_a_chain(v: int, certain: bool) -> None:
    rng = np.random.default_rng(v)
    b, k = 400, 4
    z = rng.normal(size=(b, k + 1, v)).astype(np.float32)
    w = (z + 0.5 * rng.normal(size=z.shape)).astype(np.float32)
    x = rng.integers(0, v, (b, k))
    parents = np.tile(np.arange(-1, k - 1), (b, 1))
    lengths = rng.integers(0, k + 1, b)
    for cut in ({}, {"top_p": 0.8, "temperature": 0.7}):
        target, draft = Logits(z, **cut), Logits(w[:, :k], **cut)
        chain = chain_speculative_sampling(
            None if certain else draft, x, target, num_draft_tokens=lengths, seed=6, offset=2
        )
        for replacement in (False, True):
            tree = tree_speculative_verify(
                x,
                parents,
                target,
                None if certain else Logits(w, **cut),
                replacement=replacement,
                num_nodes=lengths,
                seed=6,
                offset=2,
            )
            for name in ("output_token_ids", "num_accepted", "logprobs", "rows_read"):
                assert np.array_equal(getattr(tree, name), getattr(chain, name)), name
            steps = np.arange(k)
            path = np.where(steps < chain.num_accepted[:, None], steps, -1)
            assert np.array_equal(tree.accepted_nodes, path)


def test_one_stream_is_a_chain() -> None:
    rng = np.random.default_rng(8)
    z = rng.normal(size=(300, 4, 50)).astype(np.float32)
    w = (z + 0.5 * rng.normal(size=z.shape)).astype(np.float32)[:, :3]
    x = rng.integers(0, 50, (300, 3))
    for law in (Logits(w, top_k=9), Logits(w, reference=z[:, :3])):
        chain = chain_speculative_sampling(law, x, Logits(z), seed=7)
        reference = None if law.reference is None else law.reference[:, :, None]
        streams = replace(law, values=w[:, :, None], reference=reference)
        for impl in ("cpu", "reference"):
            done = speculative_streaming_verify(streams, x, Logits(z), seed=7, impl=impl)
            same(done, chain, impl)


@pytest.mark.parametrize("certain", [False, True])
@pytest.mark.parametrize("zeros", [False, True])
def test_lantern_that_may_borrow_nothing_is_a_chain(certain: bool, zeros: bool) -> None:
    """delta = 0, also where the nearest neighbours have no mass and borrowing it would be free."""
    rng = np.random.default_rng(9)
    b, k, v = 600, 3, 9
    p = rng.dirichlet(np.ones(v), size=(b, k + 1))
    if zeros:
        p[rng.random(p.shape) < 0.4] = 0
        p[..., 0] += 1e-3
        p /= p.sum(-1, keepdims=True)
    q = rng.dirichlet(np.ones(v), size=(b, k))
    x = rng.integers(0, v, (b, k))
    near = np.array([[w for w in rng.permutation(v) if w != y] for y in range(v)], np.int32)
    draft = None if certain else q
    chain = chain_speculative_sampling(draft, x, p, seed=8)
    for more in ({"delta": 0.0}, {"delta": 0.5, "k": 0}):
        for impl in ("cpu", "reference"):
            done = lantern_relaxed_accept(draft, x, p, near, **more, seed=8, impl=impl)
            same(type(chain)(*done[:4]), chain, more)
            assert not done.relaxation.any()


@pytest.mark.parametrize("dtype", FLOATS)
def test_law_probs_of_cpu_and_reference(dtype: str) -> None:
    for b, k, v in SHAPES:
        x = Inputs(b, k, v, dtype)
        for law in (x.law(), x.law(k + 1), x.probs(k + 1), Probs(x.probs(), top_k=2)):
            a, b_ = (law_probs(law, impl=impl) for impl in ("cpu", "reference"))
            assert a.dtype == b_.dtype
            # The float32 of a float64 quotient, and the same quotient times an inverse.
            torch.testing.assert_close(
                a, b_, rtol=2e-7 if a.dtype == torch.float32 else 1e-15, atol=0
            )
