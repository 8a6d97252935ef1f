# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of the heads on a GPU: the values of the CPU's grid, in graphs, without a wait."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from gpu_cases import DEVICE, captured, no_waiting, on_gpu
from helpers import assert_no_worse_than_torch, value_and_gradients
from hotloop.front import impl as _impl
from hotloop.logprob import (
    _triton,
    linear_cross_entropy,
    linear_jsd,
    linear_kl,
    token_logprob,
)
from logprob_cases import EPS, LmHead, check, make_head
from test_divergence import OF_LOGITS, gaussians, oracle
from torch import Tensor

pytestmark = on_gpu
IMPL = "triton" if DEVICE == "cuda" else "cpu"

# Rows: one; half a tile and one more; several tiles and a rest. Columns: a tile and two; many tiles, no multiple of
# anything. Widths: one step of the inner loop; 773, whose rows start at no aligned address.
ROWS, VOCABULARIES, WIDTHS = (1, 65, 200), (130, 32003), (64, 773)
HALVES = (torch.bfloat16, torch.float16)
by_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, *HALVES], ids=lambda d: str(d).removeprefix("torch.")
)
by_size = pytest.mark.parametrize(
    ("n", "vocabulary", "width"), [(n, v, d) for n in ROWS for v in VOCABULARIES for d in WIDTHS]
)


def head(
    n: int, width: int, vocabulary: int, dtype: torch.dtype = torch.float32, **how: Any
) -> LmHead:
    return make_head(n, width, vocabulary, dtype, **how).on(DEVICE)


@by_size
@by_dtype
def test_statistics_and_gradients(n: int, vocabulary: int, width: int, dtype: torch.dtype) -> None:
    check(head(n, width, vocabulary, dtype), impl=IMPL)
    assert _impl.last_impl("linear_logprob") == IMPL


@by_dtype
@pytest.mark.parametrize(
    "how",
    [
        {"softcap": 20.0},
        {"temperature": 0.7},
        {"logit_scale": 0.5, "softcap": 5.0, "temperature": 1.7},
    ],
    ids=lambda how: "-".join(how),
)
@pytest.mark.parametrize("bias", [False, True])
def test_logit_maps(dtype: torch.dtype, how: dict[str, float], bias: bool) -> None:
    check(head(65, 64, 1030, dtype, bias=bias), impl=IMPL, **how)


@by_dtype
def test_no_row_all_rows_and_one_row_ignored(dtype: torch.dtype) -> None:
    full = head(65, 64, 1030, dtype, ignore=False)
    check(full, impl=IMPL)
    check(full.with_labels(torch.full_like(full.labels, -100)), impl=IMPL)
    one = full.labels.clone()
    one[64] = -100
    check(full.with_labels(one), impl=IMPL)
    check(head(0, 64, 1030, dtype), impl=IMPL)


@by_dtype
def test_several_column_chunks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A workspace of 1 MiB: dz of 200 rows and 32003 columns takes a dozen chunks or more."""
    if DEVICE == "cuda":
        kernels = _triton.kernels()
        monkeypatch.setattr(kernels, "backward", partial(kernels.backward, workspace_bytes=2**20))
    check(head(200, 64, 32003, dtype), impl=IMPL)


def distance(found: Tensor, truth: Tensor) -> float:
    found, truth = found.detach().double(), truth.detach()
    return float((found - truth).norm() / truth.norm().clamp(min=1e-30))


def close(found: Tensor, plain: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """Relative L2 error at most twice plain torch's at this dtype, which counts as two roundings at least."""
    assert found.dtype in (dtype, torch.float32)
    assert distance(found, truth) <= 2 * max(
        distance(plain, truth), 2 * torch.finfo(dtype).eps, 1e-5
    )


LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": lambda h, _, impl: h.run(linear_cross_entropy, impl=impl),
    "smoothed": lambda h, _, impl: h.run(linear_cross_entropy, label_smoothing=0.1, z_loss=1e-2, impl=impl),
    "forward_kl": lambda h, t, impl: linear_kl(
        h.hidden, h.weight, t.hidden, t.weight, student_bias=h.bias, labels=h.labels, impl=impl
    ),
    "reverse_kl": lambda h, t, impl: linear_kl(
        h.hidden, h.weight, t.hidden, t.weight, student_bias=h.bias, labels=h.labels,
        direction="reverse", impl=impl,
    ),
    "jsd": lambda h, t, impl: linear_jsd(
        h.hidden, h.weight, t.hidden, t.weight, student_bias=h.bias, labels=h.labels, beta=0.3,
        temperature=1.5, impl=impl,
    ),
}  # fmt: skip


@by_dtype
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("n", "vocabulary"), [(1, 130), (200, 32003)])
def test_losses_of_one_and_two_heads(
    name: str, n: int, vocabulary: int, dtype: torch.dtype
) -> None:
    student = head(n, 64, vocabulary, dtype, ignore=n > 1)
    teacher = head(n, 48, vocabulary, dtype, seed=1)
    wide = LmHead(teacher.hidden.double(), teacher.weight.double(), None, teacher.labels)
    found, plain, truth = (
        value_and_gradients(LOSSES[name](leaves, other, impl), leaves.tensors())
        for leaves, other, impl in (
            (student.leaves(), teacher, IMPL),
            (student.leaves(), teacher, "reference"),
            (student.to(torch.float64).leaves(), wide, "reference"),
        )
    )
    for results in zip(found, plain, truth, strict=True):
        close(*results, dtype)


@by_dtype
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_divergences_of_given_logits(kind: str, dtype: torch.dtype) -> None:
    for n, vocabulary in ((1, 1), (7, 130), (65, 32003)):
        s, t = (gaussians(n, vocabulary, seed=k, dtype=dtype).to(DEVICE) for k in (0, 1))
        results = []
        for x, y, call in (
            (
                s,
                t,
                lambda a, b: OF_LOGITS[kind](a, b, temperature=2.5, reduction="none", impl=IMPL),
            ),
            (s, t, lambda a, b: oracle(kind, a, b, 2.5)),
            (s.double(), t.double(), lambda a, b: oracle(kind, a, b, 2.5)),
        ):
            leaf = x.clone().requires_grad_()
            rows = call(leaf, y)
            results.append([rows.detach(), *torch.autograd.grad(rows.sum(), leaf)])
        for k, (a, b, c) in enumerate(zip(*results, strict=True)):
            half = torch.finfo(dtype).eps / 2 if k and dtype != torch.float32 else 0.0
            floor = max(float(c.abs().max()), 0.1)
            assert_no_worse_than_torch(a, b, c, 2, 10 * EPS[dtype] + half, floor=floor)


@by_dtype
def test_token_logprob(dtype: torch.dtype) -> None:
    def plain(z: Tensor, ids: Tensor) -> list[Tensor]:
        p = z.log_softmax(-1, dtype=torch.promote_types(z.dtype, torch.float32))
        picked = p.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        return [picked, -(p.exp() * p).sum(-1)]

    def ours(z: Tensor, ids: Tensor) -> list[Tensor]:
        found = token_logprob(z, ids, statistics=("entropy",), impl=IMPL)
        assert found.entropy is not None
        return [found.logps, found.entropy]

    for n, vocabulary in ((1, 130), (65, 32003)):
        z = gaussians(n, vocabulary, dtype=dtype).to(DEVICE)
        ids = torch.arange(n, device=DEVICE) * 7 % vocabulary
        results = []
        for call, x in ((ours, z), (plain, z), (plain, z.double())):
            leaf = x.clone().requires_grad_()
            rows = call(leaf, ids)
            results.append([*rows, *torch.autograd.grad(rows[0].sum() + rows[1].sum(), leaf)])
        for a, b, c in zip(*results, strict=True):
            close(a, b, c, dtype)


def test_float64_is_left_to_the_reference() -> None:
    h = head(7, 64, 130, torch.float64)
    h.run()
    assert _impl.last_impl("linear_logprob") == "reference"
    with pytest.raises(NotImplementedError, match=r"triton +refused: .*float64"):
        h.run(impl="triton")
    with pytest.raises(NotImplementedError, match=r"triton +refused: .*float64"):
        token_logprob(
            torch.randn(3, 5, device=DEVICE).double(), h.labels[:3].abs() % 5, impl="triton"
        )


def step_of(h: LmHead) -> Callable[[], list[Tensor]]:
    def step() -> list[Tensor]:
        out = h.run(statistics=("entropy",))
        assert out.entropy is not None
        loss = h.run(linear_cross_entropy)
        total = out.logps.sum() + out.entropy.sum() + loss
        return [out.logps, loss, *torch.autograd.grad(total, h.tensors())]

    return step


@by_dtype
def test_nothing_waits_for_the_device(dtype: torch.dtype) -> None:
    step = step_of(head(200, 64, 1030, dtype).leaves())
    wanted = step()
    torch.cuda.synchronize()
    with no_waiting():
        found = step()
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@by_dtype
def test_a_captured_step_follows_its_inputs(dtype: torch.dtype) -> None:
    h = head(65, 64, 1030, dtype).leaves()
    step = step_of(h)
    graph, filled = captured(step)
    for seed in (1, 2):
        with torch.no_grad():
            h.hidden.copy_(head(65, 64, 1030, dtype, seed=seed).hidden)
            h.labels.copy_(head(65, 64, 1030, dtype, seed=seed).labels)
        graph.replay()
        found = [x.clone() for x in filled]
        torch.testing.assert_close(found, step(), rtol=0, atol=0)


def test_compiled_heads_are_the_eager_ones() -> None:
    h = head(65, 64, 1030, torch.bfloat16).leaves()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, h.labels)

    compiled = torch.compile(loss, fullgraph=True)
    for call in (loss, compiled):
        call(h.hidden, h.weight)
    found, wanted = (
        torch.autograd.grad(call(h.hidden, h.weight), (h.hidden, h.weight))
        for call in (compiled, loss)
    )
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
