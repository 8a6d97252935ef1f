# SPDX-License-Identifier: Apache-2.0
"""The experts implementations of transformers, on the weights of a Mixtral layer, and the bare products."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .._case import Contender, Entry, Inputs
from ._optional import contender

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


def transformers(implementation: str) -> Entry:
    def build(module: ModuleType) -> Contender:
        from transformers.models.mixtral.configuration_mixtral import MixtralConfig

        def forward(x: Inputs) -> Tensor:
            gate_up, down = x["gate_up"], x["down"]
            experts, hidden, inner = down.shape
            config = MixtralConfig(
                num_local_experts=experts, hidden_size=hidden, intermediate_size=inner
            )
            config._experts_implementation = implementation
            made = x.tensors.get("layer")
            if made is None:
                with torch.device("meta"):
                    made = x.tensors["layer"] = module.MixtralExperts(config)
                # The very leaves whose gradients are asked for.
                del made.gate_up_proj, made.down_proj
                made.gate_up_proj, made.down_proj = gate_up, down
            made.config = config
            found: Tensor = made(x["x"], x["ids"], x["topk_weights"])
            return found

        return Contender(f"transformers {implementation}", "rival", forward)

    return contender(
        f"transformers {implementation}", "transformers.models.mixtral.modeling_mixtral", build
    )


def bare_products(backward: bool) -> Contender:
    """torch.mm per expert into memory that is there: two products forward, four backward."""
    held: dict[int, Callable[[], None]] = {}

    def forward(x: Inputs) -> None:
        if id(x) not in held:
            held[id(x)] = _prepared(x, backward)
        held[id(x)]()

    return Contender("products", "floor", forward)


def _prepared(x: Inputs, backward: bool) -> Callable[[], None]:
    gate_up, down = x["gate_up"].detach(), x["down"].detach()
    experts, hidden, inner = down.shape
    counts = x["ids"].flatten().bincount(minlength=experts).tolist()
    like: dict[str, Any] = {"dtype": down.dtype, "device": down.device}
    rows, first, h, out = (torch.zeros(sum(counts), n, **like) for n in (hidden, 2 * inner, inner, hidden))  # fmt: skip
    d_gate_up, d_down = (torch.zeros_like(w) if backward else w for w in (gate_up, down))

    def run() -> None:
        start = 0
        for e, count in enumerate(counts):
            if count == 0:
                continue
            here, start = slice(start, start + count), start + count
            torch.mm(rows[here], gate_up[e].T, out=first[here])
            torch.mm(h[here], down[e].T, out=out[here])
            if backward:
                torch.mm(out[here], down[e], out=h[here])
                torch.mm(out[here].T, h[here], out=d_down[e])
                torch.mm(first[here].T, rows[here], out=d_gate_up[e])
                torch.mm(first[here], gate_up[e], out=rows[here])

    return run
