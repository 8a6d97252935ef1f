# SPDX-License-Identifier: Apache-2.0
"""Valid calls of the ops of this room, as tensors of any batch."""

from functools import partial
from typing import Any

import numpy as np
import torch
from catalog_cases import Arguments, Call
from decode_calls import CALLS as ARRAYS


def batch_of(base: dict[str, Any], n: int) -> Arguments:
    """The arguments with their rows repeated to a batch of n."""
    return {
        name: torch.from_numpy(np.resize(x, (n, *x.shape[1:])).copy())
        if isinstance(x, np.ndarray) and name != "neighbors"
        else torch.from_numpy(x) if isinstance(x, np.ndarray) else x
        for name, x in base.items()
    }  # fmt: skip


CALLS = [Call(op, partial(batch_of, base)) for op, (_, base) in ARRAYS.items()]
