"""How a preference loss reaches its head: checks, the choice of implementation, autograd.

Every loss of this room is one row-wise head (``csrc/preference/heads.hpp``): a value and its gradient per
pair, computed in one pass in forward; backward multiplies by what comes from above. In eager mode the call
goes straight to an ``autograd.Function``; under ``torch.compile`` it goes through the registered operator
``torch.ops.hotloop.pair_loss``. The direct route saves the dispatcher's share of a small call (8 pairs:
see docs/perf-notes.md) and both are tested to agree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ..front import arrays, buffers, check, environment, native, plain
from ..front.impl import choose, everywhere, note, on_cpu, on_cuda

Reduction = Literal["none", "mean", "sum"]
Row = Tensor | float

_CANDIDATES = {"cuda": on_cuda, "cpu": on_cpu, "reference": everywhere}
_NO_SECOND = "[pair_loss] create_graph: expected False, got True. Use impl='reference' for second derivatives."


def pair_loss(
    op: str,
    head: str,
    differentiable: Mapping[str, Tensor | None],
    constants: Mapping[str, Row],
    params: tuple[float, ...],
    reduction: str,
    impl: str,
    reference: Callable[[], Tensor],
) -> Tensor:
    """Run ``head`` over n rows.

    Args:
        op: public name, for errors.
        head: name of the head in the compiled modules.
        differentiable: inputs of shape (n,) with a gradient, in the order of the head; None means absent
            (zero, no gradient). The first one is required and sets n, the device and the dtype.
        constants: inputs without a gradient: shape (n,), a tensor with one element, or a number.
        params: numbers of the call, in the order of the head.
        reduction: "none", "mean" or "sum".
        impl: see ``hotloop.front.impl``.
        reference: computes the same in plain torch.
    """
    check.choice(op, "reduction", reduction, check.REDUCTIONS)
    like = next(iter(differentiable))
    first = check.float_tensor(op, like, differentiable[like], ndim=1)
    shape, dtype, device = first.shape, first.dtype, first.device
    double = dtype is torch.float64
    inputs = list(differentiable.values())
    constant_rows = list(constants.values())
    # One comparison per row says that nothing is wrong; what it is, if something is, comes after.
    for k, value in enumerate(inputs):
        if value is None or (
            type(value) is Tensor
            and value.dtype is dtype
            and value.shape == shape
            and value.device == device
        ):
            continue
        value = check.float_tensor(op, list(differentiable)[k], value)
        _check_row(op, list(differentiable)[k], value, first, like)
        double = double or value.dtype is torch.float64
    for k, row in enumerate(constant_rows):
        if (
            type(row) is Tensor
            and row.dtype is dtype
            and row.shape == shape
            and row.device == device
        ):
            continue
        name = list(constants)[k]
        if isinstance(row, Tensor):
            check.tensor(op, name, row)
            if row.is_quantized:
                plain.check(op, name, row)
            # Counts and flags: in a half type a length of 1001 would be rounded.
            row = (
                row
                if arrays.dtype(row) in arrays.FLOATS
                else row.to(torch.float64 if double else torch.float32)
            )
            row = row.reshape(1) if row.ndim == 0 else row
            _check_row(op, name, row, first, like, broadcast=True)
            double = double or row.dtype is torch.float64
        else:
            row = check.number(op, name, row)
        constant_rows[k] = row
    compiling = torch.compiler.is_compiling()
    if not compiling and environment.checks_on():
        for name, given in (*differentiable.items(), *zip(constants, constant_rows)):
            if isinstance(given, Tensor):
                check.finite(op, **{name: given})
    if impl == "auto" and device.type == "cpu" and environment.forced_impl() is None:
        chosen = "cpu"
        note(op, chosen)
        if environment.logs() and not compiling:
            environment.log_call(op, impl=chosen, **{like: tuple(shape)})
    else:
        chosen = choose(op, impl, like, first, _CANDIDATES)
    if chosen == "reference":
        return reference()
    if compiling:
        return _registered(head, inputs, constant_rows, params, reduction, first, double)
    check.untransformed(op, *inputs)
    loss: Tensor = _PairLoss.apply(
        head, constant_rows, params, reduction, double, torch.is_grad_enabled(), *inputs
    )
    return loss


def _check_row(
    op: str, name: str, value: Tensor, first: Tensor, like: str, broadcast: bool = False
) -> None:
    n = first.shape[0]
    if value.ndim != 1 or (value.shape[0] != n and not (broadcast and value.shape[0] == 1)):
        raise ValueError(
            f"[{op}] {name}: expected shape ({n},) like {like}, got {tuple(value.shape)}. "
            "Pass one value per row."
        )
    check.same_place(op, name, value, like, first)


def _run(
    head: str,
    n: int,
    device: torch.device,
    inputs: list[Any],
    params: tuple[float, ...],
    loss: Tensor | None,
    grads: list[Tensor | None],
    grad_scale: float,
    total: Tensor | None,
    double: bool,
    divisor: int = 1,
) -> None:
    """Call the compiled loop of ``device``; ``total``, where given, receives the sum of the losses / ``divisor``."""
    if device.type == "cpu":
        value = native.core.pointwise.pair_loop(
            head, n, inputs, params, loss, grads, grad_scale, total is not None, double
        )
        if total is not None:
            total.fill_(
                value / divisor if divisor else float("nan")
            )  # the mean of nothing, as in torch
        return
    module = native.cuda
    assert module is not None
    partials = None
    if total is not None:
        partials = torch.empty(module.pointwise.PAIR_PARTIALS, dtype=torch.float64, device=device)
    index, stream = native.stream_of(inputs[0])
    module.pointwise.pair_loop(
        head, n, inputs, params, loss, grads, grad_scale,
        None if total is None else total.reshape(1), partials, double, index, stream,
    )  # fmt: skip
    if total is not None and divisor != 1:
        total /= divisor


def _losses(
    head: str,
    inputs: list[Any],
    params: tuple[float, ...],
    reduction: str,
    first: Tensor,
    grads: list[Tensor | None],
    double: bool,
) -> Tensor:
    """Fill ``grads`` and return the loss: a scalar, or one value per row for reduction "none"."""
    n = first.shape[0]
    dtype = torch.float64 if double else torch.float32
    scale = 1.0 / n if reduction == "mean" and n > 0 else 1.0
    if reduction == "none":
        loss = torch.empty(n, dtype=dtype, device=first.device)
        _run(head, n, first.device, inputs, params, loss, grads, 1.0, None, double)
        return loss
    total = torch.empty((), dtype=dtype, device=first.device)
    divisor = n if reduction == "mean" else 1
    _run(head, n, first.device, inputs, params, None, grads, scale, total, double, divisor)
    return total


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


class _PairLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        head: str,
        constants: list[Row],
        params: tuple[float, ...],
        reduction: str,
        double: bool,
        grad_enabled: bool,
        *inputs: Tensor | None,
    ) -> Tensor:
        needed = ctx.needs_input_grad[6:] if grad_enabled else (False,) * len(inputs)
        grads = [
            _gradient_like(x) if x is not None and need else None for x, need in zip(inputs, needed)
        ]
        first = inputs[0]
        assert first is not None
        columns = [0.0 if x is None else x for x in (*inputs, *constants)]
        loss = _losses(head, columns, params, reduction, first, grads, double)
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
        return (None, None, None, None, None, None, *scaled)


# -- registered form, for torch.compile -------------------------------------------------------------------


@torch.library.custom_op("hotloop::pair_loss", mutates_args=())
def _pair_loss_op(
    inputs: list[Tensor], constants: list[Tensor], head: str, params: list[float], reduction: str
) -> tuple[Tensor, Tensor]:
    """Return the loss and the stacked gradients (G, n) of the G inputs."""
    first = inputs[0]
    double = any(x.dtype == torch.float64 for x in (*inputs, *constants))
    dtype = torch.float64 if double else torch.float32
    stacked = torch.empty((len(inputs), first.shape[0]), dtype=dtype, device=first.device)
    grads: list[Tensor | None] = list(stacked.unbind(0))
    loss = _losses(head, [*inputs, *constants], tuple(params), reduction, first, grads, double)
    return loss, stacked


@_pair_loss_op.register_fake
def _pair_loss_fake(
    inputs: list[Tensor], constants: list[Tensor], head: str, params: list[float], reduction: str
) -> tuple[Tensor, Tensor]:
    first = inputs[0]
    double = any(x.dtype == torch.float64 for x in (*inputs, *constants))
    dtype = torch.float64 if double else torch.float32
    n = first.shape[0]
    loss = first.new_empty((n,) if reduction == "none" else (), dtype=dtype)
    return loss, first.new_empty((len(inputs), n), dtype=dtype)


# The inputs take part so that AOTAutograd sees that the gradient depends on them: where they are inputs of its graph it
# then refuses a second derivative, instead of leaving it out.
@torch.library.custom_op("hotloop::pair_loss_backward", mutates_args=())
def _pair_loss_backward_op(
    stacked: Tensor, grad_loss: Tensor, inputs: list[Tensor]
) -> list[Tensor]:
    """Return the gradients of the inputs from the stacked ones (G, n) and the gradient of the loss."""
    return [(g * grad_loss).to(x.dtype) for g, x in zip(stacked.unbind(0), inputs)]


@_pair_loss_backward_op.register_fake
def _(stacked: Tensor, grad_loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in inputs]


def _pair_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], *inputs[0])
    ctx.n_constants = len(inputs[1])


def _pair_loss_backward(ctx: Any, grad_loss: Tensor, _grad_grads: Tensor) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(_NO_SECOND)
    stacked, *inputs = ctx.saved_tensors
    grads = torch.ops.hotloop.pair_loss_backward(stacked, grad_loss, inputs)
    return grads, [None] * ctx.n_constants, None, None, None


_pair_loss_op.register_autograd(_pair_loss_backward, setup_context=_pair_loss_setup)


def _registered(
    head: str,
    inputs: list[Tensor | None],
    constants: list[Row],
    params: tuple[float, ...],
    reduction: str,
    first: Tensor,
    double: bool,
) -> Tensor:
    present = [torch.zeros_like(first) if x is None else x for x in inputs]
    dtype = torch.float64 if double else torch.float32
    columns = [
        c if isinstance(c, Tensor) else torch.full((1,), c, dtype=dtype, device=first.device)
        for c in constants
    ]
    loss, _ = torch.ops.hotloop.pair_loss(present, columns, head, list(params), reduction)
    result: Tensor = loss
    return result
