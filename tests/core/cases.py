"""Valid calls of the ops on ragged groups."""

import torch
from catalog_cases import Arguments, Call, D, normal


def groups(n: int) -> Arguments:
    offsets = torch.tensor([0, n // 2, n // 2, n], device="cpu")
    return {"values": normal(n, D, leaf=True), "cu_seqlens": offsets}


def group_ids(n: int) -> Arguments:
    ids = torch.arange(n, device="cpu") * 7 % 3
    return {"values": normal(n, leaf=True), "segment_ids": ids, "num_segments": 3}


CALLS = [
    Call("segment_sum", groups),
    Call("segment_mean", group_ids),
    Call("segment_max", groups),
    Call("segment_min", group_ids),
    Call("segment_logsumexp", groups),
    Call("counting_sort", lambda n: {"keys": torch.arange(n, device="cpu") * 7 % 5, "num_keys": 5}),
]
