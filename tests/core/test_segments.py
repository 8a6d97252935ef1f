# SPDX-License-Identifier: Apache-2.0
"""Reductions over groups: against torch, mpmath and definitions; gradients; threads; errors; compiled graphs."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from helpers import with_threads
from hotloop import core
from hotloop.front import impl as _impl
from hypothesis import given, settings
from hypothesis import strategies as st
from segment_cases import DTYPES, NAMES, TOLERANCE, WAYS, generator, offsets_of, ours, theirs, ways
from torch import Tensor

# Tiles are 16384 elements and at least 256 rows: below, on and across them; more columns than go in one piece.
SHAPES = [
    (0,),
    (1,),
    (15,),
    (16,),
    (37,),
    (5000,),
    (16384,),
    (40_000,),
    (0, 3),
    (37, 0),
    (37, 3),
    (700, 70),
    (40, 300),
    (3000, 64),
    (20_000, 2),
    (600, 9),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_against_the_float64_reference(
    name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = torch.randn(shape, generator=generator(1), dtype=torch.float64).to(dtype)
    value, slope = TOLERANCE[dtype]
    for arguments in ways(shape[0], 9).values():
        a, b = x.clone().requires_grad_(), x.double().requires_grad_()
        mine, truth = ours(name)(a, **arguments), theirs(name)(b, **arguments)
        assert mine.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(mine.double(), truth, rtol=value, atol=100 * value)
        above = torch.randn(truth.shape, generator=generator(2), dtype=torch.float64)
        (d_mine,) = torch.autograd.grad(mine, a, above.to(mine.dtype))
        (d_truth,) = torch.autograd.grad(truth, b, above)
        assert d_mine.dtype == dtype
        torch.testing.assert_close(d_mine.double(), d_truth, rtol=slope, atol=slope)


@pytest.mark.parametrize("name", ["sum", "mean", "max", "min"])
def test_against_torch_segment_reduce(name: str) -> None:
    for shape in ((1000,), (1000, 5)):
        x = torch.randn(shape, generator=generator(3), dtype=torch.float64)
        offsets = offsets_of(1000, 40)
        found = ours(name)(x, offsets)
        expected = torch.segment_reduce(x, name, offsets=offsets)
        if name == "mean":  # documented: theirs is NaN for a group without values
            expected = torch.where(
                offsets.diff().eq(0).view(-1, *[1] * (x.ndim - 1)), 0.0, expected
            )
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [("sum", "sum"), ("mean", "mean"), ("max", "amax"), ("min", "amin")],
)
def test_against_torch_scatter_reduce(name: str, theirs: str) -> None:
    x = torch.randn(997, 3, generator=generator(4), dtype=torch.float64)
    ids = torch.randint(0, 20, (997,), generator=generator(5))
    expected = torch.zeros(20, 3, dtype=torch.float64).scatter_reduce(
        0, ids[:, None].expand(-1, 3), x, theirs, include_self=False
    )
    torch.testing.assert_close(ours(name)(x, segment_ids=ids, num_segments=20), expected)


def test_logsumexp_against_mpmath() -> None:
    x = torch.tensor([700.0, 710.0, -745.0, -745.5, 1e-3, 2e-3, 3e-3], dtype=torch.float64)
    offsets = torch.tensor([0, 2, 4, 7])
    with mpmath.workdps(50):
        truth = [
            float(mpmath.log(mpmath.fsum(mpmath.exp(mpmath.mpf(v)) for v in x[a:b].tolist())))
            for a, b in ((0, 2), (2, 4), (4, 7))
        ]
    for found in (
        core.segment_logsumexp(x, offsets),
        core.segment_logsumexp(x, segment_ids=torch.tensor([0, 0, 1, 1, 2, 2, 2]), num_segments=3),
    ):
        torch.testing.assert_close(
            found, torch.tensor(truth, dtype=torch.float64), rtol=3e-16, atol=3e-16
        )
    single = core.segment_logsumexp(x.float(), offsets)
    torch.testing.assert_close(single.double(), torch.tensor(truth).double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("columns", [(), (7,)], ids=["vector", "rows"])
def test_rounding_does_not_grow_with_the_length(columns: tuple[int, ...]) -> None:
    n = 2**20
    x = torch.rand(n, *columns, generator=generator(6))
    truth = x.double().sum(0, keepdim=True)
    for found in (
        core.segment_sum(x, torch.tensor([0, n])),
        core.segment_sum(x, segment_ids=torch.zeros(n, dtype=torch.int64), num_segments=1),
    ):
        assert float(((found - truth).abs() / truth).max()) < 1e-6


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(200_000,), (20_000, 40)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_threads_do_not_change_a_bit(name: str, shape: tuple[int, ...], way: str) -> None:
    x = torch.randn(shape, generator=generator(7))
    arguments = ways(shape[0], 30)[way]

    def call() -> Tensor:
        leaf = x.clone().requires_grad_()
        out = ours(name)(leaf, **arguments)
        (grad,) = torch.autograd.grad(out, leaf, torch.ones_like(out) * 0.3)
        return torch.cat((out.flatten(), grad.flatten()))

    first, *others = (with_threads(k, call) for k in (1, 2, 5))
    for other in others:
        assert torch.equal(first, other)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name: str, way: str) -> None:
    n = 23
    arguments = ways(n, 4)[way]
    if "cu_seqlens" in arguments:  # a difference of infinities is no gradient: no empty groups
        arguments["cu_seqlens"] = torch.tensor([0, 5, 6, 16, n])
        if "mask" in arguments:
            arguments["mask"] = arguments["mask"] | (torch.arange(n) % 5 == 0)
    for shape in ((n,), (n, 3)):
        x = torch.randn(shape, generator=generator(8), dtype=torch.float64, requires_grad=True)

        def call(x: Tensor) -> Tensor:
            return ours(name)(x, **arguments)  # type: ignore[no-any-return]

        assert torch.autograd.gradcheck(call, (x,))
        assert torch.autograd.gradgradcheck(call, (x,))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_are_those_of_the_reference(name: str, way: str) -> None:
    x = torch.randn(60, 2, generator=generator(9), dtype=torch.float64, requires_grad=True)
    arguments = ways(60, 9)[way]
    found = []
    for function in (ours(name), theirs(name)):
        out = function(x, **arguments)
        out = torch.where(out.isfinite(), out, 0.0)
        (first,) = torch.autograd.grad((out**2).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad((first**3).sum(), x)
        found.append((first.detach(), second))
    torch.testing.assert_close(*found)


def test_groups_without_values() -> None:
    expected = {"sum": 0.0, "mean": 0.0, "max": -np.inf, "min": np.inf, "logsumexp": -np.inf}
    for name in NAMES:
        for x in (torch.ones(2, requires_grad=True), torch.ones(2, 20, requires_grad=True)):
            by_mask = {
                "cu_seqlens": torch.tensor([0, 0, 1, 2]),
                "mask": torch.tensor([True, False]),
            }
            by_ids = {"segment_ids": torch.tensor([1, 1]), "num_segments": 3}
            for arguments, empty in ((by_mask, (0, 2)), (by_ids, (0, 2))):
                out = ours(name)(x, **arguments)
                for s in empty:
                    assert bool((out[s] == expected[name]).all())
                (grad,) = torch.autograd.grad(out[list(empty)].sum(), x)
                assert bool((grad == 0).all())
    nothing = torch.zeros(0)
    assert ours("sum")(nothing, torch.zeros(1, dtype=torch.int64)).shape == (0,)
    assert ours("max")(nothing, torch.zeros(3, dtype=torch.int64)).tolist() == [-np.inf] * 2
    assert ours("sum")(nothing, segment_ids=nothing.long(), num_segments=2).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("columns", [1, 20])
@pytest.mark.parametrize("by_ids", [False, True])
def test_nan_and_infinity(by_ids: bool, columns: int) -> None:
    inf, nan = np.inf, np.nan
    x = torch.tensor([1.0, nan, 3.0, inf, 1.0, -inf, -inf, 2.0, inf, -inf])
    ids = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3, 4, 4])
    where: dict[str, Any] = {"segment_ids": ids, "num_segments": 5}
    if not by_ids:
        where = {"cu_seqlens": torch.tensor([0, 3, 5, 7, 8, 10])}
    expected = {
        "sum": [nan, inf, -inf, 2.0, nan],
        "mean": [nan, inf, -inf, 2.0, nan],
        "max": [nan, inf, -inf, 2.0, inf],
        "min": [nan, 1.0, -inf, 2.0, -inf],
        "logsumexp": [nan, inf, -inf, 2.0, inf],
    }
    for name in NAMES:
        leaf = x[:, None].expand(-1, columns).clone().requires_grad_()
        out = ours(name)(leaf, **where)
        for j in range(columns):
            np.testing.assert_array_equal(out[:, j].detach(), np.array(expected[name], np.float32))
    (grad,) = torch.autograd.grad(core.segment_logsumexp(leaf, **where).sum(), leaf)
    np.testing.assert_array_equal(grad[3:8, 0], np.array([nan, 0.0, 0.0, 0.0, 1.0], np.float32))
    (grad,) = torch.autograd.grad(core.segment_max(leaf, **where).sum(), leaf)
    assert grad[:, 0].tolist() == [0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("way", ["offsets", "ids"])
@pytest.mark.parametrize("columns", [(), (20,)], ids=["vector", "rows"])
def test_the_first_of_equal_values_has_the_gradient(columns: tuple[int, ...], way: str) -> None:
    n = 40_000  # two tiles and several blocks
    x = torch.zeros(n, *columns)
    for name, best in (("max", 1.0), ("min", -1.0)):
        values = x.clone()
        values[[17, 3000, 30_000]] = best
        values.requires_grad_()
        where: dict[str, Any] = {"cu_seqlens": torch.tensor([0, n])}
        if way == "ids":
            where = {"segment_ids": torch.zeros(n, dtype=torch.int64), "num_segments": 1}
        (grad,) = torch.autograd.grad(ours(name)(values, **where).sum(), values)
        assert torch.equal(grad.nonzero()[:, 0].unique(), torch.tensor([17]))


def test_a_mask_over_rows() -> None:
    g = generator(10)
    mask = torch.rand(6, 50, generator=g) > 0.4
    mask[2] = False
    for shape in ((6, 50), (6, 50, 4)):
        x = torch.randn(shape, generator=g)
        hidden = torch.where(mask if x.ndim == 2 else mask[..., None], x, torch.nan)
        wide = mask if x.ndim == 2 else mask[..., None]
        total = torch.where(wide, x, 0.0).sum(1)
        count = mask.sum(1) if x.ndim == 2 else mask.sum(1)[:, None]
        torch.testing.assert_close(core.segment_sum(hidden, mask=mask), total)
        torch.testing.assert_close(
            core.segment_mean(hidden, mask=mask.int()), total / count.clamp(min=1)
        )
        torch.testing.assert_close(
            core.segment_logsumexp(hidden, mask=mask.to(torch.uint8)),
            torch.where(wide, x, -torch.inf).logsumexp(1),
        )
        leaf = hidden.clone().requires_grad_()
        (grad,) = torch.autograd.grad(core.segment_mean(leaf, mask=mask).sum(), leaf)
        torch.testing.assert_close(grad, (wide / count.clamp(min=1)[:, None]).expand_as(grad))


@pytest.mark.parametrize("name", NAMES)
def test_strides_do_not_matter(name: str) -> None:
    base = torch.randn(60, 40, generator=generator(11))
    offsets = offsets_of(60, 5)
    views = {
        "column": base[:, 3],
        "every other column": base[:, ::2],
        "transposed": base.T.contiguous().T,
        "reversed rows": base.flip(0).as_strided((60, 40), (40, 1)),
        "expanded": base[:, :1].expand(60, 12),
        "slice": base[:, 5:25],
    }
    for label, view in views.items():
        results = []
        for x in (view, view.clone(memory_format=torch.contiguous_format)):
            leaf = x.detach().requires_grad_()
            out = ours(name)(leaf, offsets)
            results.append((out.detach(), *torch.autograd.grad(out.sum(), leaf)))
        for a, b in zip(*results):
            torch.testing.assert_close(a, b, msg=lambda m, label=label: f"{label}: {m}")
    negated = torch.complex(base, base).conj().imag
    assert negated.is_neg()
    torch.testing.assert_close(ours(name)(negated, offsets), ours(name)(-base, offsets))


@pytest.mark.parametrize("name", NAMES)
def test_numpy_in_numpy_out(name: str) -> None:
    x = torch.randn(50, 3, generator=generator(12))
    for arguments in ways(50, 4).values():
        given = {k: v.numpy() if isinstance(v, Tensor) else v for k, v in arguments.items()}
        for impl in ("auto", "reference"):
            found = ours(name)(x.numpy(), **given, impl=impl)
            assert type(found) is np.ndarray
            np.testing.assert_allclose(found, ours(name)(x, **arguments), rtol=1e-6, atol=1e-6)


def test_a_retained_graph_gives_the_same_gradient_again() -> None:
    for name in NAMES:
        x = torch.randn(30, generator=generator(13), requires_grad=True)
        out = ours(name)(x, torch.tensor([0, 10, 30])).sum()
        (first,) = torch.autograd.grad(out, x, retain_graph=True)
        kept = first.clone()
        first.mul_(7)
        (again,) = torch.autograd.grad(out, x)
        assert torch.equal(again, kept)


def test_no_graph_where_none_is_wanted() -> None:
    x = torch.randn(30, generator=generator(14))
    offsets = torch.tensor([0, 10, 30])
    assert not core.segment_max(x, offsets).requires_grad
    with torch.no_grad():
        assert not core.segment_max(x.requires_grad_(), offsets).requires_grad
    assert _impl.last_impl("segment_max") == "cpu"
    assert torch.equal(core.segment_max(x, offsets, impl="reference"), core.segment_max(x, offsets))


def test_what_transforms_are_refused() -> None:
    x, offsets = torch.randn(4), torch.tensor([0, 4])
    for call in (
        lambda: torch.func.grad(lambda t: core.segment_sum(t, offsets).sum())(x),
        lambda: torch.func.vmap(lambda t: core.segment_sum(t, offsets))(x[None]),
        lambda: torch.func.jvp(lambda t: core.segment_sum(t, offsets), (x,), (x,)),
    ):
        with pytest.raises(
            NotImplementedError, match=r"^\[segment_sum\] impl: expected 'reference' inside"
        ):
            call()
    (grad,) = torch.func.grad(lambda t: core.segment_sum(t, offsets, impl="reference").sum())(x)[
        None
    ]
    assert torch.equal(grad, torch.ones(4))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=0, max_size=12),
    columns=st.sampled_from([None, 1, 2, 9, 17]),
    name=st.sampled_from(NAMES),
    seed=st.integers(0, 2**20),
)
def test_any_groups(lengths: list[int], columns: int | None, name: str, seed: int) -> None:
    n, g = sum(lengths), generator(seed)
    x = torch.randn((n,) if columns is None else (n, columns), generator=g, dtype=torch.float64)
    offsets = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int64)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), offsets.diff())
    shuffle = torch.randperm(n, generator=g)
    truth = theirs(name)(x, offsets)
    torch.testing.assert_close(ours(name)(x, offsets), truth)
    # A law without a reference: the order of values with ids does not matter.
    by_ids = ours(name)(x[shuffle], segment_ids=ids[shuffle], num_segments=len(lengths))
    torch.testing.assert_close(by_ids, truth)


def test_every_instruction_set(level: str, native: ModuleType) -> None:
    x = torch.randn(5000, 3, generator=generator(16))
    for name in NAMES:
        for where in ways(5000, 40).values():
            for values in (x, x[:, 0], x.bfloat16(), x.half()[:, 0].contiguous()):
                torch.testing.assert_close(
                    ours(name)(values, **where), theirs(name)(values, **where), rtol=2e-6, atol=2e-4
                )
    assert native.last_simd_level() == level
