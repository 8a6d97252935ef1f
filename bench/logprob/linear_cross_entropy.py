# SPDX-License-Identifier: Apache-2.0
"""Mean cross-entropy of a language-model head, forward and backward."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cross_entropy

from .. import _heads
from .._case import Bench, Case, Contender, Inputs
from .._options import Options
from ..contenders import cce, liger, ours, plain, torch_linear, trl

OP = "logprob.linear_cross_entropy"


def _as_it_is(x: Inputs) -> Tensor:
    return cross_entropy(x["hidden"] @ x["weight"].T, x["labels"], ignore_index=_heads.IGNORE)


# What is written most often: half the memory of the contender "torch", which widens the logits to float32 first.
_AS_IT_IS = Contender(
    "torch half logits", "rival", _as_it_is, k=8.0, why="its log-softmax is rounded to 16 bits"
)


def _through_the_front_door(x: Inputs) -> Tensor:
    from hotloop.logprob import linear_cross_entropy

    return linear_cross_entropy(x["hidden"], x["weight"], x["labels"])


def _case(
    device: str, dtype: str, size: tuple[int, int, int], masked: float = 0.25, sets: int = 3
) -> Case:
    n, width, vocabulary = size
    valid = n - round(masked * n)

    def make_inputs(seed: int) -> Inputs:
        made = _heads.token_inputs(seed, n, width, vocabulary, dtype, device, masked)
        return Inputs(made.tensors, made.wrt)

    def truth(x: Inputs) -> list[Tensor]:
        logps = _heads.token_statistic(x, "logps")
        each = (x["labels"] != _heads.IGNORE).double() / valid
        rows, *gradients = _heads.truth_by_rows(
            lambda h, w, rows: -logps(h, w, rows), x["hidden"], x["weight"], each
        )
        return [rows.sum() / valid, *gradients]

    def forward(function: ours.Function, x: Inputs) -> Tensor:
        return function(x["hidden"], x["weight"], x["labels"])  # type: ignore[no-any-return]

    return Case(
        op=OP,
        label=f"{masked:.0%} masked",
        # Logits, d hidden and d weight: three products over the tokens that count.
        **_heads.step(3, valid, size, dtype, device),
        make_inputs=make_inputs,
        truth=truth,
        contenders=(
            *ours.contenders(
                "hotloop.logprob", "linear_cross_entropy", ours.head_impls(device), forward
            ),
            *plain.eager_and_compiled(
                plain.cross_entropy, lambda x: (x["hidden"], x["weight"], x["labels"])
            ),
            *([] if dtype == "float32" else [_AS_IT_IS]),
            trl.cross_entropy(device),
            liger.cross_entropy(device),
            *torch_linear.cross_entropies("mean"),
            cce.cross_entropy(device, "mean"),
            Contender("three products", "floor", lambda x: _heads.bare_products(x, 3)),
            *([] if device == "cuda" else [ours.in_small_pages(_through_the_front_door)]),
        ),
        sets=sets,
    )


def cases(options: Options) -> list[Case]:
    if options.quick:
        return [_case(options.device, dtype, (96, 64, 1000)) for dtype in ("bfloat16", "float32")]
    if options.device == "cuda":
        return [_case("cuda", "bfloat16", (8192, 4096, 128256), sets=2)]
    found = [_case("cpu", dtype, (512, 768, 32000)) for dtype in ("bfloat16", "float32")]
    # As many rows as a step of training has: the logits of one are 262 MB, of the other 1.2 GB.
    found += [
        _case("cpu", "bfloat16", size, masked=0.0, sets=2)
        for size in ((4096, 768, 32000), (4096, 512, 151936))
    ]
    if options.sweep:
        found += [
            _case("cpu", "bfloat16", (n, 768, 32000)) for n in (64, 128, 256, 1024, 2048, 4096)
        ]
    return found


BENCHES = (Bench(OP, "mean cross-entropy of a head, from hidden states", cases),)
