# SPDX-License-Identifier: Apache-2.0
"""Labels and offsets of any stride give what contiguous ones give."""

from __future__ import annotations

import pytest
import torch
from hotloop.logprob import linear_cross_entropy, linear_logprob, token_logprob

FORMS = {
    "column": lambda y: torch.stack((y, y - 1), -1)[..., 0],
    "expanded": lambda y: y[:1].expand(y.shape[0]),
    "every other": lambda y: torch.stack((y, y), -1).reshape(-1)[::2],
    "int32 column": lambda y: torch.stack((y, y), -1).int()[:, 1],
}


def test_the_last_token_of_every_sequence() -> None:
    z, ids = torch.randn(2, 3, 7), torch.tensor([[1, 2, 3], [4, 5, 6]])
    truth = torch.log_softmax(z[:, -1], -1).gather(1, ids[:, -1:]).squeeze(1)
    torch.testing.assert_close(token_logprob(z[:, -1], ids[:, -1]).logps, truth)


@pytest.mark.parametrize("form", FORMS)
def test_labels_of_any_stride(form: str) -> None:
    h, w = torch.randn(4, 3), torch.randn(6, 3)
    labels = FORMS[form](torch.tensor([5, 0, 2, 3]))
    truth = torch.log_softmax(h @ w.T, -1).gather(1, labels.long()[:, None]).squeeze(1)
    torch.testing.assert_close(linear_logprob(h, w, labels).logps, truth)
    torch.testing.assert_close(token_logprob(h @ w.T, labels).logps, truth)
    torch.testing.assert_close(linear_cross_entropy(h, w, labels), -truth.mean())
    grown = h.clone().requires_grad_()
    linear_cross_entropy(grown, w, labels).backward()
    plain = h.clone().requires_grad_()
    torch.nn.functional.cross_entropy(plain @ w.T, labels.long()).backward()
    torch.testing.assert_close(grown.grad, plain.grad)


def test_offsets_of_any_stride() -> None:
    h, w, y = torch.randn(4, 3), torch.randn(6, 3), torch.tensor([5, 0, 2, 3])
    offsets = torch.tensor([[0, 9], [1, 9], [4, 9]])[:, 0]
    found = linear_logprob(h, w, y, cu_seqlens=offsets)
    wanted = linear_logprob(h, w, y, cu_seqlens=offsets.contiguous())
    torch.testing.assert_close(found.logps, wanted.logps)
