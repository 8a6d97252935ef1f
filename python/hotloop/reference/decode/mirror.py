# SPDX-License-Identifier: Apache-2.0
"""Branch reuse of Mirror speculative decoding."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...front import arrays
from .results import BranchReuse


def mirror_sd_branch_reuse(
    output_token_ids: Any, num_accepted: Any, branch_root_ids: Any, branch_token_ids: Any
) -> BranchReuse:
    emitted, tau = arrays.to_numpy(output_token_ids), arrays.to_numpy(num_accepted)
    roots, branches = arrays.to_numpy(branch_root_ids), arrays.to_numpy(branch_token_ids)
    batch = emitted.shape[0]
    branch = np.full(batch, -1, np.int64)
    following = np.full((batch, branches.shape[3]), -1, branches.dtype)
    for b in range(batch):
        at = int(tau[b])
        correction = emitted[b, at] if 0 <= at < emitted.shape[1] else -1
        found: Any = np.flatnonzero(roots[b, at] == correction) if correction >= 0 else []
        if len(found):
            branch[b] = found[0]
            following[b] = branches[b, at, found[0]]
    return BranchReuse(
        *(arrays.from_numpy(x, output_token_ids) for x in (branch >= 0, branch, following))
    )
