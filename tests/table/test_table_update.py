"""``Table.update``: every rule against torch.optim or its formula in float64, on merged gradients."""

import numpy as np
import pytest
import torch
from hotloop.table import (
    FTRL,
    SGD,
    Adagrad,
    Adam,
    Constant,
    GroupAdagrad,
    RowwiseAdagrad,
    Table,
    Uniform,
)
from refusals import refused

RULES = (
    SGD(lr=0.1, weight_decay=0.01),
    RowwiseAdagrad(lr=0.1, eps=1e-6, initial_accumulator_value=0.1, weight_decay=0.01),
    RowwiseAdagrad(lr=0.1, weight_decay=0.1, weight_decay_mode="decoupled"),
    Adagrad(lr=0.1, weight_decay=0.01, initial_accumulator_value=0.05),
    Adam(lr=0.05, weight_decay=0.01),
    Adam(lr=0.05, weight_decay=0.1, weight_decay_mode="decoupled", betas=(0.8, 0.95)),
    Adam(lr=0.05, eps=1e-3, eps_mode="tensorflow"),
    Adam(lr=0.05, rowwise=True),
    Adam(lr=0.05, nesterov=True),
    FTRL(lr=0.3, l1=0.05, l2=0.2),
    FTRL(lr=0.3, l1=0.2, group=True, initial_accumulator_value=0.1),
    GroupAdagrad(lr=0.1, beta=0.1, weight_decay=0.01),
    GroupAdagrad(lr=0.2, l2=0.3),
)


def named(rule):
    return repr(rule).replace("stochastic_rounding=False", "")[:60]


class Formula:
    """The rules in float64 on one row, from their papers."""

    def __init__(self, rule, w):
        self.rule, self.w = rule, w.astype(np.float64)
        start = getattr(rule, "initial_accumulator_value", 0.0)
        self.n = np.full(w.shape, start)
        self.sum = start
        self.z = np.zeros(w.shape)
        self.m, self.v, self.t = np.zeros(w.shape), np.zeros(w.shape), 0

    def step(self, g):
        r, w = self.rule, self.w
        decay = getattr(r, "weight_decay", 0.0)
        decoupled = getattr(r, "weight_decay_mode", "l2") == "decoupled"
        shrunk = w * (1 - r.lr * decay) if decoupled else w
        if not decoupled:
            g = g + decay * w
        if isinstance(r, SGD):
            self.w = shrunk - r.lr * g
        elif isinstance(r, RowwiseAdagrad):
            self.sum += (g**2).mean()
            self.w = shrunk - r.lr * g / (np.sqrt(self.sum) + r.eps)
        elif isinstance(r, Adagrad):
            self.n = self.n + g**2
            self.w = shrunk - r.lr * g / (np.sqrt(self.n) + r.eps)
        elif isinstance(r, Adam):
            self.t += 1
            b1, b2 = r.betas
            self.m = b1 * self.m + (1 - b1) * g
            self.v = b2 * self.v + (1 - b2) * ((g**2).mean() if r.rowwise else g**2)
            ahead = (1 - b1) * g + b1 * self.m if r.nesterov else self.m
            c1, c2 = 1 - b1**self.t, 1 - b2**self.t
            if r.eps_mode == "torch":
                self.w = shrunk - r.lr * (ahead / c1) / (np.sqrt(self.v / c2) + r.eps)
            else:
                rate = r.lr * np.sqrt(c2) / c1
                self.w = shrunk - rate * ahead / (np.sqrt(self.v) + r.eps)
        elif isinstance(r, FTRL):
            sigma = (np.sqrt(self.n + g**2) - np.sqrt(self.n)) / r.lr
            self.z = self.z + g - sigma * w
            self.n = self.n + g**2
            below = (r.beta + np.sqrt(self.n)) / r.lr + r.l2
            if r.group:
                norm = np.linalg.norm(self.z)
                self.w = -max(0.0, 1 - r.l1 / norm) * self.z / below
            else:
                beyond = np.maximum(np.abs(self.z) - r.l1, 0)
                self.w = -np.sign(self.z) * beyond / below
        else:
            self.sum += (g**2).max()
            rate = r.lr / (r.beta + np.sqrt(self.sum))
            y = w - rate * g
            norm = np.linalg.norm(y)
            self.w = max(0.0, 1 - r.l2 * rate / norm) * y


@pytest.mark.parametrize("dim", [1, 2, 7, 64, 300])
@pytest.mark.parametrize("rule", RULES, ids=named)
def test_rules_against_their_formula(level, rule, dim):
    """Ten steps of float32 against float64: each rounds a few times, so 10^-5 of the weights' size."""
    rng = np.random.default_rng(dim)
    keys = np.array([5, -9, 2**63 - 1, 0, 77])
    table = Table(dim, optimizer=rule, initializer=Uniform(-1, 1))
    start = table.find_or_insert(keys).values
    rows = {key: Formula(rule, w) for key, w in zip(keys.tolist(), start)}
    zeros = 0
    for _ in range(10):
        batch = rng.choice(keys, 8)
        grads = rng.normal(size=(8, dim)).astype(np.float32) * np.float32(0.3)
        assert table.update(batch, grads) == 0
        for key in set(batch.tolist()):
            merged = np.zeros(dim, np.float32)
            for g in grads[batch == key]:
                merged += g  # in the order of the batch, in float32
            rows[key].step(merged.astype(np.float64))
        found = table.find(keys).values
        wanted = np.stack([rows[key].w for key in keys.tolist()])
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
        zeros += (found == 0).sum()
        np.testing.assert_array_equal(found == 0, wanted == 0)
    assert np.abs(found - start).max() > 0.05
    if isinstance(rule, FTRL) and dim > 1 and not rule.group:
        assert zeros > 0


TORCH = (
    (SGD(lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
    (Adagrad(lr=0.1), lambda p: torch.optim.Adagrad(p, lr=0.1)),
    (Adam(lr=0.1), lambda p: torch.optim.SparseAdam(p, lr=0.1)),
    (Adam(lr=0.1, weight_decay=0.1), lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1)),
    (
        Adam(lr=0.1, weight_decay=0.1, weight_decay_mode="decoupled"),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    ),
)


@pytest.mark.parametrize(("rule", "peer"), TORCH, ids=[named(r) for r, _ in TORCH])
def test_rules_against_torch(rule, peer):
    """Every row in every batch where torch counts steps for all rows at once; our error is at most twice torch's."""
    rng = np.random.default_rng(2)
    keys, dim = np.arange(40) * 7 - 100, 16
    table = Table(dim, optimizer=rule, initializer=Uniform(-1, 1))
    start = table.find_or_insert(keys).values
    every = not isinstance(rule, (SGD, Adagrad))
    answers = []
    steps = [
        (np.concatenate([keys, rng.choice(keys, 30)]) if every else rng.choice(keys, 50))
        for _ in range(8)
    ]
    grads = [rng.normal(size=(len(b), dim)).astype(np.float32) for b in steps]
    for dtype in (torch.float32, torch.float64):
        weight = torch.nn.Parameter(torch.from_numpy(start).to(dtype))
        optimizer = peer([weight])
        for batch, g in zip(steps, grads):
            at = torch.from_numpy(np.searchsorted(keys, batch))
            dense = torch.zeros(weight.shape, dtype=dtype)
            dense.index_add_(0, at, torch.from_numpy(g).to(dtype))
            sparse = isinstance(optimizer, torch.optim.SparseAdam)
            weight.grad = dense.to_sparse(1).coalesce() if sparse else dense
            optimizer.step()
        answers.append(weight.detach().double().numpy())
    for batch, g in zip(steps, grads):
        table.update(torch.from_numpy(batch), torch.from_numpy(g))
    peers, truth = answers
    ours = table.find(keys).values.astype(np.float64)
    assert np.abs(ours - truth).max() <= 2 * np.abs(peers - truth).max() + 1e-6


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_threads_and_levels_do_not_change_the_bits(level, rule):
    rng = np.random.default_rng(3)
    steps = [
        (rng.zipf(1.3, 4000) % 900, rng.normal(size=(4000, 5)).astype(np.float32)) for _ in range(3)
    ]
    kept = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        table = Table(5, capacity=1, optimizer=rule)
        for keys, grads in steps:
            table.update(keys, grads)
        rows = table.export()
        kept.append((rows.keys.tobytes(), rows.values.tobytes(), rows.state.tobytes()))
    assert kept[0] == kept[1] == kept[2]
    assert _bits.setdefault(rule, kept[0]) == kept[0], f"{level} rounds otherwise"


_bits: dict = {}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("rule", [SGD(lr=0.5), Adagrad(lr=0.5), Adam(lr=0.1)], ids=named)
def test_half_rows_are_computed_in_float32_and_rounded_once(dtype, rule):
    keys = np.arange(30)
    table = Table(7, optimizer=rule, dtype=dtype, initializer=Uniform(-1, 1))
    wide = Table(7, optimizer=rule)
    rng = np.random.default_rng(1)
    start = table.find_or_insert(torch.from_numpy(keys)).values
    for _ in range(5):
        wide.insert_or_assign(torch.from_numpy(keys), start.float())
        grads = rng.normal(size=(30, 7)).astype(np.float32)
        table.update(keys, grads)
        wide.update(keys, grads)
        found = table.find(torch.from_numpy(keys)).values
        wanted = wide.find(torch.from_numpy(keys)).values.to(found.dtype)
        assert torch.equal(found, wanted)
        start = found


def test_stochastic_rounding_has_no_bias():
    """10^4 rows step by a tenth of a gap: the mean moves by it (5 deviations: false alarm 6e-7), nearest not."""
    n = 10_000
    keys, grads = np.arange(n), np.full((n, 1), -0.1 * 2**-10, np.float32)
    means = []
    for rounding in (True, False):
        rule = SGD(lr=1.0, stochastic_rounding=rounding)
        table = Table(1, dtype="float16", optimizer=rule, initializer=Constant(1.0))
        table.update(keys, grads)
        values = table.find(keys).values.astype(np.float64)
        assert set(np.unique(values)) <= {1.0, 1 + 2**-10}
        means.append((values.mean() - 1) * 2**10)
    assert abs(means[0] - 0.1) < 5 * np.sqrt(0.1 * 0.9 / n)
    assert means[1] == 0


def test_optimizer_state_is_kept_by_assignment_and_lost_with_the_row():
    rule = Adagrad(lr=1.0, initial_accumulator_value=0.5)
    table = Table(2, optimizer=rule)
    keys, ones = np.array([3, 4]), np.ones((2, 2), np.float32)
    table.update(keys, ones)
    table.insert_or_assign(keys[:1], ones[:1])
    table.assign(keys[1:], ones[:1])
    assert table.export().state.tolist() == [[1.5, 1.5]] * 2
    table.erase(keys[:1])
    table.insert_or_assign(keys[:1], ones[:1])
    assert table.export().state.tolist() == [[0.5, 0.5], [1.5, 1.5]]
    assert table.state_width == 2


def test_another_rule_for_one_call_must_have_the_same_state():
    table = Table(2, optimizer=Adagrad(lr=1.0), initializer=Constant(0.0))
    keys, ones = np.array([3]), np.ones((1, 2), np.float32)
    table.update(keys, ones, optimizer=Adagrad(lr=0.0))
    assert table.find(keys).values.tolist() == [[0, 0]]
    table.update(keys, ones)
    np.testing.assert_allclose(table.find(keys).values, -1 / np.sqrt(2), rtol=1e-6)
    for other in (SGD(), Adam(), RowwiseAdagrad()):
        with refused("[Table.update] optimizer: expected the state of Ada"):
            table.update(keys, ones, optimizer=other)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dim", [1, 7, 64, 300])
def test_a_gradient_that_is_not_finite_changes_nothing(level, bad, dim):
    table = Table(dim, optimizer=Adam(), track="changes")
    table.update(np.arange(5), np.ones((5, dim), np.float32))
    before, mark = table.export(), table.mark()
    for row, column in ((0, 0), (4, dim - 1), (2, dim // 2)):
        grads = np.ones((6, dim), np.float32)
        grads[row, column] = bad
        shown = {"nan": "nan", "inf": "inf", "-inf": "-inf"}[str(bad)]
        with refused(f"finite numbers, got {shown} at [{row}, {column}]"):
            table.update(np.arange(6), grads)
    for a, b in zip(before, table.export()):
        np.testing.assert_array_equal(a, b)
    assert len(table.delta(mark).keys) == 0
