# SPDX-License-Identifier: Apache-2.0
"""Row optimizers against optimizers that are not ours, and laws that need no reference."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_no_worse_than_torch
from hotloop import table
from table_cases import BY_NAME, CASES, inputs
from torch import Tensor

IMPLS = ("cpu", "reference")
STEPS = 12
ROWS, DIM = 6, 9


def gradients(seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(ROWS, DIM, generator=g) for _ in range(STEPS)]


def start() -> Tensor:
    return inputs(ROWS, DIM, seed=9)[0]


def torch_weights(make: Any, dtype: torch.dtype, sparse: list[Tensor] | None = None) -> Tensor:
    """The weight after all steps of an optimizer of torch; ``sparse``: the rows each step touches."""
    p = torch.nn.Parameter(start().to(dtype))
    optimizer = make([p])
    for i, g in enumerate(gradients()):
        g = g.to(dtype)
        if sparse is not None:
            rows = sparse[i]
            g = torch.sparse_coo_tensor(
                rows[None], g[: len(rows)], (ROWS, DIM), check_invariants=True
            )
        p.grad = g
        optimizer.step()
    return p.detach()


def check(ours: Tensor, make: Any, sparse: list[Tensor] | None = None) -> None:
    truth = torch_weights(make, torch.float64, sparse)
    # Twelve steps, each as good as torch's float32, whose errors add up by chance.
    assert_no_worse_than_torch(ours, torch_weights(make, torch.float32, sparse), truth, k=3)


TORCH = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd_decay": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.3),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "adagrad_monolith": lambda p: torch.optim.Adagrad(
        p, lr=0.1, eps=0.0, initial_accumulator_value=0.1
    ),
    "adagrad_l2": lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=0.3),
    "adam_l2": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.3),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", TORCH)
def test_rows_touched_in_every_step_move_as_by_torchs_optimizer(impl: str, name: str) -> None:
    w, state = start(), BY_NAME[name].state(ROWS, DIM)
    for g in gradients():
        BY_NAME[name].call(w, g, state, impl=impl)
    check(w, TORCH[name])


@pytest.mark.parametrize("impl", IMPLS)
def test_adam_with_a_step_of_all_rows_is_torchs_sparse_adam(impl: str) -> None:
    """torch.optim.SparseAdam adds eps where TensorFlow does, unlike torch.optim.Adam."""
    rows = [
        torch.randperm(ROWS, generator=torch.Generator().manual_seed(i))[: 1 + i % 4].sort().values
        for i in range(STEPS)
    ]
    settings = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 0.01}
    w = start()
    state = table.Adam(**settings).init_state(ROWS, DIM, like=w)
    for t, (g, r) in enumerate(zip(gradients(), rows), 1):
        part = [x[r] for x in (w, state["exp_avg"], state["exp_avg_sq"])]
        table.sparse_adam_update(
            part[0], g[: len(r)], part[1], part[2], t, **settings, eps_mode="tensorflow", impl=impl
        )
        w[r], state["exp_avg"][r], state["exp_avg_sq"][r] = part
    check(w, lambda p: torch.optim.SparseAdam(p, **settings), rows)


@pytest.mark.parametrize("impl", IMPLS)
def test_tensorflows_eps_is_adams_scaled_by_the_correction(impl: str) -> None:
    b2, eps = 0.99, 0.01
    w, m, v, step = start(), torch.zeros(ROWS, DIM), torch.zeros(ROWS, DIM), torch.zeros(ROWS)
    for g in gradients():
        table.sparse_adam_update(
            w, g, m, v, step, lr=0.1, betas=(0.9, b2), eps=eps, eps_mode="tensorflow", impl=impl
        )

    class Scaled(torch.optim.Adam):
        t = 0

        def step(self, closure: Any = None) -> None:
            self.t += 1
            self.param_groups[0]["eps"] = eps / math.sqrt(1 - b2**self.t)
            super().step()

    check(w, lambda p: Scaled(p, lr=0.1, betas=(0.9, b2)))


def torchrec(dtype: torch.dtype, lr: float, eps: float) -> Tensor:
    """torchrec/optim/rowwise_adagrad.py, its dense form."""
    w, s = start().to(dtype), torch.zeros(ROWS, 1, dtype=dtype)
    for g in gradients():
        g = g.to(dtype)
        s += g.pow(2).mean(dim=1, keepdim=True)
        w.addcdiv_(g, s.sqrt().add_(eps).expand_as(g), value=-lr)
    return w


@pytest.mark.parametrize("impl", IMPLS)
def test_rowwise_adagrad_is_torchrecs(impl: str) -> None:
    w, s = start(), torch.zeros(ROWS)
    for g in gradients():
        table.rowwise_adagrad_update(w, g, s, lr=0.1, eps=1e-10, impl=impl)
    assert_no_worse_than_torch(
        w, torchrec(torch.float32, 0.1, 1e-10), torchrec(torch.float64, 0.1, 1e-10), k=3
    )


class River:
    """river/optim/ftrl.py: weights made from z and n when a sample comes, state moved by its gradient."""

    def __init__(self, n: int, alpha: float, beta: float, l1: float, l2: float) -> None:
        self.z, self.n = [0.0] * n, [0.0] * n
        self.w = [0.0] * n
        self.alpha, self.beta, self.l1, self.l2 = alpha, beta, l1, l2

    def weights(self) -> list[float]:
        for i, (z, n) in enumerate(zip(self.z, self.n)):
            if abs(z) > self.l1:
                sign = (z > 0) - (z < 0)
                self.w[i] = -(z - sign * self.l1) / ((self.beta + n**0.5) / self.alpha + self.l2)
            else:
                self.w[i] = 0.0
        return self.w

    def step(self, g: list[float]) -> None:
        for i, x in enumerate(g):
            sigma = ((self.n[i] + x**2) ** 0.5 - self.n[i] ** 0.5) / self.alpha
            self.z[i] += x - sigma * self.w[i]
            self.n[i] += x**2


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("alpha", "beta", "l1", "l2"),
    [(0.05, 1.0, 0.0, 1.0), (0.5, 1.0, 0.3, 0.1), (0.1, 0.5, 2.0, 0.0)],
)
def test_ftrl_trains_a_logistic_model_as_river_does(
    impl: str, alpha: float, beta: float, l1: float, l2: float
) -> None:
    rng = np.random.default_rng(3)
    truth = rng.normal(size=8) * (np.arange(8) % 2)
    river = River(8, alpha, beta, l1, l2)
    w, z, n = (
        np.zeros((1, 8), np.float64 if impl == "reference" else np.float32) for _ in range(3)
    )
    zeros = 0
    for _ in range(200):
        x = rng.normal(size=8)
        y = rng.random() < 1 / (1 + math.exp(-x @ truth))
        theirs = np.array(river.weights())
        np.testing.assert_allclose(
            w[0],
            theirs,
            rtol=1e-12 if impl == "reference" else 2e-5,
            atol=1e-14 if impl == "reference" else 2e-6,
        )
        # Where one is 0 the other is, but for z that rounding puts on the other side of l1: not here.
        assert np.array_equal(w[0] == 0, theirs == 0)
        zeros += int((theirs == 0).sum())
        g = (1 / (1 + math.exp(-x @ theirs)) - y) * x
        river.step(g.tolist())
        table.ftrl_proximal_update(
            w, g[None].astype(w.dtype), z, n, lr=alpha, beta=beta, l1=l1, l2=l2, impl=impl
        )
    assert zeros > (200 if l1 == 2.0 else 0)


@pytest.mark.parametrize("impl", IMPLS)
def test_ftrl_without_regularisation_is_adagrad(impl: str) -> None:
    dtype = torch.float64 if impl == "reference" else torch.float32
    w, z, n = (
        torch.zeros(ROWS, DIM, dtype=dtype),
        torch.zeros(ROWS, DIM, dtype=dtype),
        torch.full((ROWS, DIM), 0.1, dtype=dtype),
    )
    a, s = w.clone(), n.clone()
    for g in gradients():
        table.ftrl_proximal_update(w, g.to(dtype), z, n, lr=0.1, beta=0, l1=0, l2=0, impl=impl)
        table.sparse_adagrad_update(a, g.to(dtype), s, lr=0.1, eps=0, impl=impl)
        tight = (
            {"rtol": 1e-12, "atol": 1e-13} if impl == "reference" else {"rtol": 1e-5, "atol": 1e-6}
        )
        torch.testing.assert_close(w, a, **tight)


@pytest.mark.parametrize("impl", IMPLS)
def test_ftrl_at_l1_and_below_is_exactly_zero(impl: str) -> None:
    z = torch.tensor([[-1.0, -0.999, 0.0, 1.0, 1.001, -1.001]])
    for group in (False, True):
        w, g = torch.ones(1, 6), torch.zeros(1, 6)
        table.ftrl_proximal_update(
            w, g, z.clone(), torch.ones(1, 6), l1=1.0, group=group, impl=impl
        )
        if group:
            assert bool((w != 0).eq(z != 0).all())  # norm above l1: no element is cut
        else:
            assert w[0, :4].tolist() == [0.0] * 4
            assert float(w[0, 4]) < 0 < float(w[0, 5])
    w = torch.ones(1, 6)
    table.ftrl_proximal_update(
        w, torch.zeros(1, 6), z, torch.ones(1, 6), l1=2.3, group=True, impl=impl
    )
    assert w.tolist() == [[0.0] * 6]


@pytest.mark.parametrize("impl", IMPLS)
def test_group_adagrad_penalty(impl: str) -> None:
    w0, g = start(), gradients()[0]
    rows = {}
    for l2 in (0.0, 3.0, 1e6):
        w, s = w0.clone(), torch.full((ROWS,), 0.1)
        table.group_adagrad_update(w, g, s, lr=0.1, l2=l2, impl=impl)
        rows[l2] = w
        torch.testing.assert_close(s, 0.1 + g.abs().amax(1) ** 2)
    eta = 0.1 / (0.1 + g.abs().amax(1) ** 2).sqrt()
    torch.testing.assert_close(rows[0.0], w0 - eta[:, None] * g)
    assert bool((rows[1e6] == 0).all())
    # Between: the same direction, shorter by eta l2.
    shorter = rows[0.0].norm(dim=1) - rows[3.0].norm(dim=1)
    torch.testing.assert_close(shorter, 3.0 * eta)
    cosine = torch.nn.functional.cosine_similarity(rows[0.0], rows[3.0])
    torch.testing.assert_close(cosine, torch.ones(ROWS))


@pytest.mark.parametrize("impl", IMPLS)
def test_one_column_rowwise_is_elementwise(impl: str) -> None:
    def weights(op: Any, *state: Tensor) -> Tensor:
        w = torch.zeros(ROWS, 1)
        for g in gradients():
            op(w, g[:, :1], *state)
        return w

    def compare(a: Tensor, b: Tensor) -> None:
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7)

    compare(
        weights(
            lambda *a: table.rowwise_adagrad_update(*a, eps=1e-10, impl=impl), torch.zeros(ROWS)
        ),
        weights(lambda *a: table.sparse_adagrad_update(*a, impl=impl), torch.zeros(ROWS, 1)),
    )
    adam = lambda *a: table.sparse_adam_update(*a, impl=impl)  # noqa: E731
    compare(
        weights(adam, torch.zeros(ROWS, 1), torch.zeros(ROWS), torch.zeros(ROWS)),
        weights(adam, torch.zeros(ROWS, 1), torch.zeros(ROWS, 1), torch.zeros(ROWS)),
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_zero_gradients_without_decay_move_nothing(impl: str) -> None:
    for name in (
        "sgd",
        "rowwise_adagrad",
        "adagrad",
        "adagrad_monolith",
        "adam",
        "adam_rowwise",
        "adam_nesterov",
        "group_adagrad",
    ):
        case = BY_NAME[name]
        settings = {
            **case.settings,
            **({"weight_decay": 0.0} if "weight_decay" in case.settings else {}),
        }
        w, state = start(), case.state(ROWS, DIM)
        before = {k: x.clone() for k, x in state.items()}
        for _ in range(3):
            arrays = (state[c] for c in case.columns)
            getattr(table, case.op)(w, torch.zeros(ROWS, DIM), *arrays, **settings, impl=impl)
        assert torch.equal(w, start()), name
        assert all(torch.equal(state[k], before[k]) for k in state if k != "step"), name
    # No eps and a sum of 0: 0 / 0 elsewhere.
    w = start()
    table.sparse_adagrad_update(w, torch.zeros(ROWS, DIM), torch.zeros(ROWS, DIM), eps=0, impl=impl)
    table.rowwise_adagrad_update(w, torch.zeros(ROWS, DIM), torch.zeros(ROWS), eps=0, impl=impl)
    table.group_adagrad_update(w, torch.zeros(ROWS, DIM), torch.zeros(ROWS), l2=1, impl=impl)
    assert torch.equal(w, start())


@pytest.mark.parametrize("impl", IMPLS)
def test_decay_alone_shrinks_by_its_factor(impl: str) -> None:
    for name in ("rowwise_adagrad_decoupled", "adagrad_decoupled", "adamw"):
        case = BY_NAME[name]
        w, state = start(), case.state(ROWS, DIM)
        case.call(w, torch.zeros(ROWS, DIM), state, impl=impl)
        torch.testing.assert_close(w, start() * (1 - 0.1 * 0.3))


@pytest.mark.parametrize("impl", IMPLS)
def test_constant_gradient(impl: str) -> None:
    """Step t of Adagrad is lr / sqrt(t), whatever the gradient's size; of Adam it is lr."""
    g = torch.tensor([[1e-6, 1e-3, 1.0, 1e3, -1e6]])
    w, s = torch.zeros(1, 5), torch.zeros(1, 5)
    u, m, v, step = (torch.zeros(1, 5), torch.zeros(1, 5), torch.zeros(1, 5), torch.zeros(1))
    for t in range(1, 9):
        before, ubefore = w.clone(), u.clone()
        table.sparse_adagrad_update(w, g, s, lr=1.0, eps=0, impl=impl)
        table.sparse_adam_update(u, g, m, v, step, lr=1.0, eps=0, impl=impl)
        torch.testing.assert_close(
            (before - w).abs(), torch.full((1, 5), t**-0.5), rtol=2e-5, atol=0
        )
        torch.testing.assert_close((ubefore - u).abs(), torch.ones(1, 5), rtol=2e-5, atol=0)


@pytest.mark.parametrize("t", [1, 2, 10, 1000, 100_000, 2**24])
def test_bias_correction_is_exact_at_any_age(t: int) -> None:
    """exp_avg = g (1 - b1^t) and exp_avg_sq = g^2 (1 - b2^t) give a step of lr to a few units in the last place."""
    b1, b2 = 0.9, 0.9999
    c1, c2 = -math.expm1(t * math.log(b1)), -math.expm1(t * math.log(b2))
    w, g = torch.zeros(1, 3), torch.full((1, 3), 2.0)
    m, v = torch.full((1, 3), 2.0 * c1), torch.full((1, 3), 4.0 * c2)
    # beta1 = 0 and beta2 = 0 of the step itself would hide the history, so undo it: the state before step t.
    m, v = (m - (1 - b1) * 2) / b1, (v - (1 - b2) * 4) / b2
    step = torch.full((1,), float(t - 1))
    table.sparse_adam_update(w, g, m, v, step, lr=1.0, betas=(b1, b2), eps=0, impl="cpu")
    torch.testing.assert_close(w, torch.full((1, 3), -1.0), rtol=3e-6 if t > 1 else 3e-7, atol=0)
    assert float(step) == t


def test_every_rule_learns_a_bowl() -> None:
    target = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    for case in CASES:
        if (
            "weight_decay" in case.settings
            or "l2" in case.name
            or case.name in ("adamw", "adam_nesterov", "ftrl", "ftrl_group")
        ):
            continue  # drawn elsewhere than to the target
        w, state = torch.zeros(4, 8), case.state(4, 8)
        for _ in range(400):
            case.call(w, w - target, state, impl="cpu")
        assert float((w - target).norm() / target.norm()) < 0.25, case.name
