# SPDX-License-Identifier: Apache-2.0
"""Mirror speculative decoding: continuations that were rolled out while the target was still verifying."""

from __future__ import annotations

from typing import Any

from ..front import arrays, check, native
from ..front.impl import Impl, choose
from ..reference.decode import mirror as _reference
from ..reference.decode.results import BranchReuse


def mirror_sd_branch_reuse(
    output_token_ids: Any,
    num_accepted: Any,
    branch_root_ids: Any,
    branch_token_ids: Any,
    *,
    impl: Impl = "auto",
) -> BranchReuse:
    """Find the branch that starts with the token the verification emitted: its continuation is the next draft.

    c = output_token_ids[b, tau], tau = num_accepted[b]; j = first index with branch_root_ids[b, tau, j] = c. If there
    is one, branch_token_ids[b, tau, j] is the next window at no draft latency, else the draft model starts again from
    c. The emitted tokens are those of the verification either way, since c is drawn before any branch is looked at.

    Args:
        output_token_ids: (B, gamma+1), int32 or int64, from any verification of this room.
        num_accepted: (B,) int64, from the same.
        branch_root_ids: (B, gamma+1, kappa), dtype of ``output_token_ids``: candidates for the token at each position,
            from ``top_logprobs`` of the early-exit logits; -1 for none. kappa may be 0.
        branch_token_ids: (B, gamma+1, kappa, gamma'), same dtype: the draft's continuation of each.
        impl: "auto", "cpu" or "reference".

    Returns:
        ``BranchReuse``: ``reused`` (B,) bool, ``branch`` (B,) int64 (-1 for none), ``next_token_ids`` (B, gamma') (-1
        where nothing is reused).

    Raises:
        TypeError, ValueError: an array of another dtype, shape, library or device.
        NotImplementedError: a forced ``impl`` that cannot run.

    Examples:
        >>> import numpy as np
        >>> roots, branches = np.array([[[7, 8]], [[5, 6]]]), np.arange(8).reshape(2, 1, 2, 2)
        >>> done = mirror_sd_branch_reuse(np.array([[8], [4]]), np.array([0, 0]), roots, branches)
        >>> done.reused.tolist(), done.next_token_ids.tolist()
        ([True, False], [[2, 3], [-1, -1]])

    Reference:
        Bhendawade et al. 2025, arXiv:2510.13161, section 3.1 (from its Fig. 1: the formal text was not at hand).
    """
    op = "mirror_sd_branch_reuse"
    ids = check.array(op, "output_token_ids", output_token_ids, arrays.INTEGERS, 2)
    batch, width = map(int, ids.shape)
    like, same = ("output_token_ids", ids), (arrays.dtype(ids),)
    check.alike(op, "num_accepted", num_accepted, ("int64",), (batch,), *like)
    check.array(op, "branch_root_ids", branch_root_ids, same, 3)
    check.array(op, "branch_token_ids", branch_token_ids, same, 4)
    kappa, following = int(branch_root_ids.shape[2]), int(branch_token_ids.shape[3])
    shape = (batch, width, kappa)
    check.alike(op, "branch_root_ids", branch_root_ids, same, shape, *like)
    check.alike(op, "branch_token_ids", branch_token_ids, same, (*shape, following), *like)
    if choose(op, impl, "output_token_ids", ids) == "reference":
        return _reference.mirror_sd_branch_reuse(
            ids, num_accepted, branch_root_ids, branch_token_ids
        )
    reused = arrays.empty(ids, (batch,), "bool")
    branch = arrays.empty(ids, (batch,), "int64")
    window = arrays.empty(ids, (batch, following), arrays.dtype(ids))
    native.core.decode.branch_reuse(
        batch,
        width,
        kappa,
        following,
        arrays.dense(ids),
        arrays.dense(num_accepted),
        arrays.dense(branch_root_ids),
        arrays.dense(branch_token_ids),
        reused,
        branch,
        window,
    )
    return BranchReuse(reused, branch, window)
