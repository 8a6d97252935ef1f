# SPDX-License-Identifier: Apache-2.0
"""Rival libraries as oracles, on the CPU: TRL, Liger-Kernel, cut-cross-entropy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import value_and_gradients
from hotloop.logprob import (
    generalized_jsd_distill,
    linear_cross_entropy,
    linear_jsd,
    linear_kl,
    linear_logprob,
)
from logprob_cases import LmHead, make_head
from torch import Tensor

pytestmark = [
    pytest.mark.peer,
    pytest.mark.filterwarnings("ignore::Warning"),  # the peers' own
]

N, D, V = 40, 16, 600


def close(found: list[Tensor], expected: list[Tensor], tolerance: float = 2e-5) -> None:
    for a, b in zip(found, expected, strict=True):
        scale = float(b.detach().abs().max())
        torch.testing.assert_close(
            a.double(), b.double(), rtol=tolerance, atol=tolerance * max(scale, 1e-3)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("temperature", "softcap", "scale"), [(1.0, None, 1.0), (0.7, None, 1.0), (1.3, 4.0, 0.5)]
)
def test_trl_chunked_logprob(
    temperature: float, softcap: float | None, scale: float, dtype: torch.dtype
) -> None:
    """logps, entropy (with gradients), log sum p^2, mean logit and top-1, bias included."""
    kernels = pytest.importorskip("trl.kernels")
    head = make_head(N, D, V, dtype, ignore=False)
    outputs = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    weights = torch.randn(2, N, generator=torch.Generator().manual_seed(0))
    h = head.leaves()
    theirs = kernels.ChunkedLogProbFunction.apply(
        h.hidden, h.weight, h.bias, h.labels, temperature, 128, softcap, scale, outputs
    )
    expected = torch.autograd.grad(
        (theirs[0] * weights[0] + theirs[1] * weights[1]).sum(), h.tensors()
    )
    r = head.leaves()
    ours = r.run(temperature=temperature, softcap=softcap, logit_scale=scale,
        statistics=("entropy", "sum_p2", "mean_logit", "argmax_hit"))  # fmt: skip
    found = torch.autograd.grad(
        (ours.logps * weights[0] + ours.entropy * weights[1]).sum(), r.tensors()
    )
    # bfloat16: they round logits after adding the bias, we before.
    tolerance = 3e-5 if dtype == torch.float32 else 3e-2
    values = [ours.logps, ours.entropy, ours.sum_p2.log(), ours.mean_logit]
    close(values, list(theirs[:4]), tolerance)
    close(list(found), [g.to(f.dtype) for g, f in zip(expected, found)], tolerance)
    if dtype == torch.float32:
        assert torch.equal(ours.argmax_hit, theirs[4])


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_trl_chunked_divergence(beta: float, temperature: float) -> None:
    module = pytest.importorskip("trl.kernels.chunked_divergence")
    student, teacher = make_head(N, D, V, ignore=False), make_head(N, 8, V, seed=1)
    weights = torch.linspace(0.5, 1.5, N)
    s = student.leaves()
    rows, _ = module.ChunkedDivergenceFunction.apply(
        s.hidden, s.weight, s.bias, teacher.hidden, teacher.weight, teacher.bias, beta, temperature
    )
    expected = value_and_gradients((rows * weights).sum(), s.tensors())
    r = student.leaves()
    ours = linear_jsd(
        r.hidden, r.weight, teacher.hidden, teacher.weight, student_bias=r.bias, teacher_bias=teacher.bias,
        beta=beta, temperature=temperature, reduction="none",
    )  # fmt: skip
    close([ours], [rows])
    close(value_and_gradients((ours * weights).sum(), r.tensors()), expected)


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_trl_generalized_jsd_loss(beta: float) -> None:
    """Slow: importing the trainer imports transformers."""
    module = pytest.importorskip("trl.experimental.gkd")
    s, t = torch.randn(2, 3, 7, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 50, (3, 7))
    labels[0, :3] = -100
    results = []
    for call in (module.GKDTrainer.generalized_jsd_loss, generalized_jsd_distill):
        leaf = s.clone().requires_grad_()
        loss = call(leaf, t, labels=labels, beta=beta, temperature=0.9)
        results.append(value_and_gradients(loss, [leaf]))
    close(*results, 1e-10)


def test_liger_scaled_cross_entropy() -> None:
    module = pytest.importorskip("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    head = make_head(N, D, V, bias=False)
    weights = torch.randn(2, N, generator=torch.Generator().manual_seed(0))
    h = head.leaves()
    nll, entropy = module.LigerFusedLinearScaledCrossEntropyFunction.apply(
        h.hidden, h.weight, h.labels, 0.8, -100, 1, True
    )
    expected = torch.autograd.grad((-nll * weights[0] + entropy * weights[1]).sum(), h.tensors())
    r = head.leaves()
    ours = linear_logprob(r.hidden, r.weight, r.labels, temperature=0.8, statistics=("entropy",))
    found = torch.autograd.grad(
        (ours.logps * weights[0] + ours.entropy * weights[1]).sum(), r.tensors()
    )
    close([ours.logps, ours.entropy, *found], [-nll, entropy, *expected], 5e-5)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_liger_linear_jsd(beta: float) -> None:
    """Their beta weighs the teacher as ours; their mean is over all tokens that count."""
    module = pytest.importorskip("liger_kernel.chunked_loss")
    student, teacher = make_head(N, D, V, bias=False), make_head(N, 8, V, bias=False, seed=1)
    loss = module.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False
    )
    s = student.leaves()
    theirs: Any = loss(s.hidden, s.weight, teacher.hidden, teacher.weight, s.labels)
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    expected = value_and_gradients(theirs, s.tensors())
    r = student.leaves()
    ours = linear_jsd(
        r.hidden, r.weight, teacher.hidden, teacher.weight, labels=r.labels, beta=beta
    )
    close(value_and_gradients(ours, r.tensors()), expected, 1e-4)
    if beta != 0.5:
        direction = "forward" if beta == 0 else "reverse"
        kl = linear_kl(
            r.hidden, r.weight, teacher.hidden, teacher.weight, labels=r.labels, direction=direction
        )
        torch.testing.assert_close(kl, ours)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_cut_cross_entropy(softcap: float | None, reduction: str) -> None:
    module = pytest.importorskip("cut_cross_entropy")
    head = make_head(N, D, V, bias=False)

    def run(call: Any, h: LmHead, **options: Any) -> list[Tensor]:
        loss = call(h.hidden, h.weight, h.labels, softcap=softcap, reduction=reduction, **options)
        return value_and_gradients(loss, h.tensors())

    expected = run(module.linear_cross_entropy, head.leaves(), impl="torch_compile")
    close(run(linear_cross_entropy, head.leaves()), expected)
