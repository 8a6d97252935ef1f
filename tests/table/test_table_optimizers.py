# SPDX-License-Identifier: Apache-2.0
"""Row optimizers against their float64 reference, plain torch, each other's instruction sets, and array libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_no_worse_than_torch, misaligned, with_threads
from hotloop import table
from hotloop.front import impl as _impl
from hotloop.front import native
from table_cases import BY_NAME, CASES, Case, by_case, inputs
from torch import Tensor

CORE = native.core
LEVELS = tuple(name for name, runs in CORE.simd_levels().items() if runs)
HALVES = (torch.float16, torch.bfloat16)

# No rows; no columns; one number; a prime; a cache line and a vector more or less; a chunk of half rows more or less.
SHAPES = ((0, 5), (3, 0), (1, 1), (2, 13), (5, 63), (5, 64), (5, 65), (2, 255), (2, 256), (3, 257))


def rows_apart(x: Tensor) -> Tensor:
    buffer = torch.full((x.shape[0], x.shape[1] + 3), torch.nan, dtype=x.dtype)
    buffer[:, 1:-2] = x
    return buffer[:, 1:-2]


def columns_apart(x: Tensor) -> Tensor:
    buffer = torch.full((x.shape[0], 2 * x.shape[1]), torch.nan, dtype=x.dtype)
    buffer[:, ::2] = x
    return buffer[:, ::2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda x: x.clone(),
    "misaligned": misaligned,
    "rows apart": rows_apart,
    "columns apart": columns_apart,
    "transposed": lambda x: x.t().contiguous().t(),
}


def run(
    case: Case,
    shape: tuple[int, int],
    dtype: torch.dtype,
    impl: str,
    layout: str = "dense",
    **more: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weight and state after three steps."""
    weight, grads = inputs(*shape)
    place = LAYOUTS[layout]
    w = place(weight.to(dtype))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    state = {
        k: x.clone() if x.ndim == 1 else place(x) for k, x in case.state(*shape, dtype=wide).items()
    }
    for g in grads:
        case.call(w, place(g.to(wide)), state, impl=impl, **more)
        assert _impl.last_impl(case.op) == impl
    return w, state


def plain(
    case: Case, shape: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, dict[str, Tensor]]:
    weight, grads = inputs(*shape)
    w = weight.to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    state = case.state(*shape, dtype=wide)
    for g in grads:
        w = case.plain_call(w, g.to(wide), state)
    return w, state


@by_case
def test_reference_is_the_rule_in_plain_torch(case: Case) -> None:
    shape = (4, 7)
    ours, state = run(case, shape, torch.float64, "reference")
    theirs, their_state = plain(case, shape, torch.float64)
    # Two float64 evaluations that round differently; FTRL's z cancels.
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)
    for name, x in state.items():
        torch.testing.assert_close(x, their_state[name], rtol=1e-12, atol=1e-12)


@by_case
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_grid(case: Case, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    # The last of three steps from the same start: earlier ones would let roundings of half weights drift apart.
    weight, grads = inputs(*shape)
    state = case.state(*shape)
    w = weight.to(dtype)
    for g in grads[:-1] if min(shape) else ():
        w = case.plain_call(w, g, state)
    true_state = {k: x.double() for k, x in state.items()}
    same_state = {k: x.clone() for k, x in state.items()}
    truth, same = w.double(), w.clone()
    if min(shape):
        truth = case.plain(truth, grads[-1].double(), true_state, **case.settings)
        same = case.plain_call(w, grads[-1], same_state)
    for impl in ("cpu", "reference"):
        ours, our_state = w.clone(), {k: x.clone() for k, x in state.items()}
        case.call(ours, grads[-1], our_state, impl=impl)
        assert _impl.last_impl(case.op) == impl
        assert_no_worse_than_torch(ours, same, truth)
        for name, x in our_state.items():
            assert_no_worse_than_torch(x, same_state[name], true_state[name])


@by_case
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts_give_the_same_bits(case: Case, layout: str, dtype: torch.dtype) -> None:
    for impl in ("cpu", "reference"):
        wanted, wanted_state = run(case, (3, 65), dtype, impl)
        ours, state = run(case, (3, 65), dtype, impl, layout)
        assert torch.equal(ours, wanted)
        assert all(torch.equal(state[k], wanted_state[k]) for k in state)
        if layout == "rows apart":
            assert bool(ours._base.isnan()[:, [0, -1]].all()), "wrote beside the rows"


@by_case
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("seed", [None, 7])
def test_instruction_sets_give_the_same_bits(
    case: Case, dtype: torch.dtype, seed: int | None
) -> None:
    found = {}
    for name in LEVELS:
        CORE.force_simd_level(name)
        found[name] = [run(case, (3, dim), dtype, "cpu", rounding_seed=seed) for dim in (64, 301)]
        assert CORE.last_simd_level() == name
    for name in LEVELS[1:]:
        for (w, s), (wanted, wanted_state) in zip(found[name], found[LEVELS[0]]):
            assert torch.equal(w, wanted)
            assert all(torch.equal(s[k], wanted_state[k]) for k in s)


@by_case
def test_threads_give_the_same_bits(case: Case) -> None:
    shape = (3000, 64)  # above the grain of one thread

    def weights() -> Tensor:
        return run(case, shape, torch.float32, "cpu")[0]

    assert torch.equal(with_threads(1, weights), with_threads(2, weights))


@by_case
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_numpy_is_updated_in_place_to_the_same_bits(case: Case, dtype: Any) -> None:
    kind = torch.from_numpy(np.zeros(1, dtype)).dtype
    impl = "reference" if dtype is np.float64 else "cpu"  # what "auto" takes
    wanted, wanted_state = run(case, (3, 5), kind, impl)
    weight, grads = inputs(3, 5)
    w = weight.numpy().astype(dtype)
    wide = np.float64 if dtype is np.float64 else np.float32
    start = case.state(3, 5, torch.float64 if dtype is np.float64 else torch.float32)
    state = {k: x.numpy().reshape(3, -1) for k, x in start.items()}  # scalars as (U, 1)
    for g in grads:
        case.call(w, g.numpy().astype(wide), state)
    assert _impl.last_impl(case.op) == impl
    assert w.dtype == dtype
    assert np.array_equal(w, wanted.numpy())
    assert all(
        np.array_equal(x.reshape(wanted_state[k].shape), wanted_state[k]) for k, x in state.items()
    )


def test_negative_strides_and_an_element_inside() -> None:
    case = BY_NAME["adam"]
    wanted, _ = run(case, (3, 5), torch.float32, "cpu")
    weight, grads = inputs(3, 5)
    w = weight.numpy()[::-1].copy()[::-1]
    state = {k: x.numpy()[::-1].copy()[::-1] for k, x in case.state(3, 5).items()}
    assert w.strides[0] < 0
    for g in grads:
        case.call(w, g.numpy(), state, impl="cpu")
    assert np.array_equal(w, wanted.numpy())


def test_parameters_that_require_a_gradient_are_written_and_autograd_notices() -> None:
    weight, grads = inputs(3, 5)
    for impl in ("cpu", "reference"):
        p = torch.nn.Parameter(weight.clone())
        loss = (p * p).sum()
        table.sparse_sgd_update(p, grads[0], lr=1.0, impl=impl)
        assert torch.allclose(p.detach(), weight - grads[0])
        assert p.requires_grad and p.grad is None
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_not_a_number_stays_where_it_is() -> None:
    for case in CASES:
        weight, grads = inputs(2, 20)
        g = grads[0].clone()
        g[0, 3] = torch.nan
        per_row = (
            case.op in ("rowwise_adagrad_update",) or "group" in case.name or "rowwise" in case.name
        )
        for impl in ("cpu", "reference"):
            w, state = weight.clone(), case.state(2, 20)
            case.call(w, g, state, impl=impl)
            assert bool(w[0, 3].isnan()), case.name
            assert not bool(w[1].isnan().any()), case.name
            if not per_row:
                assert int(w.isnan().sum()) == 1, case.name


def test_step_as_a_number_is_that_of_all_rows() -> None:
    weight, grads = inputs(3, 5)
    for impl in ("cpu", "reference"):
        for square in (torch.zeros(3, 5), torch.zeros(3)):
            a, b = weight.clone(), weight.clone()
            m, v, step = torch.zeros(3, 5), square.clone(), torch.full((3,), 4.0)
            table.sparse_adam_update(a, grads[0], m, v, step, impl=impl)
            table.sparse_adam_update(b, grads[0], torch.zeros(3, 5), square.clone(), 5, impl=impl)
            assert torch.equal(a, b)
            assert step.tolist() == [5.0] * 3
