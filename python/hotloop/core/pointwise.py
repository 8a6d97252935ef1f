# SPDX-License-Identifier: Apache-2.0
"""The pointwise engine: one head over rows, from the declaration of a loss to its gradient.

A head (``csrc/<room>/heads.hpp``) is a formula of one row. The loop computes value and gradient in one pass in forward;
backward multiplies by the gradient from above. ``loss`` declares an op whose body is its reference; ``run`` is for
ops that prepare their columns themselves. In eager mode a call goes straight to an ``autograd.Function``; under
``torch.compile`` it goes through the registered operator ``torch.ops.hotloop.pointwise``. The direct route saves the
dispatcher's share of a small call (8 pairs: see docs/perf-notes.md) and both are tested to agree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar, cast, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..front import arrays, check, declare, environment, plain
from ..front.impl import Impl, choose, everywhere, note, on_cpu, on_cuda
from .pointwise_loop import Extras, Outs, Pointwise, registered
from .pointwise_loop import Row as Row

Reduction = Literal["none", "mean", "sum"]
REDUCTIONS = get_args(Reduction)
F = TypeVar("F", bound=Callable[..., Any])

_DTYPES = {getattr(torch, name) for name in arrays.FLOATS}
_CANDIDATES = {"cuda": on_cuda, "cpu": on_cpu, "reference": everywhere}


# -- what a call is made of ------------------------------------------------------------------------------


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
    names: Names = (op, tuple(differentiable), tuple(constants), absent)

    def reference() -> Tensor:
        return reduce(body(*_columns(inputs, rows)), reduction)

    return _call(names, head, inputs, rows, params, reduction, impl, reference)


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

    names: Names = (op, tuple(differentiable), tuple(constants), ())
    inputs, rows = list(differentiable.values()), list(constants.values())
    loss = _call(names, head, inputs, rows, params, reduction, impl, plain_torch, extras)
    assert extras.found is not None
    return loss, extras.found


Names = tuple[str, tuple[str, ...], tuple[str, ...], tuple[str, ...]]
"""Of an op, its differentiable columns, its constants, and the columns that may be None."""


def _call(
    called: Names,
    head: str,
    inputs: list[Any],
    rows: list[Any],
    params: tuple[float, ...],
    reduction: str,
    impl: str,
    reference: Callable[[], Tensor],
    extras: Extras | None = None,
) -> Tensor:
    op, names, row_names, absent = called
    if reduction not in REDUCTIONS:
        check.choice(op, "reduction", reduction, REDUCTIONS)
    like, first = names[0], inputs[0]
    # What check.float_tensor looks at, without its calls.
    if not (
        type(first) is Tensor
        and first.dtype in _DTYPES
        and first.ndim == 1
        and first.layout is torch.strided
        and not first.is_nested
    ):
        first = check.float_tensor(op, like, first, ndim=1)
    shape, dtype, device = first.shape, first.dtype, first.device
    double = dtype is torch.float64 or (extras is not None and extras.double)
    # One comparison per column says that nothing is wrong; what it is, if something is, comes after.
    for k, value in enumerate(inputs):
        if (
            type(value) is Tensor
            and value.dtype is dtype
            and value.layout is torch.strided
            and not value.is_nested  # which has no shape to ask for
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
            and row.layout is torch.strided
            and not row.is_nested
            and row.shape == shape
            and row.device == device
        ):
            continue
        if isinstance(row, Tensor) or not isinstance(row, (int, float)):
            row = check.tensor(op, row_names[k], row)
            # Counts and flags: in a half type a length of 1001 would be rounded.
            if row.dtype not in _DTYPES:
                if row.is_quantized or row.is_complex():
                    plain.check(op, row_names[k], row)
                row = row.to(torch.float64 if double else torch.float32)
            if row.shape != shape or row.device != device:
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
        return registered(head, inputs, rows, params, reduction, first, double, extras)
    check.untransformed(op, *inputs)
    loss: Tensor = Pointwise.apply(
        (head, rows, params, reduction, double, torch.is_grad_enabled(), extras), *inputs
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
    if value.device != first.device:
        check.same_place(op, name, value, like, first)


# -- declarations --------------------------------------------------------------------------------------------


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)); torch's own returns x above 20, which is 2e-9 off in float64."""
    return -logsigmoid(-x)


def given(column: Row | None) -> Tensor:
    """A column of a body, to type checkers: there every argument that is a column is a tensor."""
    return cast(Tensor, column)


def logistic(x: Tensor, label: Row) -> Tensor:
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
        taken = declare.parameters(body)
        options = tuple(n for n in taken if n not in (*grad, *row, "reduction", "impl"))
        names: Names = (op, grad, row, tuple(n for n in grad if taken[n].default is None))
        batched = tuple(grad.index(name) for name in batch)
        fixed = f"{room}.{head or op.removesuffix('_loss')}"

        def call(
            inputs: list[Any], rows: list[Any], numbers: tuple[Any, ...], reduction: str, impl: str
        ) -> Tensor:
            for k in batched:
                inputs[k] = _per_row(op, grad[k], inputs[k], grad[0], inputs[0])
            chosen, params = fixed, numbers
            if callable(head):
                name, params = head(*numbers)
                chosen = f"{room}.{name}"

            def reference() -> Tensor:
                columns = _columns(inputs, rows)
                values = body(**dict(zip((*grad, *row), columns)), **dict(zip(options, numbers)))
                return reduce(values, reduction)

            return _call(names, chosen, inputs, rows, params, reduction, impl, reference)

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


def _columns(inputs: Sequence[Tensor | None], rows: Sequence[Row | None]) -> list[Tensor]:
    """All in float32, or float64 if any is; None as 0; no gradient reaches the constants."""
    given = [0.0 if x is None else x for x in (*inputs, *rows)]
    found = [x for x in given if isinstance(x, Tensor)]
    double = any(x.dtype == torch.float64 for x in found)
    like = found[0].new_empty(0, dtype=torch.float64 if double else torch.float32)
    columns = [
        x.to(like.dtype) if isinstance(x, Tensor) else like.new_tensor(float(x)) for x in given
    ]
    return columns[: len(inputs)] + [x.detach() for x in columns[len(inputs) :]]
