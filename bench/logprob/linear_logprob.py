# SPDX-License-Identifier: Apache-2.0
"""Log-probability of each label under a language-model head, forward and backward."""

from __future__ import annotations

from torch import Tensor

from .. import _heads
from .._case import Bench, Case, Contender, Inputs, Target
from .._options import Options
from ..contenders import cce, liger, ours, plain, torch_linear, trl

OP = "logprob.linear_logprob"

_CPU_TARGETS = {
    "float32": (Target("C1.1", "trl", 0.60), Target("C1.2", "torch linear_ce chunked", 0.35)),
    "bfloat16": (
        Target("C1.1", "trl", 0.08),
        Target("C1.2", "torch linear_ce chunked", 0.03),
        Target("C1.cce", "cce torch_compile", 0.90),
    ),
}
_CPU_LONG_TARGETS = (
    Target("C1.3", "cce torch_compile", 1.0),
    Target("C1.3", "cce torch_compile", 0.15, "memory"),
)
_GPU_TARGETS = (Target("G1.1", "trl", 0.85), Target("G1.1", "four products", 1.25))


def _case(
    device: str,
    dtype: str,
    size: tuple[int, int, int],
    targets: tuple[Target, ...],
    masked: float = 0.25,
    entropy: bool = False,
    sets: int = 3,
) -> Case:
    n, width, vocabulary = size
    valid = n - round(masked * n)

    def forward(function: ours.Function, x: Inputs) -> Tensor:
        statistics = ("entropy",) if entropy else ()
        found = function(x["hidden"], x["weight"], x["labels"], statistics=statistics)
        rows: Tensor = found.logps + found.entropy if entropy else found.logps
        return rows

    def truth(x: Inputs) -> list[Tensor]:
        logps, more = _heads.token_statistic(x, "logps"), _heads.token_statistic(x, "entropy")

        def both(h: Tensor, w: Tensor, rows: slice) -> Tensor:
            return logps(h, w, rows) + more(h, w, rows) if entropy else logps(h, w, rows)

        assert x.upstream is not None
        return _heads.truth_by_rows(both, x["hidden"], x["weight"], x.upstream)

    return Case(
        op=OP,
        label=f"{masked:.0%} masked{', entropy' if entropy else ''}",
        # Logits, d hidden and d weight: three products over the tokens that count.
        **_heads.step(3, valid, size, dtype, device),
        make_inputs=lambda seed: _heads.token_inputs(
            seed, n, width, vocabulary, dtype, device, masked
        ),
        truth=truth,
        contenders=(
            *ours.contenders("hotloop.logprob", "linear_logprob", ours.head_impls(device), forward),
            *plain.eager_and_compiled(
                plain.logprob_plus_entropy if entropy else plain.logprob,
                lambda x: (x["hidden"], x["weight"], x["labels"]),
            ),
            trl.logprob(device, entropy),
            liger.logprob(entropy),
            *(
                []
                if entropy
                else [*torch_linear.cross_entropies("none"), cce.cross_entropy(device, "none")]
            ),
            Contender("four products", "floor", _heads.bare_products),
        ),
        targets=targets,
        sets=sets,
    )


def cases(options: Options) -> list[Case]:
    if options.quick:
        sizes = [("float32", (96, 64, 1000)), ("bfloat16", (96, 64, 1000))]
        return [_case(options.device, dtype, size, ()) for dtype, size in sizes]
    if options.device == "cuda":
        return [
            _case(
                "cuda", "bfloat16", (8192, 4096, 151936), _GPU_TARGETS, 0.0, entropy=True, sets=2
            ),
            _case("cuda", "bfloat16", (8192, 4096, 128256), (), 0.25, sets=2),
        ]
    found = [
        _case("cpu", "bfloat16", (512, 768, 32000), _CPU_TARGETS["bfloat16"]),
        _case("cpu", "float32", (512, 768, 32000), _CPU_TARGETS["float32"]),
        _case("cpu", "bfloat16", (4096, 768, 32000), _CPU_LONG_TARGETS, sets=2),
    ]
    if options.sweep:
        found += [
            _case("cpu", dtype, (n, 768, 32000), ())
            for dtype in ("bfloat16", "float32")
            for n in (64, 128, 256, 1024, 2048)
        ]
    return found


BENCHES = (Bench(OP, "log-probability of labels under a head, from hidden states", cases),)
