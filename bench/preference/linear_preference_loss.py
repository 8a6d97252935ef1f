# SPDX-License-Identifier: Apache-2.0
"""DPO with a reference head, from hidden states to the loss, forward and backward."""

from __future__ import annotations

import torch
from hotloop.reference import preference as reference
from torch import Tensor

from .. import _heads
from .._case import Bench, Case, Contender, Inputs, Target
from .._options import Options
from ..contenders import liger, ours, plain

OP = "preference.linear_preference_loss"
BETA = 0.1

# The reference model is the policy a little while ago.
_DRIFT = 0.1


def _case(
    device: str,
    dtype: str,
    size: tuple[int, int, int, int],
    padding: float,
    targets: tuple[Target, ...] = (),
    sets: int = 3,
) -> Case:
    pairs, length, width, vocabulary = size

    def make_inputs(seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        labels = _heads.labels_of(generator, 2 * pairs, length, vocabulary, padding, "padding")
        hidden, weight = _heads.head(generator, labels, width, vocabulary, torch.float32)

        def drift(x: Tensor) -> Tensor:
            noise = torch.randn(x.shape, generator=generator, device=device)
            return x + _DRIFT * x.std() * noise

        policy = {"hidden": hidden, "weight": weight}
        ref = {"ref_hidden": drift(hidden), "ref_weight": drift(weight)}
        kind = getattr(torch, dtype)
        leaves = {name: x.to(kind).requires_grad_() for name, x in policy.items()}
        constants = {name: x.to(kind) for name, x in ref.items()}
        return Inputs({**leaves, **constants, "labels": labels}, ("hidden", "weight"))

    def truth(x: Inputs) -> list[Tensor]:
        logps = _heads.token_statistic(x, "logps")
        nothing = torch.zeros(x["labels"].numel(), device=device)
        sums = []
        for name in ("", "ref_"):
            values, *_ = _heads.truth_by_rows(
                logps, x[name + "hidden"], x[name + "weight"], nothing
            )
            sums.append(values.reshape(x["labels"].shape).sum(-1))
        policy, ref = sums[0].requires_grad_(), sums[1]
        loss = reference.dpo_loss(*policy.chunk(2), *ref.chunk(2), beta=BETA)
        (slope,) = torch.autograd.grad(loss, policy)
        each = slope.unsqueeze(-1).expand(x["labels"].shape).reshape(-1)
        return [loss, *_heads.truth_by_rows(logps, x["hidden"], x["weight"], each)[1:]]

    def forward(function: ours.Function, x: Inputs) -> Tensor:
        loss, _ = function(
            *x.pick("hidden", "weight", "labels"),
            loss="dpo",
            ref_hidden=x["ref_hidden"],
            ref_weight=x["ref_weight"],
            options={"beta": BETA},
        )
        return loss  # type: ignore[no-any-return]

    valid = int((_some_labels(size, padding) != _heads.IGNORE).sum())
    return Case(
        op=OP,
        label=f"dpo, {padding:.0%} padding",
        # Logits of policy and reference, d hidden, d weight: four products over valid tokens.
        **_heads.step(4, valid, size, dtype, device),
        make_inputs=make_inputs,
        truth=truth,
        contenders=(
            *ours.contenders(
                "hotloop.preference", "linear_preference_loss", ours.head_impls(device), forward
            ),
            *plain.eager_and_compiled(
                plain.dpo,
                lambda x: (*x.pick("hidden", "weight", "labels", "ref_hidden", "ref_weight"), BETA),
            ),
            *liger.dpo(BETA),
            Contender("five products", "floor", _bare_products),
        ),
        targets=targets,
        sets=sets,
    )


def _some_labels(size: tuple[int, int, int, int], padding: float) -> Tensor:
    """Labels of seed 0 on the CPU: as many tokens count for every seed and device."""
    pairs, length, _, vocabulary = size
    generator = torch.Generator().manual_seed(0)
    return _heads.labels_of(generator, 2 * pairs, length, vocabulary, padding, "padding")


def _bare_products(x: Inputs) -> None:
    """Policy logits twice, d hidden and d weight, reference logits once."""
    _heads.bare_products(x)
    x["ref_hidden"][x["labels"] != _heads.IGNORE] @ x["ref_weight"].T


def cases(options: Options) -> list[Case]:
    device = options.device
    if options.quick:
        return [
            _case(device, dtype, (2, 24, 64, 1000), p)
            for p in (0.0, 0.5)
            for dtype in ("bfloat16", "float32")
        ]
    if device == "cuda":
        size = (8, 1024, 4096, 128256)
        return [
            _case("cuda", "bfloat16", size, 0.5, (Target("G1.3", "liger dpo", 0.45),), sets=2),
            _case("cuda", "bfloat16", size, 0.0, (Target("G1.3", "liger dpo", 0.80),), sets=2),
        ]
    size = (4, 64, 768, 32000)
    found = []
    for dtype, full in (("bfloat16", 0.30), ("float32", 0.60)):
        found.append(_case("cpu", dtype, size, 0.0, (Target("C1.4", "liger dpo", full),)))
        found.append(_case("cpu", dtype, size, 0.5, (Target("C1.4", "liger dpo", 0.20),)))
    return found


BENCHES = (Bench(OP, "DPO with a reference head, from hidden states", cases),)
