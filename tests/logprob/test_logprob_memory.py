# SPDX-License-Identifier: Apache-2.0
"""What is kept between forward and backward: nothing, a part or all of the logits give the same results."""

from __future__ import annotations

import sys

import pytest
import torch
from helpers import with_threads
from hotloop.logprob import _cpu, linear_cross_entropy, linear_jsd, linear_kl, linear_logprob
from hotloop.logprob._cpu import Products
from logprob_cases import LmHead, backward, check, differentiable, make_head, ours, upstream
from processes import printed

N, V = 48, 2100  # five tiles of 512 columns, the last of 52; a column takes 192 bytes in float32
# MiB: no tile beside the one in use; one kept; all kept.
WORKSPACES = {"none": 0.001, "part": 0.25, "all": 64.0}


@pytest.mark.usefixtures("small_tiles")
def test_the_workspaces_are_what_they_are_meant_to_be() -> None:
    head = make_head(N, 8, V, ignore=False)
    kept = {
        name: Products(head.hidden, head.weight, int(mb * 2**20)).kept_columns
        for name, mb in WORKSPACES.items()
    }
    assert kept == {"none": 0, "part": 512, "all": V}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [4096, 65_536, 300_000, 2_000_000])
def test_logits_of_any_number_of_rows_stay_within_the_workspace(
    rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """512 columns of 300,000 rows would be 307 MB in bfloat16."""
    taken: list[int] = []
    monkeypatch.setattr(
        Products, "_matrix", lambda self, n, m: taken.append(n * m * self.dtype.itemsize)
    )
    workspace = 64 * 2**20
    hidden, weight = torch.empty(rows, 1, dtype=dtype), torch.empty(32_000, 1, dtype=dtype)
    products = Products(hidden, weight, workspace)
    taken.append(rows * products.tile_columns * dtype.itemsize)
    assert sum(taken) <= workspace


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_every_workspace_is_no_worse_than_torch(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for megabytes in WORKSPACES.values():
        monkeypatch.setenv("HOTLOOP_WORKSPACE_MB", str(megabytes))
        check(make_head(N, 8, V, dtype), softcap=20.0)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("workspace", WORKSPACES)
def test_a_second_backward_computes_the_spent_tiles_again(
    workspace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOTLOOP_WORKSPACE_MB", str(WORKSPACES[workspace]))
    head = make_head(N, 8, V)
    h = head.leaves()
    out = h.run(statistics=("entropy",))
    total = (out.logps * upstream(N)[0]).sum() + (out.entropy * upstream(N)[1]).sum()
    results = [torch.autograd.grad(total, h.tensors(), retain_graph=True) for _ in range(3)]
    for again in results[1:]:
        torch.testing.assert_close(again, results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("workspace", WORKSPACES)
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_divergences_with_every_workspace(
    divergence: str, workspace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = make_head(N, 8, V, torch.float64), make_head(N, 5, V, torch.float64, seed=1)

    def call(h: LmHead, impl: str) -> torch.Tensor:
        heads = (h.hidden, h.weight, teacher.hidden, teacher.weight)
        options = {"student_bias": h.bias, "labels": h.labels, "reduction": "none", "impl": impl}
        if divergence == "jsd":
            return linear_jsd(*heads, beta=0.3, **options)
        return linear_kl(*heads, direction=divergence, **options)

    monkeypatch.setenv(
        "HOTLOOP_WORKSPACE_MB", str(4 * WORKSPACES[workspace])
    )  # float64, and half for each head
    h = student.leaves()
    rows = call(h, "cpu")
    weights = upstream(N)[0]
    found = [torch.autograd.grad(rows, h.tensors(), weights, retain_graph=True) for _ in range(2)]
    other = call(r := student.leaves(), "reference")
    expected = torch.autograd.grad(other, r.tensors(), weights)
    torch.testing.assert_close(rows, other, rtol=1e-10, atol=1e-12)
    for grads in found:
        torch.testing.assert_close(grads, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("small_tiles")
def test_cross_entropy_with_every_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    head = make_head(N, 8, V)
    options = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 20.0}
    results = []
    for megabytes in WORKSPACES.values():
        monkeypatch.setenv("HOTLOOP_WORKSPACE_MB", str(megabytes))
        h = head.leaves()
        loss = h.run(linear_cross_entropy, **options)
        results.append([loss.detach(), *torch.autograd.grad(3 * loss, h.tensors())])
    for a, *others in zip(*results):
        for b in others:
            torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)


def test_cross_entropy_takes_three_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits that fit the workspace are not computed again; of those that do not, the product is the fourth."""
    real, calls = torch.mm, []
    monkeypatch.setattr(torch, "mm", lambda *a, **k: calls.append(a[0].shape) or real(*a, **k))
    for megabytes, products in ((64.0, 3), (0.001, 4)):
        monkeypatch.setenv("HOTLOOP_WORKSPACE_MB", str(megabytes))
        calls.clear()
        h = make_head(N, 8, V).leaves()
        h.run(linear_cross_entropy).backward()
        assert len(calls) == products


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_and_two_threads_give_the_same_bits_of_the_statistics(dtype: torch.dtype) -> None:
    """The row loops; the products are torch's, with one order of sums here because the width is small."""
    head = make_head(200, 8, 1031, dtype)

    def call() -> torch.Tensor:
        rows, grads, _ = ours(head)
        return torch.cat([x.flatten().double() for x in (*rows, *grads)])

    one, two = (with_threads(k, call) for k in (1, 2))
    statistics = 5 * 200
    assert torch.equal(one[:statistics], two[:statistics])
    assert torch.equal(with_threads(2, call), two)
    torch.testing.assert_close(one, two, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-5)


def test_huge_and_tiny_rows_take_the_scratch_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scratch tile is reused: the last, narrower tile must not see the columns of the one before."""
    monkeypatch.setattr(_cpu, "_LEAST_TILE_COLUMNS", 16)
    monkeypatch.setattr(_cpu, "_TILE_BYTES", 1)
    monkeypatch.setenv("HOTLOOP_WORKSPACE_MB", "0.0001")
    for n in (1, 2, 33):
        check(make_head(n, 8, 50, ignore=False))


PEAK = """
import sys, torch
from hotloop.logprob import linear_cross_entropy, linear_kl, linear_logprob
op = sys.argv[1]
torch.set_num_threads(1)
n, d, v = 2048, 32, 40_000  # logits: 312.5 MiB in float32; weight and its gradient 4.9 MiB each
h = torch.randn(n, d, requires_grad=True)
w = (0.1 * torch.randn(v, d)).requires_grad_()
y = torch.randint(0, v, (n,))
linear_logprob(h[:8], w, y[:8]).logps.sum().backward()  # what a first call allocates once
h.grad = w.grad = None

def status(name):
    line = next(x for x in open("/proc/self/status") if x.startswith(name))
    return int(line.split()[1]) / 1024

open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
if op == "linear_logprob":
    linear_logprob(h, w, y, statistics=("entropy",)).logps.sum().backward()
elif op == "linear_cross_entropy":
    linear_cross_entropy(h, w, y).backward()
elif op == "linear_kl":
    linear_kl(h, w, h.detach(), w.detach()).backward()
else:
    torch.nn.functional.cross_entropy(h @ w.t(), y).backward()
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize(
    ("op", "at_most", "at_least"),
    [
        # Workspace 32, two scratch tiles of 8 (two heads have one each), gradients of 5, and 24 for the rest.
        ("linear_logprob", 32 + 8 + 5 + 24, 0),
        ("linear_cross_entropy", 32 + 8 + 5 + 24, 0),
        ("linear_kl", 32 + 16 + 5 + 24, 0),
        ("plain torch", 2000, 600),  # the control: the logits and their gradient
    ],
)
def test_peak_memory(op: str, at_most: int, at_least: int) -> None:
    peak = float(printed(PEAK, op, HOTLOOP_WORKSPACE_MB="32"))
    assert at_least <= peak <= at_most


def test_no_gradient_keeps_no_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = Products.__init__

    def watch(self: Products, *args: object) -> None:
        real(self, *args)
        seen.append(self.kept_columns)

    monkeypatch.setattr(Products, "__init__", watch)
    head = make_head(N, 8, V)
    with torch.no_grad():
        linear_logprob(head.hidden, head.weight, head.labels)
    linear_logprob(head.hidden, head.weight, head.labels)
    assert seen == [0, 0]
    h = head.leaves()
    rows = differentiable(linear_logprob(h.hidden, h.weight, h.labels))
    assert seen[-1] == V
    backward(rows, upstream(N), [h.hidden])
    assert len(seen) == 3
