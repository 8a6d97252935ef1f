# SPDX-License-Identifier: Apache-2.0
"""Gradients that can be differentiated again.

The fused backward returns numbers without a graph. If a graph is asked for (``create_graph=True``, seen as grad mode
inside backward), an operator recomputes its forward by the reference, with all logits, and differentiates that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def gradients(
    reference: Callable[..., Sequence[Tensor | None]],
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """Gradients of ``reference(*inputs)`` in the inputs that are needed, as functions of inputs and ``grads``.

    Args:
        reference: the operator in plain torch; returns its differentiable outputs.
        inputs: its inputs, as autograd saved them: they carry their own graph.
        needed: which of them a gradient is wanted of.
        grads: gradient of each output, or None.
    """
    device = next(x for x in inputs if x is not None).device.type
    with torch.enable_grad(), torch.autocast(device, enabled=False):
        # One input may have been computed from another. Of an alias only the path through this operator counts.
        aliases = [None if x is None else x.view_as(x) for x in inputs]
        outputs = reference(*aliases)
        pairs = [(y, g) for y, g in zip(outputs, grads) if y is not None and g is not None]
        wanted = [x for x, need in zip(aliases, needed) if need and x is not None]
        if not pairs:
            return (None,) * len(inputs)
        found = iter(
            torch.autograd.grad(
                [y for y, _ in pairs],
                wanted,
                [g.to(y.dtype) for y, g in pairs],
                create_graph=True,
                materialize_grads=True,
            )
        )
    return tuple(
        next(found) if need and x is not None else None for x, need in zip(aliases, needed)
    )
