# SPDX-License-Identifier: Apache-2.0
"""A head split over devices: parts of the vocabulary merge into the whole."""

from __future__ import annotations

import pytest
import torch
from hotloop.logprob import (
    LogprobPartial,
    LogprobStatistics,
    linear_logprob_partial,
)
from hotloop.logprob import merge_logprob_partials as merge
from logprob_cases import OPTIONAL, LmHead, by_dtype, make_head
from torch import Tensor

V = 700
# Whole; halves; uneven, with a part of one column; one column less than a tile; everything apart.
SPLITS = ((V,), (350, 350), (1, 600, 99), (511, 189), (100,) * 7)
LOGIT = {"temperature": 0.7, "softcap": 9.0, "logit_scale": 1.1}


def parts_of(head: LmHead, sizes: tuple[int, ...]) -> list[LogprobPartial]:
    parts, first = [], 0
    for size in sizes:
        rows = slice(first, first + size)
        parts.append(
            linear_logprob_partial(
                head.hidden,
                head.weight[rows],
                head.labels,
                first_column=first,
                bias=head.bias[rows],
                **LOGIT,
            )
        )
        first += size
    return parts


def whole_of(head: LmHead) -> LogprobStatistics:
    return head.run(statistics=OPTIONAL, **LOGIT)


@by_dtype
@pytest.mark.parametrize("sizes", SPLITS, ids=str)
@pytest.mark.usefixtures("small_tiles")
def test_parts_merge_into_the_whole(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    head = make_head(21, 8, V, dtype)
    head.labels[1] = 650  # in the last part only
    torch.testing.assert_close(
        merge(parts_of(head, sizes), head.labels), whole_of(head), rtol=1e-5, atol=2e-5
    )


def test_each_part_knows_only_its_own_labels() -> None:
    head = make_head(5, 4, V, ignore=False)
    head.labels = torch.tensor([0, 99, 100, 650, 699])
    parts = parts_of(head, (100, 550, 50))
    known = torch.stack([~p.sums[5].isnan() for p in parts])
    assert known.tolist() == [
        [True, True, False, False, False],
        [False, False, True, False, False],
        [False] * 3 + [True] * 2,
    ]
    assert [p.columns for p in parts] == [100, 550, 50]


def test_ties_over_parts_go_to_the_first() -> None:
    weight = torch.zeros(9, 2)
    weight[[4, 7]] = 1.0
    labels = torch.tensor([4, 7])
    hidden = torch.ones(2, 2)
    parts = [
        linear_logprob_partial(hidden, weight[i : i + 3], labels, first_column=i) for i in (0, 3, 6)
    ]
    assert merge(parts, labels).argmax_hit.tolist() == [True, False]


def test_a_part_of_minus_infinity_adds_nothing() -> None:
    head = make_head(6, 4, V, ignore=False)
    assert head.bias is not None
    head.bias[100:400] = -torch.inf
    head.labels.clamp_(max=99)
    torch.testing.assert_close(merge(parts_of(head, (100, 300, 300)), head.labels), whole_of(head))


def test_ignored_tokens_are_zero_and_no_row_is_left_out_of_a_part() -> None:
    head = make_head(9, 4, V)
    parts = parts_of(head, (350, 350))
    assert all(bool(p.sums[:5].isfinite().all()) for p in parts)
    merged = merge(parts, head.labels)
    for row in merged:
        assert row is not None
        assert not row[head.labels == -100].any()
    again = merge(parts, torch.where(head.labels == -100, -1, head.labels), ignore_index=-1)
    assert torch.equal(again.logps, merged.logps)


def test_partial_statistics_carry_no_gradient() -> None:
    head = make_head(5, 4, 9).leaves()
    part = linear_logprob_partial(
        head.hidden, head.weight, head.labels, first_column=0, bias=head.bias
    )
    assert not part.sums.requires_grad


def test_errors() -> None:
    h, w, y = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.int64)
    for bad in (-1, 1.0, True):
        with pytest.raises(
            ValueError, match=r"\[linear_logprob_partial\] first_column: expected an int >= 0, got"
        ):
            linear_logprob_partial(h, w, y, first_column=bad)
    with pytest.raises(
        ValueError,
        match=r"\[linear_logprob_partial\] labels: expected shape \(3,\), one per row of hidden, got \(2,\)\.",
    ):
        linear_logprob_partial(h, w, y[:2], first_column=0)
    with pytest.raises(
        NotImplementedError, match=r"\[linear_logprob_partial\] impl: expected 'cpu' or 'triton'"
    ):
        linear_logprob_partial(h, w, y, first_column=0, impl="reference")
    with pytest.raises(
        ValueError,
        match=r"\[merge_logprob_partials\] partials: expected at least one part, got none",
    ):
        merge([], y)
    part = linear_logprob_partial(h, w, y, first_column=0)
    with pytest.raises(
        ValueError, match=r"\[merge_logprob_partials\] partials: expected parts over the 2 tokens"
    ):
        merge([part], y[:2])
    shorter: Tensor = part.sums[:, :2]
    with pytest.raises(ValueError, match=r"got \[\(6, 3\), \(6, 2\)\]"):
        merge([part, LogprobPartial(shorter, part.argmax[:2], 5)], y)
