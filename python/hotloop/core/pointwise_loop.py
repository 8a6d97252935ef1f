# SPDX-License-Identifier: Apache-2.0
"""From checked columns to the compiled pointwise loop: its autograd function and its registered operator."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..front import buffers, native

Row = Tensor | float

_NO_SECOND = "[pointwise] create_graph: expected False, got True. Use impl='reference' for second derivatives."


class Outs(NamedTuple):
    """How many rows count, and the extra values of a head over them: shape (values,), float64."""

    rows: Tensor
    sum: Tensor
    least: Tensor
    largest: Tensor


class Extras:
    """The columns that few losses have: group columns with their groups, a weight per row, extra values."""

    def __init__(
        self,
        columns: Sequence[Tensor] = (),
        groups: int | Tensor = 1,
        weight: Tensor | None = None,
        outs: int = 0,
    ) -> None:
        self.columns, self.groups, self.weight, self.outs = list(columns), groups, weight, outs
        self.found: Outs | None = None
        self.double = any(x.dtype is torch.float64 for x in (*columns, weight) if x is not None)


# -- the compiled loops --------------------------------------------------------------------------------------


class _Handles(dict[str, int]):
    """The handle of every head of a compiled module, by ``room.name``."""

    def __missing__(self, head: str) -> int:
        raise NotImplementedError(
            f"[pointwise] head: expected one that is compiled, got {head!r}. "
            f"Add it to Heads in csrc/{head.partition('.')[0]}/heads.hpp and build again."
        )


@functools.cache
def handles(device: str) -> _Handles:
    found = (native.core if device == "cpu" else native.cuda).pointwise.heads()
    named = {
        (room, name): facts[0] for room, heads in found.items() for name, facts in heads.items()
    }
    return _Handles({f"{room}.{name}": handle for (room, name), handle in named.items()})


_Columns = tuple[int, int, list[Any], Sequence[float], Tensor | None, list[Tensor | None], float]
"""What all loops take: handle, n, inputs, params, loss, grads, scale of the gradients."""


def _run_cuda(call: _Columns, total: Tensor | None, double: bool, extras: Extras | None) -> None:
    """Run the loop of CUDA; ``total``, where given, receives the sum of the losses."""
    loop, device = native.cuda.pointwise, call[2][0].device
    place = native.stream_of(call[2][0])

    def numbers(count: int) -> Tensor:
        return torch.empty(count, dtype=torch.float64, device=device)

    sums = None if total is None else total.reshape(1)
    if extras is None:
        partials = None if total is None else numbers(loop.PARTIALS)
        loop.run(*call, sums, partials, double, *place)
        return
    partials = numbers(loop.PARTIALS * (2 + 3 * loop.MAX_OUTS))
    found, counted = numbers(3 * loop.MAX_OUTS), numbers(1)
    outs = loop.run(
        *call, sums, partials, double, *place, extras.weight, extras.groups, found, counted
    )
    extras.found = Outs(counted[0], *found.reshape(-1, 3)[:outs].unbind(1))


def _losses(
    head: str,
    inputs: list[Any],
    params: Sequence[float],
    reduction: str,
    first: Tensor,
    grads: list[Tensor | None],
    double: bool,
    extras: Extras | None,
) -> Tensor:
    """Fill ``grads`` and return the loss: a scalar, or one value per row for reduction "none"."""
    n, device = first.shape[0], first.device
    rows, mean = reduction == "none", reduction == "mean"
    dtype = torch.float64 if double else torch.float32
    loss = torch.empty((n,) if rows else (), dtype=dtype, device=device)
    columns = inputs if extras is None else inputs + extras.columns
    scale = 1.0 / n if mean and n > 0 else 1.0
    on_cpu = device.type == "cpu"
    handle = handles("cpu" if on_cpu else "cuda")[head]
    call: _Columns = (handle, n, columns, params, loss if rows else None, grads, scale)
    if not on_cpu:
        _run_cuda(call, None if rows else loss, double, extras)
        return loss.div_(n) if mean else loss
    loop = native.core.pointwise
    if extras is None:
        value = loop.run(*call, not rows, double)
    else:
        value, counted, outs = loop.run(*call, not rows, double, extras.weight, extras.groups, True)
        stats = torch.tensor(outs, dtype=torch.float64, device="cpu").reshape(-1, 3)
        count = torch.tensor(counted, dtype=torch.float64, device="cpu")
        extras.found = Outs(count, *stats.unbind(1))
    if mean:
        value = value / n if n else float("nan")  # the mean of nothing, as in torch
    return loss if rows else loss.fill_(value)


def _gradient_like(x: Tensor) -> Tensor:
    """Memory for a gradient. Of a half input it is float32, rounded once in backward: dividing by n first would
    round it before a loss scale can save it."""
    if x.dtype.itemsize == 2:
        gradient = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    elif x.is_contiguous():
        gradient = torch.empty_like(x)
    else:
        gradient = torch.empty_like(x, memory_format=torch.contiguous_format)
    large = x.shape[0] >= 2**19 and x.device.type == "cpu"
    return buffers.advised(gradient) if large else gradient


def _always() -> bool:
    return True


# Whether the backward that runs may be followed by another one over the same graph; torch's own name for it is private.
_graph_is_kept: Callable[[], bool] = getattr(
    torch._C._autograd, "_get_current_graph_task_keep_graph", _always
)


class Pointwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: tuple[str, list[Row], Sequence[float], str, bool, bool, Extras | None],
        *inputs: Tensor | None,
    ) -> Tensor:
        # One argument for all that is no input: torch looks at each of them on the way.
        head, rows, params, reduction, double, grad_enabled, extras = call
        needed = ctx.needs_input_grad[1:] if grad_enabled else (False,) * len(inputs)
        grads = [
            _gradient_like(x) if x is not None and need else None for x, need in zip(inputs, needed)
        ]
        first = inputs[0]
        assert first is not None
        columns = [0.0 if x is None else x for x in (*inputs, *rows)]
        loss = _losses(head, columns, params, reduction, first, grads, double, extras)
        # Saved, not kept on ctx: autograd then lets go of them before the gradients are accumulated, which can
        # take the memory over instead of copying it.
        ctx.save_for_backward(*grads)
        half = any(x is not None and x.dtype.itemsize == 2 for x in inputs)
        ctx.dtypes = [None if x is None else x.dtype for x in inputs] if half else None
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        # once_differentiable says the same, for 3 us more.
        if torch.is_grad_enabled():
            raise RuntimeError(_NO_SECOND)
        # On the CPU reading a scalar is free, and most losses are the root of the graph.
        scaled = ctx.saved_tensors
        if not (grad_loss.ndim == 0 and grad_loss.device.type == "cpu" and grad_loss.item() == 1.0):
            scaled = [None if g is None else (g * grad_loss).to(g.dtype) for g in scaled]
        elif _graph_is_kept():
            # Another backward will want them, and whoever gets a gradient may change it.
            scaled = [None if g is None else g.clone() for g in scaled]
        if ctx.dtypes is not None:
            scaled = [None if g is None else g.to(dtype) for g, dtype in zip(scaled, ctx.dtypes)]
        return (None, *scaled)


# -- registered form, for torch.compile -------------------------------------------------------------------

# Loss, stacked gradients (G, n) of the G inputs, and the extra values (1 + values, 3): count, then sum, least, largest.
_Found = tuple[Tensor, Tensor, Tensor]


def _maths(*columns: Tensor | None) -> torch.dtype:
    double = any(x is not None and x.dtype == torch.float64 for x in columns)
    return torch.float64 if double else torch.float32


@torch.library.custom_op("hotloop::pointwise", mutates_args=())
def _pointwise_op(
    inputs: list[Tensor],
    rows: list[Tensor],
    head: str,
    params: list[float],
    reduction: str,
    group_columns: list[Tensor],
    group_rows: int,
    cu_seqlens: Tensor | None,
    weight: Tensor | None,
    outs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    first = inputs[0]
    dtype = _maths(*inputs, *rows, *group_columns, weight)
    double = dtype == torch.float64
    stacked = torch.empty((len(inputs), first.shape[0]), dtype=dtype, device=first.device)
    grads: list[Tensor | None] = list(stacked.unbind(0))
    extras = None
    if outs >= 0:
        groups = group_rows if cu_seqlens is None else cu_seqlens
        extras = Extras(group_columns, groups, weight, outs)
    loss = _losses(head, [*inputs, *rows], params, reduction, first, grads, double, extras)
    if extras is None or extras.found is None:
        return loss, stacked, first.new_empty((0, 3), dtype=torch.float64)
    rows_that_count, *stats = extras.found
    return loss, stacked, torch.cat((rows_that_count.expand(1, 3), torch.stack(stats, 1)))


@_pointwise_op.register_fake
def _(inputs: list[Tensor], rows: list[Tensor], *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    _head, _params, reduction, group_columns, _rows, _offsets, weight, outs = rest
    first, dtype = inputs[0], _maths(*inputs, *rows, *group_columns, weight)
    n = first.shape[0]
    loss = first.new_empty((n,) if reduction == "none" else (), dtype=dtype)
    stacked = first.new_empty((len(inputs), n), dtype=dtype)
    return loss, stacked, first.new_empty((outs + 1, 3), dtype=torch.float64)


# The inputs take part so that AOTAutograd sees that the gradient depends on them: where they are inputs of its graph it
# then refuses a second derivative, instead of leaving it out.
@torch.library.custom_op("hotloop::pointwise_backward", mutates_args=())
def _pointwise_backward_op(
    stacked: Tensor, grad_loss: Tensor, inputs: list[Tensor]
) -> list[Tensor]:
    """Return the gradients of the inputs from the stacked ones (G, n) and the gradient of the loss."""
    return [(g * grad_loss).to(x.dtype) for g, x in zip(stacked.unbind(0), inputs)]


@_pointwise_backward_op.register_fake
def _(stacked: Tensor, grad_loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in inputs]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: _Found) -> None:
    ctx.save_for_backward(output[1], *inputs[0])
    ctx.n_rows, ctx.n_groups = len(inputs[1]), len(inputs[5])


def _backward(ctx: Any, grad_loss: Tensor, _stacked: Tensor, _outs: Tensor) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(_NO_SECOND)
    stacked, *inputs = ctx.saved_tensors
    grads = torch.ops.hotloop.pointwise_backward(stacked, grad_loss, inputs)
    others = ([None] * ctx.n_rows, *[None] * 3, [None] * ctx.n_groups, *[None] * 4)
    return grads, *others


_pointwise_op.register_autograd(_backward, setup_context=_setup)


def registered(
    head: str,
    inputs: list[Tensor | None],
    rows: list[Row],
    params: tuple[float, ...],
    reduction: str,
    first: Tensor,
    double: bool,
    extras: Extras | None,
) -> Tensor:
    present = [torch.zeros_like(first) if x is None else x for x in inputs]
    dtype = torch.float64 if double else torch.float32
    columns = [
        c if isinstance(c, Tensor) else torch.full((1,), c, dtype=dtype, device=first.device)
        for c in rows
    ]
    if extras is None:
        loss, _, _ = torch.ops.hotloop.pointwise(
            present, columns, head, list(params), reduction, [], 1, None, None, -1
        )
    else:
        offsets = extras.groups if isinstance(extras.groups, Tensor) else None
        width = 1 if isinstance(extras.groups, Tensor) else extras.groups
        loss, _, found = torch.ops.hotloop.pointwise(
            present, columns, head, list(params), reduction, extras.columns, width, offsets, extras.weight,
            extras.outs,
        )  # fmt: skip
        extras.found = Outs(found[0, 0], *found[1:].unbind(1))
    result: Tensor = loss
    return result
