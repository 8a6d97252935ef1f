# SPDX-License-Identifier: Apache-2.0
"""Layers of a residual stream with a state across depth, in one pass: against float64, laws, closed forms, bits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import assert_no_worse_than_torch, misaligned, strided, with_threads
from hotloop import moe
from hotloop.moe import AdamState, Dispatch, Norm
from row_oracles import (
    FLOATS,
    ORDERS,
    RULES,
    Given,
    arguments,
    converted,
    gradients,
    layer,
    leaves,
    mapped,
    normal,
    normalized,
    results,
)
from torch import Tensor

IMPLS = ("cpu", "reference")
by_impl = pytest.mark.parametrize("impl", IMPLS)
by_rule = pytest.mark.parametrize("rule", RULES)
PLACES = {"none": {"norm": ""}, "layer": {}, "rms": {"norm": "rms"}, "post-layer": {"post_norm": True},
          "post-rms": {"norm": "rms", "post_norm": True}}  # fmt: skip


def step(rule: str, given: Given, impl: str = "cpu") -> list[Tensor]:
    return results(RULES[rule].op(**given, impl=impl))


def everything(rule: str, given: Given, impl: str = "cpu") -> list[Tensor]:
    """Results and gradients."""
    out = step(rule, given, impl)
    return [*out, *gradients(out, given).values()]


def assert_exact(rule: str, given: Given, k: float = 2.0) -> None:
    """No worse than the reference, against float64."""
    wide = converted(given, torch.float64)
    out = layer(rule, wide)
    truth = [*out, *gradients(out, wide).values()]
    other = everything(rule, converted_alike(given), "reference")
    names = ["result"] * len(out) + list(leaves(given))
    x = given["x"]
    for name, ours, theirs, exact in zip(names, everything(rule, given), other, truth, strict=True):
        assert ours.dtype == theirs.dtype, name
        if name in RULES[rule].numbers:
            # One sum over the whole matrix, in which errors of its terms, as large as 1, add up or not by chance.
            eps, floor = max(1e-6, 2 * torch.finfo(x.dtype).eps), math.sqrt(x.numel())
            assert_no_worse_than_torch(ours, theirs, exact, k, eps, floor)
        else:
            assert_no_worse_than_torch(ours, theirs, exact, k)


def converted_alike(given: Given) -> Given:
    return mapped(given, lambda x: x.detach().clone().requires_grad_(x.requires_grad))  # type: ignore[no-any-return]


@by_rule
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("columns", [1, 5, 16, 37, 1029])
def test_values_and_gradients(rule: str, place: str, columns: int) -> None:
    more: Given = {"order": list(ORDERS)[columns % len(ORDERS)], **PLACES[place]}
    assert_exact(rule, arguments(rule, 5, columns, **more))


@by_rule
@pytest.mark.parametrize("order", ORDERS)
def test_orders_of_expert_rows(rule: str, order: str) -> None:
    assert_exact(rule, arguments(rule, 7, 11, order=order))


@by_rule
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("columns", [13, 40])
def test_dtypes_on_every_instruction_set(
    rule: str, dtype: torch.dtype, columns: int, level: str
) -> None:
    """States are float32; without a shared row and without slots."""
    for more in ({}, {"shared": False, "norm": "rms", "tensors": False}, {"slots": False}):
        assert_exact(rule, arguments(rule, 4, columns, dtype=dtype, **more), k=3.0)


@pytest.mark.parametrize("rule", ["momentum", "adam", "robust"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("state", ["none", "float32", "like x"])
def test_states_keep_their_dtype(rule: str, dtype: torch.dtype, state: str) -> None:
    kept = {"none": None, "float32": torch.float32, "like x": dtype}[state]
    given = arguments(rule, 5, 19, dtype=dtype, state=kept, norm="")
    _, *states = step(rule, given)
    assert {s.dtype for s in states} == {torch.float32 if kept is None else kept}
    assert_exact(rule, given, k=3.0)


@by_rule
@pytest.mark.parametrize("place", PLACES)
def test_gradcheck(rule: str, place: str) -> None:
    given = converted(arguments(rule, 3, 5, k=2, state=torch.float64, **PLACES[place]), torch.float64)  # fmt: skip
    if rule == "adam":
        given["eps"] = 0.5
    named = leaves(given)
    assert set(RULES[rule].numbers) <= set(named)

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        by_id = {id(old): new for old, new in zip(named.values(), values)}
        return tuple(step(rule, mapped(given, lambda x: by_id.get(id(x), x))))

    assert torch.autograd.gradcheck(run, list(named.values()))


@by_rule
@pytest.mark.parametrize("place", ["layer", "post-rms"])
def test_each_gradient_alone_has_the_bits_of_all_together(rule: str, place: str) -> None:
    given = arguments(rule, 6, 37, **PLACES[place])
    together = gradients(step(rule, given), given)
    for name in together:
        alone = mapped(given, lambda x: x.detach())
        floats = [x for x in flat(alone) if x.is_floating_point()]
        for other, leaf in zip(floats, together, strict=True):
            other.requires_grad_(leaf == name)
        assert torch.equal(gradients(step(rule, alone), alone)[name], together[name]), name


def flat(given: Any) -> list[Tensor]:
    found: list[Tensor] = []
    mapped(given, lambda x: found.append(x) or x)
    return found


@by_rule
def test_a_gradient_of_one_result_alone(rule: str) -> None:
    """The others are not asked for, so nothing comes from above."""
    given, wide = (converted_alike(arguments(rule, 4, 9)) for _ in range(2))
    wide = converted(wide, torch.float64)
    for i in range(len(step(rule, given))):
        ours = gradients([step(rule, given)[i]], given)
        truth = gradients([layer(rule, wide)[i]], wide)
        for name in truth:
            torch.testing.assert_close(ours[name].double(), truth[name], rtol=1e-5, atol=1e-5)


# -- many rows: past the caches, blocks of tokens, threads ---------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
def test_gradients_of_many_expert_rows(dtype: torch.dtype, level: str) -> None:
    """Rows of 16 MB and more are written past the caches; rows of an odd number of columns start anywhere."""
    columns = 1033 if dtype == torch.float32 else 1051
    tokens = (1 << 24) // columns // dtype.itemsize // 3 + 5
    given = arguments("momentum", tokens, columns, dtype=dtype, tensors=False, shared=False)
    given = {**given, "z": given["z"].detach().requires_grad_()}
    assert given["z"].nbytes > 1 << 24
    out = step("momentum", given)
    weights = normal(tokens, columns, seed=3).to(dtype)
    named = [given["z"], given["topk_weights"]]
    of_rows, of_weights = torch.autograd.grad(out[0], named, weights)
    order: Dispatch = given["dispatch"]
    slots = order.slot_of_row.clamp(min=0)
    each = -0.8 * weights.float()[slots // 3] * given["topk_weights"].detach().view(-1, 1)[slots]
    each[order.slot_of_row < 0] = 0.0
    rtol = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(of_rows, each.to(dtype), rtol=rtol, atol=1e-6)
    rows = given["z"].detach().float()[order.row_of_slot.clamp(min=0)].view(tokens, 3, columns)
    dots = -0.8 * (rows * weights.float()[:, None]).sum(-1)
    dots[order.row_of_slot.view(tokens, 3) < 0] = 0.0
    torch.testing.assert_close(of_weights, dots, rtol=1e-4, atol=1e-3)


@by_rule
def test_threads_change_no_bit(rule: str) -> None:
    """Enough tokens for two threads, and a number of them that two do not divide."""
    given = arguments(rule, 601, 96, order="routed")
    for one, two in zip(*(with_threads(n, lambda: everything(rule, given)) for n in (1, 2)), strict=True):  # fmt: skip
        assert torch.equal(one, two)


@by_rule
def test_sums_over_many_tokens(rule: str) -> None:
    """Gradients of the norm and of the numbers: over 128 blocks."""
    assert_exact(rule, arguments(rule, 1500, 3, slots=False), k=4.0)


# -- laws ----------------------------------------------------------------------------------------------------


@by_impl
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("slots", [True, False])
def test_without_momentum_it_is_the_residual_layer(
    place: str, dtype: torch.dtype, slots: bool, impl: str
) -> None:
    """mu = 0 and gamma = -1, to the last bit, forward and backward; also beside a momentum that is there."""
    plain = arguments("residual", 9, 37, dtype=dtype, slots=slots, **PLACES[place])
    expected = everything("residual", plain, impl)
    for m in (None, normal(9, 37, seed=7)):
        given = {**plain, "m": m, "mu": 0.0, "gamma": -1.0}
        step = moe.momentum_smoe_layer(**given, impl=impl)
        out = [step.x] if step.normed is None else [step.x, step.normed]
        found = [*out, *gradients(out, plain).values()]
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)


@by_impl
@pytest.mark.parametrize("place", ["none", "layer", "post-rms"])
def test_robust_with_d_the_negative_of_m_is_momentum(place: str, impl: str) -> None:
    given = arguments("momentum", 9, 37, **PLACES[place])
    other = {**given, "d": -given["m"].detach()}
    del other["m"]
    out, m, *normed = step("momentum", given, impl)
    same, d, *also = step("robust", other, impl)
    for a, b in zip([out, m, *normed], [same, -d, *also], strict=True):
        assert torch.equal(a, b)


@by_impl
def test_adam_behind_the_first_layer_is_momentum(impl: str) -> None:
    given = arguments("adam", 9, 37)
    state, mu, gamma = (given[k] for k in ("state", "mu", "gamma2"))
    names = ("x", "z", "topk_weights", "dispatch", "shared", "norm")
    kept = {name: given[name] for name in names}
    found = moe.adam_smoe_layer(**{**given, "is_first": False}, impl=impl)
    expected = moe.momentum_smoe_layer(**kept, m=state.m, mu=mu, gamma=gamma, impl=impl)
    assert torch.equal(found.x, expected.x)
    assert torch.equal(found.state.m, expected.m)
    assert torch.equal(found.normed, expected.normed)
    assert found.state.p is state.p
    assert found.state.v is state.v


@by_impl
@pytest.mark.parametrize("rule", ["momentum", "adam", "robust"])
def test_no_state_is_zeros(rule: str, impl: str) -> None:
    given = arguments(rule, 5, 12, state=None)
    zeros = torch.zeros(5, 12)
    name = RULES[rule].state
    other = {**given, name: AdamState(zeros, zeros, zeros) if rule == "adam" else zeros}
    same = [other]
    if rule == "adam":
        same.append({**given, "state": AdamState(None, zeros, None)})
    for each in same:
        for a, b in zip(everything(rule, given, impl), everything(rule, each, impl), strict=True):
            assert torch.equal(a, b)


@by_impl
def test_all_of_a_norm_is_optional(impl: str) -> None:
    given = arguments("residual", 5, 12, norm="")
    h = (layer("residual", given))[0].detach()
    for weight, bias in ((None, None), (normal(12), None), (None, normal(12))):
        for kind in ("layer", "rms"):
            norm = Norm(kind, weight, bias, 1e-2)  # type: ignore[arg-type]
            found = moe.residual_smoe_layer(**given, norm=norm, impl=impl).normed
            torch.testing.assert_close(found, normalized(h, norm))


@pytest.mark.parametrize("dtype", FLOATS)
def test_norms_of_other_dtypes_and_of_a_constant_row(dtype: torch.dtype) -> None:
    """A row without variance divides by sqrt(eps) alone; float64 weights of a norm are read as they are."""
    x = torch.full((3, 8), 5.0).to(dtype)
    weight = torch.linspace(0, 1, 8, dtype=torch.float64)
    found = moe.residual_smoe_layer(x, 0 * x, norm=Norm("layer", weight, weight, 1e-5)).normed
    assert found is not None
    torch.testing.assert_close(found, weight.to(dtype).expand(3, 8))


@by_impl
@by_rule
@pytest.mark.parametrize("slots", [True, False])
def test_no_tokens(rule: str, slots: bool, impl: str) -> None:
    given = arguments(rule, 0, 6, k=2, order="routed", slots=slots)
    found = everything(rule, given, impl)
    assert found[0].shape == (0, 6)
    expected = [x.shape for x in leaves(given).values()]
    assert [x.shape for x in found[-len(expected) :]] == expected
    assert not any(bool(x.any()) for x in found)


@by_rule
@pytest.mark.parametrize("change", [strided, misaligned, lambda x: x.t().contiguous().t()])
def test_any_strides(rule: str, change: Any) -> None:
    given = arguments(rule, 5, 18, tensors=False)
    moved = mapped(given, lambda x: change(x.detach()).requires_grad_() if x.is_floating_point() else x)  # fmt: skip
    for a, b in zip(everything(rule, moved), everything(rule, given), strict=True):
        assert torch.equal(a, b)


@by_rule
def test_one_column_of_a_wider_matrix(rule: str) -> None:
    """(T, 1) with a stride: contiguous to torch whatever the stride of its column."""
    given = arguments(rule, 5, 1)

    def inside(x: Tensor) -> Tensor:
        return x.detach().repeat(1, 3)[:, 1:2].requires_grad_() if x.shape == (5, 1) else x

    wide = mapped(given, inside)
    for a, b in zip(everything(rule, wide), everything(rule, given), strict=True):
        assert torch.equal(a, b)


@by_rule
def test_an_infinity_stays_in_its_token(rule: str) -> None:
    given = arguments(rule, 4, 6, slots=False, tensors=False)
    expected = step(rule, given)
    x = given["x"].detach().clone()
    x[1, 2], x[2, 3] = math.nan, math.inf
    found = step(rule, {**given, "x": x})
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a[[0, 3]], b[[0, 3]])
    assert bool(found[0][1].isnan().any())
    assert not bool(found[0][2].isfinite().all())


# -- closed forms --------------------------------------------------------------------------------------------


@by_impl
def test_the_first_step_of_adam(impl: str) -> None:
    """sign(z) * 0.1 / sqrt(0.001) = 3.1623 for |z| far above sqrt(eps / (1 - beta2)), and 0 for z = 0."""
    z = torch.tensor([[3.0, -0.5, 0.0, 40.0]])
    found = moe.adam_smoe_layer(torch.full_like(z, 9.0), None, z, is_first=True, impl=impl)
    torch.testing.assert_close(found.x, -(0.1 / math.sqrt(0.001)) * z.sign(), rtol=3e-5, atol=0)
    assert found.state.m is not None
    assert torch.equal(found.state.m, z)
    kept = moe.adam_smoe_layer(torch.full_like(z, 9.0), None, z, is_first=True, kappa=0.0, impl=impl)  # fmt: skip
    torch.testing.assert_close(kept.x, found.x + 9.0)


def test_the_slope_of_adam() -> None:
    """-gamma1 ((1 - b1) / s - p' (1 - b2) z / s^3), s = sqrt(v' + eps)."""
    z = normal(3, 7, dtype=torch.float64).requires_grad_()
    p, v = normal(3, 7, seed=1, dtype=torch.float64), normal(3, 7, seed=2).double().square()
    before, options = AdamState(p, v, None), {"gamma1": 0.8, "eps": 1e-3}
    found = moe.adam_smoe_layer(torch.zeros_like(z), before, z, is_first=True, **options)  # type: ignore[arg-type]
    (slope,) = torch.autograd.grad(found.x.sum(), z)
    assert found.state.p is not None
    assert found.state.v is not None
    s = (found.state.v + 1e-3).sqrt()
    torch.testing.assert_close(slope, -0.8 * (0.1 / s - found.state.p * 0.001 * z / s**3))


@by_impl
@pytest.mark.parametrize(("mu", "gamma"), [(0.7, 1.0), (-0.3, 0.5), (0.95, 2.0)])
def test_linear_experts_are_a_heavy_ball(mu: float, gamma: float, impl: str) -> None:
    """x_{t+1} = (1 + mu - gamma lambda) x_t - mu x_{t-1}; it dies out where 0 < gamma lambda < 2 + 2 mu."""
    slopes = torch.tensor([[0.2, 0.9, 1.3, 4.1]], dtype=torch.float64)
    x, m, seen = torch.ones_like(slopes), None, [torch.ones_like(slopes)]
    for _ in range(400):
        x, m, _ = moe.momentum_smoe_layer(x, m, slopes * x, mu=mu, gamma=gamma, impl=impl)  # type: ignore[arg-type]
        seen.append(x)
    for before, now, after in zip(seen, seen[1:20], seen[2:20]):
        torch.testing.assert_close(after, (1 + mu - gamma * slopes) * now - mu * before)
    stable = gamma * slopes < 2 + 2 * mu
    assert torch.equal(x.abs() < 1e-3, stable)


@pytest.mark.parametrize("k", [2.0, 10.0, 100.0])
@pytest.mark.parametrize("lam", [0.0, 0.4, 1.0])
@pytest.mark.filterwarnings("ignore:.*alpha is")
def test_robust_momentum_shrinks_errors_by_p(k: float, lam: float) -> None:
    """The spectral radius over eigenvalues in [L / k, L]; triple momentum and gradient descent at the two ends."""
    size = 3.0
    gamma, mu, alpha, p = moe.robust_momentum_coefficients(size, k, lam)
    eigen = torch.linspace(size / k, size, 401, dtype=torch.float64)
    one = torch.ones_like(eigen)
    # (x', d') from (x, d): d' = mu d - gamma q (x + alpha d), x' = x + d'
    of_d = mu - gamma * alpha * eigen
    rows = [[one - gamma * eigen, of_d], [-gamma * eigen, of_d]]
    matrices = torch.stack([torch.stack(row, -1) for row in rows], -2)
    radius = torch.linalg.eigvals(matrices).abs().max()
    torch.testing.assert_close(float(radius), p, rtol=1e-6, atol=0)
    if lam == 0.0:
        triple = ((1 + p) / size, p**2 / (2 - p), p**2 / ((1 + p) * (2 - p)))
        assert (gamma, mu, alpha) == pytest.approx(triple)
    if lam == 1.0:  # gradient descent in y
        q = torch.linspace(size / k, size, 8, dtype=torch.float64)[None]
        x, d = torch.ones_like(q), None
        y = moe.lookahead(x, d, alpha)
        for _ in range(5):
            x, d, _ = moe.robust_momentum_smoe_layer(x, d, q * y, mu=mu, gamma=gamma)  # type: ignore[arg-type]
            after = moe.lookahead(x, d, alpha)
            torch.testing.assert_close(after, y - q * y / size)
            y = after


def test_a_far_lookahead_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"alpha is 49\.\d at k = 100 and lam = 1"):
        assert moe.robust_momentum_coefficients(1.0, 100.0, 1.0).alpha > 49
    for bad in ((0.0, 2.0, 0.5), (1.0, 1.0, 0.5), (1.0, 2.0, 1.1), (1.0, math.nan, 0.5)):
        with pytest.raises(ValueError, match=r"^\[robust_momentum_coefficients\] \w+: expected a number"):  # fmt: skip
            moe.robust_momentum_coefficients(*bad)


@by_impl
def test_the_norm_of_a_robust_layer_is_that_of_the_lookahead(impl: str) -> None:
    given = arguments("robust", 5, 21)
    found = moe.robust_momentum_smoe_layer(**given, impl=impl)
    ahead = moe.lookahead(found.x, found.d, given["alpha"], norm=given["norm"], impl=impl)
    torch.testing.assert_close(found.normed, ahead)


@by_impl
@pytest.mark.parametrize("norm", ["", "layer", "rms"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_lookahead(norm: str, dtype: torch.dtype, impl: str) -> None:
    made = arguments("robust", 6, 37, dtype=dtype, norm=norm)
    given = {"x": made["x"], "d": made["d"], "alpha": made["alpha"], "norm": made.get("norm")}

    def formula(g: Given) -> Tensor:
        y = g["x"] + g["alpha"] * g["d"]
        return y if g["norm"] is None else normalized(y, g["norm"])

    wide = converted(given, torch.float64)
    truth = [formula(wide), *gradients([formula(wide)], wide).values()]
    steps = []
    for chosen in (impl, "reference"):
        mine = converted_alike(given)
        out = moe.lookahead(**mine, impl=chosen)
        steps.append([out, *gradients([out], mine).values()])
    for ours, other, exact in zip(*steps, truth, strict=True):
        assert_no_worse_than_torch(ours, other, exact, k=3.0)
    nothing = moe.lookahead(given["x"], None, 0.5, norm=given["norm"], impl=impl)
    still = moe.lookahead(given["x"], torch.zeros(6, 37), 0.5, norm=given["norm"], impl=impl)
    torch.testing.assert_close(nothing, still)


# -- torch ---------------------------------------------------------------------------------------------------


@by_rule
@pytest.mark.parametrize("place", ["layer", "post-rms"])
def test_what_backward_reads_is_watched(rule: str, place: str) -> None:
    """An argument or a result that is changed in place between forward and backward: an error, or it was not read."""
    made = arguments(rule, 4, 6, tensors=False, **PLACES[place])
    expected = everything(rule, made)
    for i in range(len(flat(made)) + len(step(rule, made))):
        given = mapped(made, lambda x: x.detach().clone().requires_grad_(x.requires_grad))
        out = step(rule, given)
        changed = [*flat(given), *out][i]
        kept = [x.detach().clone() for x in out]
        with torch.no_grad():
            changed.add_(0 if not changed.is_floating_point() else 1)
        try:
            found = gradients(out, given)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)  # noqa: PT017
            continue
        for a, b in zip([*kept, *found.values()], expected, strict=True):
            assert torch.equal(a, b)


@by_rule
def test_second_derivatives_and_transforms(rule: str) -> None:
    given = converted(arguments(rule, 3, 4, k=2, state=torch.float64), torch.float64)
    rest = {k: v for k, v in given.items() if k != "x"}

    def run(impl: str) -> Any:
        return lambda x: step(rule, {**rest, "x": x}, impl)[-1].square().sum()

    x = given["x"]
    with pytest.raises(NotImplementedError, match=r"impl: expected 'reference' for a gradient"):
        torch.autograd.grad(run("cpu")(x), x, create_graph=True)
    for transform, v in ((torch.func.grad, x), (torch.func.vmap, x[None])):
        with pytest.raises(NotImplementedError, match=r"expected 'reference' inside a torch\.func"):
            transform(run("cpu"))(v)
    (expected,) = torch.autograd.grad(run("cpu")(x), x)
    torch.testing.assert_close(torch.func.grad(run("reference"))(x), expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="inside forward-mode AD"):
            run("cpu")(dual)


@by_rule
def test_inference_mode(rule: str) -> None:
    given = arguments(rule, 4, 6)
    with torch.inference_mode():
        found = step(rule, given)
    for a, b in zip(found, step(rule, given), strict=True):
        assert torch.equal(a, b)
        assert not a.requires_grad


@pytest.mark.slow
@by_rule
@pytest.mark.parametrize("place", ["none", "post-rms"])
def test_compiles_in_ways_the_catalogue_does_not_call(rule: str, place: str) -> None:
    """Two tokens fewer each time with the same graph; without gradients; without slots."""
    torch.compiler.reset()
    run = torch.compile(
        lambda **given: step(rule, given, "auto"), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for tokens in (7, 5):
        given = arguments(rule, tokens, 10, slots=place == "none", **PLACES[place])
        out = run(**given)
        for a, b in zip([*out, *gradients(out, given).values()], everything(rule, given), strict=True):  # fmt: skip
            torch.testing.assert_close(a, b)
        with torch.no_grad():
            for a, b in zip(run(**given), step(rule, given), strict=True):
                assert torch.equal(a, b)
