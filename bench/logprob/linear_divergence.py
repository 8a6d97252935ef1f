# SPDX-License-Identifier: Apache-2.0
"""Divergences between a student's and a teacher's head, forward and backward into the student."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hotloop.reference import logprob as reference
from torch import Tensor

from .. import _heads
from .._case import Bench, Case, Contender, Inputs, Target
from .._options import Options
from ..contenders import liger, ours, plain, trl

JSD, KL = "logprob.linear_jsd", "logprob.linear_kl"

# By beta of the generalised JSD, which is a KL at its ends.
_DIRECTIONS = {0.0: "forward", 1.0: "reverse"}
_STATISTICS = {0.0: "forward_kl", 1.0: "reverse_kl"}

_CPU_TARGETS = {
    "float32": (Target("C1.6", "trl", 0.35),),
    "bfloat16": (Target("C1.6", "trl", 0.12), Target("C1.6", "liger jsd", 0.60)),
}
_GPU_TARGETS = (Target("G1.4", "liger jsd triton", 0.40), Target("G1.4", "trl", 0.85))


def _case(
    device: str,
    dtype: str,
    size: tuple[int, int, int],
    beta: float,
    targets: tuple[Target, ...] = (),
    masked: float = 0.25,
    sets: int = 3,
) -> Case:
    n, width, vocabulary = size
    valid = n - round(masked * n)
    direction = _DIRECTIONS.get(beta)

    def make_inputs(seed: int) -> Inputs:
        made = _heads.token_inputs(seed, n, width, vocabulary, dtype, device, masked)
        generator = torch.Generator(device).manual_seed(seed + 10_000)
        teacher_hidden, teacher_weight = _heads.head(
            generator, made["labels"], width, vocabulary, getattr(torch, dtype)
        )
        teacher = {"teacher_hidden": teacher_hidden, "teacher_weight": teacher_weight}
        return Inputs({**made.tensors, **teacher}, made.wrt)

    def truth(x: Inputs) -> list[Tensor]:
        mask = x["labels"] != _heads.IGNORE
        teacher_weight = x["teacher_weight"].to(_heads.wide(dtype))

        def rows_loss(h: Tensor, w: Tensor, rows: slice) -> Tensor:
            teacher = x["teacher_hidden"][rows].to(h.dtype) @ teacher_weight.T
            found = reference.divergences(h @ w.T, teacher, beta)[_STATISTICS.get(beta, "jsd")]
            return found.masked_fill(~mask[rows], 0.0)

        rows, *gradients = _heads.truth_by_rows(
            rows_loss, x["hidden"], x["weight"], mask.double() / valid
        )
        return [rows.sum() / valid, *gradients]

    def forward(function: ours.Function, x: Inputs) -> Tensor:
        how: dict[str, object] = {"direction": direction} if direction else {"beta": beta}
        heads = x.pick("hidden", "weight", "teacher_hidden", "teacher_weight")
        return function(*heads, labels=x["labels"], **how)  # type: ignore[no-any-return]

    return Case(
        op=KL if direction else JSD,
        label=f"{direction or f'beta {beta:g}'}, {masked:.0%} masked",
        # Two logits, d hidden and d weight: four products over the tokens that count.
        **_heads.step(4, valid, size, dtype, device),
        make_inputs=make_inputs,
        truth=truth,
        contenders=(
            *ours.contenders(
                "hotloop.logprob",
                "linear_kl" if direction else "linear_jsd",
                ours.head_impls(device),
                forward,
            ),
            *plain.eager_and_compiled(
                plain.divergence,
                lambda x: (
                    *x.pick("hidden", "weight", "teacher_hidden", "teacher_weight", "labels"),
                    beta,
                ),
            ),
            trl.divergence(device, beta),
            *liger.divergence(device, beta),
            Contender("six products", "floor", _bare_products),
        ),
        targets=targets,
        sets=sets,
    )


def _bare_products(x: Inputs) -> None:
    """Both logits twice, d hidden and d weight: what is left when logits are not kept."""
    _heads.bare_products(x)
    teacher = x["teacher_hidden"][x["labels"] != _heads.IGNORE]
    for _ in range(2):
        teacher @ x["teacher_weight"].T


def _sizes(options: Options, betas: tuple[float, ...]) -> list[Case]:
    if options.quick:
        return [
            _case(options.device, dtype, (96, 64, 1000), beta)
            for beta in betas
            for dtype in ("bfloat16", "float32")
        ]
    if options.device == "cuda":
        jsd = _GPU_TARGETS if 0.5 in betas else ()
        return [
            _case("cuda", "bfloat16", (4096, 4096, 128256), b, jsd, masked=0.0, sets=2)
            for b in betas
        ]
    return [
        _case("cpu", dtype, (512, 768, 32000), beta, _CPU_TARGETS[dtype] if beta == 0.5 else ())
        for beta in betas
        for dtype in ("bfloat16", "float32")
    ]


def _of(*betas: float) -> Callable[[Options], list[Case]]:
    return lambda options: _sizes(options, betas)


BENCHES = (
    Bench(JSD, "Jensen-Shannon divergence of two heads, from hidden states", _of(0.5)),
    Bench(KL, "KL divergence of two heads, both directions", _of(0.0, 1.0)),
)
