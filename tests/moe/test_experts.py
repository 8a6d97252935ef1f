# SPDX-License-Identifier: Apache-2.0
"""The products of experts against a loop over tokens that is not ours, and laws."""

from __future__ import annotations

import torch
from hotloop import moe
from torch import Tensor
from torch.nn import functional

GATE = {
    "swiglu": functional.silu,
    "geglu": functional.gelu,
    "geglu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "reglu": functional.relu,
}
PLAIN = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x) ** 2,
}


def test_every_kind_against_a_loop_over_tokens() -> None:
    T, D, E, k, inner = 9, 5, 4, 2, 3
    g = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    x, weights, ids = normal(T, D), normal(T, k), torch.randint(0, E - 1, (T, k), generator=g)
    ids[3, 0] = -1
    order = moe.dispatch(ids, E)
    for kind in (*GATE, *PLAIN):
        width = 2 * inner if kind in GATE else inner
        up, down, b, c = normal(E, width, D), normal(E, D, inner), normal(E, width), normal(E, D)
        truth = torch.zeros(T, D, dtype=torch.float64)
        for t in range(T):
            for j in range(k):
                e = int(ids[t, j])
                if e < 0:
                    continue
                h = up[e] @ x[t] + b[e]
                h = GATE[kind](h[:inner]) * h[inner:] if kind in GATE else PLAIN[kind](h)
                truth[t] += weights[t, j] * (down[e] @ h + c[e])
        found = moe.expert_mlp(
            x, up, down, weights, order, activation=kind, gate_up_bias=b, down_bias=c
        )
        torch.testing.assert_close(found, truth)
