# SPDX-License-Identifier: Apache-2.0
"""Values that an eager call refuses, in a compiled graph: the same error, when the graph runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hotloop.core import counting_sort, segment_sum
from hotloop.decode import chain_speculative_sampling
from hotloop.logprob import (
    forward_kl_distill,
    linear_cross_entropy,
    linear_jsd,
    linear_logprob,
    token_logprob,
)
from hotloop.preference import (
    bco_loss,
    conservative_dpo_loss,
    kto_loss,
    linear_preference_loss,
    robust_dpo_loss,
    sppo_loss,
)
from torch import Tensor

N, V = 4, 5
G = torch.Generator().manual_seed(0)
H, W, Z = torch.randn(N, 3, generator=G), torch.randn(V, 3, generator=G), torch.zeros(N)
LOGITS = H @ W.T
GOOD, BAD = torch.tensor([0, 1, -100, 4]), torch.tensor([0, 1, 99, 4])
RISING, FALLING = torch.tensor([0, 1, 4]), torch.tensor([0, 3, 1, 4])
SHORT = torch.tensor([0, 1, 3])
MARKS = torch.tensor([1, 0, 1, 0])
HALF, OUT = torch.full((N,), 0.3), torch.tensor([0.3, -1.0, 0.5, 0.2])

CALLS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor, list[Tensor]]] = {
    "cross_entropy": (lambda y: linear_cross_entropy(H, W, y), GOOD, [BAD, -2 * MARKS]),
    "int32": (lambda y: linear_cross_entropy(H, W, y), GOOD.int(), [BAD.int()]),
    "shifted": (lambda y: linear_cross_entropy(H, W, y, shift_labels=True), GOOD, [BAD]),
    "token": (lambda y: token_logprob(LOGITS, y).logps, GOOD, [BAD]),
    "jsd": (lambda y: linear_jsd(H, W, H + 1, W, labels=y), GOOD, [BAD]),
    "kd": (lambda y: forward_kl_distill(LOGITS, LOGITS + H[:, :1], labels=y), GOOD, [BAD]),
    "packed": (
        lambda c: linear_logprob(H, W, GOOD, cu_seqlens=c).logps,
        RISING,
        [FALLING, SHORT, RISING + 1],
    ),
    "preference": (
        lambda y: linear_preference_loss(H.view(2, 2, 3), W, y.view(2, 2), loss="simpo")[0],
        GOOD,
        [BAD],
    ),
    "kto": (lambda m: kto_loss(Z, Z, m, kl=0.1), MARKS, [2 * MARKS - 1, 0.5 * MARKS]),
    "bco": (lambda m: bco_loss(Z, Z, m), MARKS, [2 * MARKS - 1]),
    "sppo": (lambda p: sppo_loss(Z, Z, p), HALF, [OUT, HALF + 1, HALF / 0 * 0]),
    "conservative": (
        lambda p: conservative_dpo_loss(Z, Z, Z, Z, label_smoothing=p),
        HALF.bfloat16(),
        [OUT.bfloat16(), HALF.double() + 1],
    ),
    "offsets": (lambda c: segment_sum(Z, c), RISING, [RISING + 1, FALLING, RISING - RISING]),
    "ids": (lambda i: segment_sum(Z, segment_ids=i, num_segments=2), MARKS, [MARKS + 1, MARKS - 1]),
    "keys": (lambda k: counting_sort(k, 2).order, MARKS, [MARKS + 1, MARKS - 1]),
    "law": (
        lambda p: chain_speculative_sampling(None, MARKS[None, :3], p, seed=1).output_token_ids,
        LOGITS.softmax(-1)[None],
        [4 * LOGITS[None]],
    ),
    "robust": (lambda p: robust_dpo_loss(Z, Z, Z, Z, label_smoothing=p), HALF, [HALF + 0.2]),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", CALLS)
def test_the_same_error_as_without_compile(name: str, dynamic: bool) -> None:
    call, good, bads = CALLS[name]
    torch.compiler.reset()
    compiled: Any = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    torch.testing.assert_close(compiled(good), call(good))
    for bad in bads:
        with pytest.raises(ValueError, match=r"^\[\w+\] \w+: expected ") as eager:
            call(bad)
        with pytest.raises(ValueError, match=r"^\[\w+\] \w+: expected ") as graph:
            compiled(bad)
        assert str(graph.value) == str(eager.value)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_keeps_the_look() -> None:
    torch.compiler.reset()
    compiled = torch.compile(CALLS["kto"][0], fullgraph=True)
    torch.testing.assert_close(compiled(MARKS), CALLS["kto"][0](MARKS))
    with pytest.raises(ValueError, match="is_desirable: expected True and False, or 1 and 0"):
        compiled(2 * MARKS - 1)
