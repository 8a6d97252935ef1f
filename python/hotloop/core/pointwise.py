"""The pointwise engine: one head over rows, from the declaration of a loss to its gradient.

A head (``csrc/<room>/heads.hpp``) is a formula of one row. The loop computes value and gradient in one pass in forward;
backward multiplies by the gradient from above. ``loss`` declares an op whose body is its reference; ``run`` is for
ops that prepare their columns themselves. In eager mode a call goes straight to an ``autograd.Function``; under
``torch.compile`` it goes through the registered operator ``torch.ops.hotloop.pointwise``. The direct route saves the
dispatcher's share of a small call (8 pairs: see docs/perf-notes.md) and both are tested to agree.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..front import arrays, buffers, check, declare, environment, native, plain
from ..front.impl import Impl, choose, everywhere, note, on_cpu, on_cuda

Reduction = Literal["none", "mean", "sum"]
REDUCTIONS = get_args(Reduction)
Row = Tensor | float
F = TypeVar("F", bound=Callable[..., Any])

_CANDIDATES = {"cuda": on_cuda, "cpu": on_cpu, "reference": everywhere}
_NO_SECOND = "[pointwise] create_graph: expected False, got True. Use impl='reference' for second derivatives."


class Outs(NamedTuple):
    """The extra values of a head over the rows that count, each of shape (values,), float64."""

    count: Tensor
    sum: Tensor
    least: Tensor
    largest: Tensor


# -- what a call is made of ------------------------------------------------------------------------------


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


def run(
    op: str,
    head: str,
    differentiable: Mapping[str, Tensor | None],
    constants: Mapping[str, Row],
    params: tuple[float, ...],
    reduction: Reduction,
    impl: Impl,
    body: Callable[..., Tensor],
    absent: tuple[str, ...] = (),
) -> Tensor:
    """Run ``head`` over n rows.

    Args:
        op: public name, for errors.
        head: ``room.name`` of the head in the compiled modules.
        differentiable: inputs of shape (n,) with a gradient, in the order of the head. The first one sets n, the
            device and the dtype.
        constants: inputs without a gradient: shape (n,), a tensor with one element, or a number.
        params: numbers of the call, in the order of the head.
        reduction: "mean", "sum" or "none".
        impl: see ``hotloop.front.impl``.
        body: the reference: values of the rows from all columns, in plain torch; see ``loss``.
        absent: inputs that may be None: zero, without a gradient.
    """
    inputs, rows = list(differentiable.values()), list(constants.values())
    return _call(
        op, head, tuple(differentiable), inputs, tuple(constants), rows, params, reduction, impl,
        lambda: reduce(body(*_columns(inputs, rows)), reduction), absent, None,
    )  # fmt: skip


def run_grouped(
    op: str,
    head: str,
    differentiable: Mapping[str, Tensor | None],
    constants: Mapping[str, Row],
    group_columns: Mapping[str, Tensor],
    params: tuple[float, ...],
    reduction: Reduction,
    impl: Impl,
    reference: Callable[[], tuple[Tensor, Outs]],
    *,
    outs: int,
    groups: int | Tensor = 1,
    weight: Tensor | None = None,
) -> tuple[Tensor, Outs]:
    """``run`` with columns of groups, a weight per row and the extra values of the head.

    Args:
        group_columns: constants of a group of neighbouring rows, shape (groups,).
        outs: number of extra values of the head.
        groups: rows per group, or offsets ``cu_seqlens`` (groups + 1,) from 0 to n, int32 or int64.
        weight: multiplies the loss and the gradients of its row, shape (n,). Rows of weight 0 are left out, whatever
            their inputs are. No gradient flows to it.

    Returns:
        The loss, and the extra values over the rows whose weight is not 0.
    """
    like = next(iter(differentiable))
    first = check.float_tensor(op, like, differentiable[like], ndim=1)
    n = first.shape[0]
    if isinstance(groups, Tensor):
        check.tensor(op, "groups", groups)
        if (
            groups.dtype not in (torch.int32, torch.int64)
            or groups.ndim != 1
            or groups.shape[0] < 1
        ):
            raise ValueError(
                f"[{op}] groups: expected offsets (groups + 1,), int32 or int64, got {tuple(groups.shape)} "
                f"{arrays.dtype(groups)}. Pass cu_seqlens."
            )
        check.same_place(op, "groups", groups, like, first)
        groups, count = groups.contiguous(), groups.shape[0] - 1
    else:
        groups = check.integer(op, "groups", groups, at_least=1)
        if n % groups:
            raise ValueError(f"[{op}] groups: expected a divisor of {n} rows, got {groups}.")
        count = n // groups
    for name, column in group_columns.items():
        check.float_tensor(op, name, column)
        if column.shape != (count,):
            raise ValueError(
                f"[{op}] {name}: expected shape ({count},), one value per group, got {tuple(column.shape)}."
            )
        check.same_place(op, name, column, like, first)
    if weight is not None:
        weight = check.float_tensor(op, "weight", weight)
        _check_row(op, "weight", weight, first, like)
    extras = Extras([c.detach() for c in group_columns.values()], groups, weight, outs)

    def plain_torch() -> Tensor:
        loss, extras.found = reference()
        return loss

    loss = _call(
        op, head, tuple(differentiable), list(differentiable.values()), tuple(constants), list(constants.values()),
        params, reduction, impl, plain_torch, (), extras,
    )  # fmt: skip
    assert extras.found is not None
    return loss, extras.found


def _call(
    op: str,
    head: str,
    names: tuple[str, ...],
    inputs: list[Any],
    row_names: tuple[str, ...],
    rows: list[Any],
    params: tuple[float, ...],
    reduction: str,
    impl: str,
    reference: Callable[[], Tensor],
    absent: tuple[str, ...],
    extras: Extras | None,
) -> Tensor:
    if reduction not in REDUCTIONS:
        check.choice(op, "reduction", reduction, REDUCTIONS)
    like = names[0]
    first = check.float_tensor(op, like, inputs[0], ndim=1)
    shape, dtype, device = first.shape, first.dtype, first.device
    double = dtype is torch.float64
    # One comparison per column says that nothing is wrong; what it is, if something is, comes after.
    for k, value in enumerate(inputs):
        if (
            type(value) is Tensor
            and value.dtype is dtype
            and value.shape == shape
            and value.device == device
        ) or (value is None and names[k] in absent):
            continue
        value = check.float_tensor(op, names[k], value)
        _check_row(op, names[k], value, first, like)
        double = double or value.dtype is torch.float64
    for k, row in enumerate(rows):
        if (
            type(row) is Tensor
            and row.dtype is dtype
            and row.shape == shape
            and row.device == device
        ):
            continue
        if isinstance(row, Tensor) or not isinstance(row, (int, float)):
            row = check.tensor(op, row_names[k], row)
            if row.is_quantized:
                plain.check(op, row_names[k], row)
            # Counts and flags: in a half type a length of 1001 would be rounded.
            row = (
                row
                if arrays.dtype(row) in arrays.FLOATS
                else row.to(torch.float64 if double else torch.float32)
            )
            row = row.reshape(1) if row.ndim == 0 else row
            _check_row(op, row_names[k], row, first, like, broadcast=True)
            double = double or row.dtype is torch.float64
        else:
            row = check.number(op, row_names[k], row)
        rows[k] = row
    compiling = torch.compiler.is_compiling()
    if not compiling and environment.checks_on():
        for name, given in (*zip(names, inputs), *zip(row_names, rows)):
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
        return _registered(head, inputs, rows, params, reduction, first, double, extras)
    check.untransformed(op, *inputs)
    loss: Tensor = _Pointwise.apply(
        head, rows, params, reduction, double, torch.is_grad_enabled(), extras, *inputs
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


# -- declarations --------------------------------------------------------------------------------------------


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)); torch's own returns x above 20, which is 2e-9 off in float64."""
    return -logsigmoid(-x)


def logistic(x: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy of sigma(x) against a soft label."""
    return label * softplus(-x) + (1 - label) * softplus(x)


def reduce(losses: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()


Choose = Callable[..., tuple[str, tuple[float, ...]]]


def loss(
    *,
    grad: tuple[str, ...],
    row: tuple[str, ...] = (),
    head: str | Choose | None = None,
    ranges: Mapping[str, declare.Range] | None = None,
    batch: tuple[str, ...] = (),
    together: tuple[tuple[str, ...], ...] = (),
) -> Callable[[F], F]:
    """Declare a loss whose body is its reference.

    The body is a function of columns and options in plain torch, one value per row. It is called with every column in
    float32 or float64, constants detached, None as 0, options checked. The public function has the signature of the
    body, which ends in ``reduction`` and ``impl``.

    Args:
        grad: arguments with a gradient, in the order of the head.
        row: constants of the row, in the order of the head.
        head: name of the head in ``csrc/<room>/heads.hpp``, or a function of the options that returns the name and the
            numbers of the call. Default: the name of the function without ``_loss``; its numbers are the options.
        ranges: what arguments may be. Options without one are choices (``Literal``) or anything.
        batch: arguments of ``grad`` that may be a scalar, such as a loss averaged over the batch, for every row.
        together: groups of arguments that are given all or none.
    """

    def declared(body: F) -> F:
        op = body.__name__
        room = body.__module__.split(".")[1]
        options = tuple(
            name
            for name in declare.parameters(body)
            if name not in (*grad, *row, "reduction", "impl")
        )
        absent = tuple(n for n in grad if declare.parameters(body)[n].default is None)
        fixed = f"{room}.{head or op.removesuffix('_loss')}"

        def call(
            inputs: list[Any], rows: list[Any], numbers: tuple[Any, ...], reduction: str, impl: str
        ) -> Tensor:
            for k, name in enumerate(grad):
                if name in batch:
                    inputs[k] = _per_row(op, name, inputs[k], grad[0], inputs[0])
            chosen, params = fixed, numbers
            if callable(head):
                name, params = head(*numbers)
                chosen = f"{room}.{name}"

            def reference() -> Tensor:
                columns = _columns(inputs, rows)
                values = body(**dict(zip((*grad, *row), columns)), **dict(zip(options, numbers)))
                return reduce(values, reduction)

            return _call(
                op,
                chosen,
                grad,
                inputs,
                row,
                rows,
                params,
                reduction,
                impl,
                reference,
                absent,
                None,
            )

        numbers = "".join(f"{o}, " for o in options)
        source = f"_call([{', '.join(grad)}], [{', '.join(row)}], ({numbers}), reduction, impl)"
        return declare.op(body, source, {"_call": call}, ranges or {}, together)

    return declared


def _per_row(op: str, name: str, value: Tensor | None, like: str, first: Tensor) -> Tensor | None:
    if value is None:
        return None
    check.float_tensor(op, name, value)
    if value.ndim > 0:
        return value
    return value.expand(check.float_tensor(op, like, first, ndim=1).shape[0])


def _columns(inputs: list[Tensor | None], rows: list[Row | None]) -> list[Tensor]:
    """All in float32, or float64 if any is; None as 0; no gradient reaches the constants."""
    given = [0.0 if x is None else x for x in (*inputs, *rows)]
    found = [x for x in given if isinstance(x, Tensor)]
    double = any(x.dtype == torch.float64 for x in found)
    like = found[0].new_empty(0, dtype=torch.float64 if double else torch.float32)
    columns = [
        x.to(like.dtype) if isinstance(x, Tensor) else like.new_tensor(float(x)) for x in given
    ]
    return columns[: len(inputs)] + [x.detach() for x in columns[len(inputs) :]]


# -- the compiled loops --------------------------------------------------------------------------------------


@functools.cache
def handles(device: str) -> dict[str, int]:
    """The handle of every head of the module for ``device``, by ``room.name``."""
    found = (native.core if device == "cpu" else native.cuda).pointwise.heads()
    return {
        f"{room}.{name}": facts[0] for room, heads in found.items() for name, facts in heads.items()
    }


def _run(
    head: str,
    n: int,
    device: torch.device,
    inputs: list[Any],
    params: Sequence[float],
    loss: Tensor | None,
    grads: list[Tensor | None],
    grad_scale: float,
    total: Tensor | None,
    double: bool,
    divisor: int,
    extras: Extras | None,
) -> None:
    """Call the compiled loop of ``device``; ``total``, where given, receives the sum of the losses / ``divisor``."""
    if extras is not None:
        inputs = inputs + extras.columns
    if device.type == "cpu":
        loop = native.core.pointwise
        handle = handles("cpu")[head]
        if extras is None:
            value = loop.run(
                handle, n, inputs, params, loss, grads, grad_scale, total is not None, double
            )
        else:
            value, counted, outs = loop.run(
                handle, n, inputs, params, loss, grads, grad_scale, total is not None, double, extras.weight,
                extras.groups, True,
            )  # fmt: skip
            stats = torch.tensor(outs, dtype=torch.float64).reshape(-1, 3)
            extras.found = Outs(torch.tensor(counted, dtype=torch.float64), *stats.unbind(1))
        if total is not None:
            total.fill_(
                value / divisor if divisor else float("nan")
            )  # the mean of nothing, as in torch
        return
    loop, handle = native.cuda.pointwise, handles("cuda")[head]
    partials = totals = None
    if total is not None or extras is not None:
        width = 1 if extras is None else 2 + 3 * loop.MAX_OUTS
        partials = torch.empty(loop.PARTIALS * width, dtype=torch.float64, device=device)
    if extras is not None:
        totals = torch.empty((loop.MAX_OUTS, 3), dtype=torch.float64, device=device)
    counted = torch.empty(1, dtype=torch.float64, device=device) if extras is not None else None
    index, stream = native.stream_of(inputs[0])
    outs = loop.run(
        handle, n, inputs, params, loss, grads, grad_scale,
        None if total is None else total.reshape(1), partials, double, index, stream,
        *(() if extras is None else (extras.weight, extras.groups, totals.reshape(-1), counted)),
    )  # fmt: skip
    if extras is not None:
        extras.found = Outs(counted[0], *totals[:outs].unbind(1))
    if total is not None and divisor != 1:
        total /= divisor


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
    n = first.shape[0]
    dtype = torch.float64 if double else torch.float32
    scale = 1.0 / n if reduction == "mean" and n > 0 else 1.0
    if reduction == "none":
        loss = torch.empty(n, dtype=dtype, device=first.device)
        _run(head, n, first.device, inputs, params, loss, grads, 1.0, None, double, 1, extras)
        return loss
    total = torch.empty((), dtype=dtype, device=first.device)
    divisor = n if reduction == "mean" else 1
    _run(head, n, first.device, inputs, params, None, grads, scale, total, double, divisor, extras)
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


class _Pointwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        head: str,
        rows: list[Row],
        params: tuple[float, ...],
        reduction: str,
        double: bool,
        grad_enabled: bool,
        extras: Extras | None,
        *inputs: Tensor | None,
    ) -> Tensor:
        needed = ctx.needs_input_grad[7:] if grad_enabled else (False,) * len(inputs)
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
        return (None, None, None, None, None, None, None, *scaled)


# -- registered form, for torch.compile -------------------------------------------------------------------

# Loss, stacked gradients (G, n) of the G inputs, and the extra values (1 + values, 3): count, then sum, least, largest.
_Found = tuple[Tensor, Tensor, Tensor]


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
    double = any(x.dtype == torch.float64 for x in (*inputs, *rows))
    dtype = torch.float64 if double else torch.float32
    stacked = torch.empty((len(inputs), first.shape[0]), dtype=dtype, device=first.device)
    grads: list[Tensor | None] = list(stacked.unbind(0))
    extras = None
    if outs >= 0:
        groups = group_rows if cu_seqlens is None else cu_seqlens
        extras = Extras(group_columns, groups, weight, outs)
    loss = _losses(head, [*inputs, *rows], params, reduction, first, grads, double, extras)
    if extras is None or extras.found is None:
        return loss, stacked, first.new_empty((0, 3), dtype=torch.float64)
    count, *stats = extras.found
    return loss, stacked, torch.cat((count.expand(1, 3), torch.stack(stats, 1)))


@_pointwise_op.register_fake
def _(
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
    double = any(x.dtype == torch.float64 for x in (*inputs, *rows))
    dtype = torch.float64 if double else torch.float32
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
    return (
        grads,
        [None] * ctx.n_rows,
        None,
        None,
        None,
        [None] * ctx.n_groups,
        None,
        None,
        None,
        None,
    )


_pointwise_op.register_autograd(_backward, setup_context=_setup)


def _registered(
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
