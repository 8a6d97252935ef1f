# SPDX-License-Identifier: Apache-2.0
"""Valid calls of the ops on ragged groups: every way to name the groups is the first call of one of them."""

import torch
from catalog_cases import Arguments, Call, D, normal


def groups(n: int) -> Arguments:
    offsets = torch.tensor([0, n // 2, n // 2, n], device="cpu")
    return {"values": normal(n, D, leaf=True), "cu_seqlens": offsets}


def group_ids(n: int) -> Arguments:
    ids = torch.arange(n, device="cpu") * 7 % 3
    return {"values": normal(n, leaf=True), "segment_ids": ids, "num_segments": 3}


def masked(make: Arguments) -> Arguments:
    mask = torch.arange(len(make["values"]), device="cpu") % 4 > 0
    return {**make, "mask": mask}


def rows(n: int) -> Arguments:
    values = normal(n, 7)
    return {"mask": values > 0, "values": values.requires_grad_()}


CALLS = [
    Call("segment_sum", groups),
    Call("segment_mean", group_ids),
    Call("segment_max", lambda n: masked(groups(n))),
    Call("segment_min", lambda n: masked(group_ids(n))),
    Call("segment_logsumexp", rows),
    Call("counting_sort", lambda n: {"keys": torch.arange(n, device="cpu") * 7 % 5, "num_keys": 5}),
]
