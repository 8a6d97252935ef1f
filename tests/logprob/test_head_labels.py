# SPDX-License-Identifier: Apache-2.0
"""Labels as Hugging Face stores them, and arguments under the names of other libraries."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import hotloop.logprob
import pytest
import torch
from hotloop.logprob import (
    forward_kl_distill,
    linear_cross_entropy,
    linear_kl,
    linear_logprob,
    token_logprob,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

B, T, D, V = 2, 5, 4, 9
G = torch.Generator().manual_seed(0)
H = torch.randn(B, T, D, generator=G, dtype=torch.float64)
W = torch.randn(V, D, generator=G, dtype=torch.float64)
Y = torch.randint(0, V, (B, T), generator=G)
Y[:, :2] = -100
Y[1, -1] = -100


def by_hand(hidden: Tensor, labels: Tensor) -> Tensor:
    """As transformers' causal loss: the logits before each token against that token."""
    return cross_entropy((hidden @ W.T)[..., :-1, :].flatten(0, -2), labels[..., 1:].flatten())


def test_cross_entropy_of_unshifted_labels() -> None:
    torch.testing.assert_close(linear_cross_entropy(H, W, Y, shift_labels=True), by_hand(H, Y))
    rows = linear_cross_entropy(H, W, Y, shift_labels=True, reduction="none")
    assert rows.shape == (B, T)
    assert not rows[:, -1].any()
    flat = linear_cross_entropy(H[0], W, Y[0], shift_labels=True)
    torch.testing.assert_close(flat, by_hand(H[0], Y[0]))


def test_cross_entropy_equals_a_model_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = Y.clamp(min=0)
    with torch.no_grad():
        out = model(input_ids=ids, labels=Y, output_hidden_states=True)
        ours = linear_cross_entropy(
            out.hidden_states[-1], model.lm_head.weight, Y, shift_labels=True
        )
    torch.testing.assert_close(ours, out.loss)


def test_log_probabilities_and_divergences_of_unshifted_labels() -> None:
    z = H @ W.T
    truth = torch.log_softmax(z, -1)[:, :-1].gather(-1, Y[:, 1:].clamp(min=0).unsqueeze(-1))[..., 0]
    truth = torch.where(Y[:, 1:] >= 0, truth, 0.0)
    for found in (
        linear_logprob(H, W, Y, shift_labels=True).logps,
        token_logprob(z, Y, shift_labels=True).logps,
    ):
        torch.testing.assert_close(found[:, :-1], truth)
        assert not found[:, -1].any()
    moved = torch.full_like(Y, -100)
    moved[:, :-1] = Y[:, 1:]
    other = z.flip(0)
    torch.testing.assert_close(
        forward_kl_distill(z, other, labels=Y, shift_labels=True),
        forward_kl_distill(z, other, labels=moved),
    )
    a, b = (
        linear_kl(H, W, H.flip(0), W, **o)
        for o in ({"labels": Y, "shift_labels": True}, {"labels": moved})
    )
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("cu", [[0, 5, 10], [0, 0, 3, 10], [0, 1, 2, 10, 10], [0, 10]])
def test_packed_sequences_end_where_they_end(cu: list[int]) -> None:
    labels = torch.arange(10) % V
    hidden = H.reshape(10, D)
    found = linear_logprob(hidden, W, labels, cu_seqlens=torch.tensor(cu), shift_labels=True).logps
    truth = [
        torch.log_softmax(hidden[a:b] @ W.T, -1)[:-1].gather(1, labels[a + 1 : b, None]).sum()
        for a, b in pairwise(cu)
    ]
    torch.testing.assert_close(found, torch.stack(truth))


def test_nothing_to_shift() -> None:
    empty = linear_logprob(H[:, :0], W, Y[:, :0], shift_labels=True).logps
    assert empty.shape == (B, 0)
    packed = linear_logprob(
        H[0, :0], W, Y[0, :0], cu_seqlens=torch.tensor([0, 0]), shift_labels=True
    )
    assert packed.logps.tolist() == [0.0]


class Lora(nn.Module):
    """As peft builds them: the layer below, its weight passed through, and an adapter."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight


VALUES: dict[str, Callable[[], Any]] = {
    r"\[linear_kl\] labels: expected a tensor beside shift_labels=True, got None\. Pass labels\.": lambda: (
        linear_kl(H, W, H, W, shift_labels=True)
    ),
    r"\[linear_logprob\] labels: expected at least 1 dimension to shift along, got shape \(\)": lambda: (
        linear_logprob(H[0, 0], W, Y[0, 0], shift_labels=True)
    ),
}
TYPES: dict[str, Callable[[], Any]] = {
    r"\[linear_cross_entropy\] shift_labels: expected True or False, got int\. .*Hugging Face": lambda: (
        linear_cross_entropy(H, W, Y, shift_labels=1)
    ),
    r"\[linear_cross_entropy\] weight: expected a torch.Tensor, got Linear\. Pass its \.weight\.$": lambda: (
        linear_cross_entropy(H, nn.Linear(D, V, bias=False), Y)
    ),
    r"got Linear\. Pass its \.weight, and bias=its \.bias\.$": lambda: linear_logprob(
        H, nn.Linear(D, V), Y
    ),
    r"\[linear_kl\] teacher_weight: expected a torch.Tensor, got Linear\. Pass its \.weight\.$": lambda: (
        linear_kl(H, W, H, nn.Linear(D, V, bias=False))
    ),
    r"got Lora\. Its \.weight leaves the adapter out: merge the adapter into it first": lambda: (
        linear_cross_entropy(H, Lora(nn.Linear(D, V, bias=False)), Y)
    ),
    r"\[linear_cross_entropy\] shift: expected one of hidden, weight, labels, .*got an unknown keyword\. "
    r"Pass shift_labels=True": lambda: linear_cross_entropy(H, W, Y, shift=True),
    "targets: .*Pass it as labels": lambda: linear_cross_entropy(H, W, targets=Y),
    "lse_square_scale: .*Pass it as z_loss": lambda: linear_cross_entropy(
        H, W, Y, lse_square_scale=1e-4
    ),
    r"temperatur: .*Did you mean temperature\?": lambda: linear_logprob(H, W, Y, temperatur=2.0),
    "quux: .*Leave it out": lambda: linear_kl(H, W, H, W, quux=1),
    r"ignore_index: expected an integer, got float\. The default is -100\.": lambda: linear_logprob(
        H, W, Y, ignore_index=-100.0
    ),
}


@pytest.mark.parametrize("text", [*VALUES, *TYPES])
def test_errors(text: str) -> None:
    call, kind = (VALUES[text], ValueError) if text in VALUES else (TYPES[text], TypeError)
    with pytest.raises(kind, match=text):
        call()


@pytest.mark.parametrize(
    "name", [n for n in hotloop.logprob.__all__ if n.startswith("linear_") and "partial" not in n]
)
def test_every_head_says_where_its_labels_stand(name: str) -> None:
    text = getattr(hotloop.logprob, name).__doc__
    assert "shift_labels" in text
