# SPDX-License-Identifier: Apache-2.0
"""The products of experts: a grouped linear layer, and the two products of an expert with the activation between."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..front import arrays, check, environment
from ..front import impl as _impl
from ..front.impl import Impl
from ..reference.moe import experts as reference
from ..reference.moe.experts import Activation
from ..vocabulary import like
from . import _experts_arguments as arguments
from . import _experts_operator as operator
from ._experts_cpu import Weights
from ._experts_triton import refuses as triton_refuses
from .results import Dispatch

CANDIDATES = {"cpu": _impl.on_cpu, "triton": triton_refuses, "reference": _impl.everywhere}


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    dispatch: Dispatch | Tensor,
    bias: Tensor | None = None,
    *,
    transposed: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """A linear layer per expert, over rows in the order of their experts.

    out[r] = weight[e] x[r] + bias[e] for the rows r of expert e. Rows of nothing are 0, whatever stands in x. Products
    add in float32 or better; gradients of weights of experts without rows are 0.

    Args:
        x: (R, D) float32, float64, float16 or bfloat16, any strides. Differentiable.
        weight: (E, D_out, D) in the dtype of x, any strides; (E, D, D_out) if ``transposed``. Differentiable.
        dispatch: from ``route`` or ``dispatch``; or the offsets alone, (E + 1,) int64, rising from at least 0 to at
            most R: expert e has the rows offsets[e] to offsets[e + 1] - 1.
        bias: (E, D_out) in the dtype of x. Differentiable. Default None.
        transposed: whether weights are stored (E, inputs, outputs). Default False.
        impl: "auto", "cpu", "triton" or "reference".

    Returns:
        (R, D_out) in the dtype of x.

    Raises:
        TypeError, ValueError: a tensor of another dtype, shape or device; on the CPU, or with HOTLOOP_CHECK=1, numbers
            of a dispatch that are out of range or do not fit each other.
        NotImplementedError: a forced ``impl`` that cannot run; torch.func transforms.

    Examples:
        >>> import torch
        >>> weight = torch.tensor([[[2.0]], [[10.0]]])
        >>> grouped_linear(torch.ones(4, 1), weight, torch.tensor([0, 1, 3])).tolist()
        [[2.0], [10.0], [10.0], [0.0]]

    Reference:
        Gale et al. 2022, arXiv:2211.15841.
    """
    op = "grouped_linear"
    check.float_tensor(op, "x", x, 2)
    arguments.weights(op, "weight", weight, x)
    transposed = check.flag(op, "transposed", transposed)
    experts, outputs, inputs = weight.shape
    if transposed:
        outputs, inputs = inputs, outputs
    if x.shape[1] != inputs:
        order = "(E, inputs, outputs)" if transposed else "(E, outputs, inputs)"
        raise ValueError(
            f"[{op}] weight: expected {x.shape[1]} inputs like the columns of x, got shape {tuple(weight.shape)}, "
            f"{order}. Pass transposed={not transposed} for the other order."
        )
    arguments.bias_of(op, "bias", bias, (experts, outputs), x)
    if isinstance(dispatch, Tensor):
        arguments.offsets_of(op, "dispatch", dispatch, experts, x)
    else:
        arguments.dispatch_of(op, dispatch, experts, x)
        _rows(op, dispatch, x.shape[0])
    check.finite(op, x=x, weight=weight, bias=bias)
    chosen = _impl.choose(op, impl, "x", x, CANDIDATES)
    if _looks(x, chosen):
        if isinstance(dispatch, Tensor):
            arguments.look_at_offsets(op, "dispatch", dispatch, x.shape[0])
        else:
            arguments.look_at(op, dispatch, x.shape[0])
    if chosen != "reference":
        return operator.grouped_linear(op, x, weight, bias, dispatch, transposed)
    return reference.grouped_linear(x, weight, dispatch, bias, transposed=transposed)


def expert_mlp(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_weights: Tensor,
    dispatch: Dispatch,
    *,
    activation: str | Activation = "swiglu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    shared: Tensor | None = None,
    transposed: bool = False,
    activation_budget: int | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """The routed experts of a mixture: both products of every expert, and the weighted sum of each token's results.

    y_tj = down[e] act(gate_up[e] x_t + gate_up_bias[e]) + down_bias[e], e the expert that choice j of token t goes to;
    out_t = sum_j topk_weights[t, j] y_tj + shared_t. Rows are gathered, multiplied and added expert by expert, so that
    nothing of the size (R, D) is kept. Choices that go nowhere add 0, and their weights have gradient 0.

    Args:
        x: (T, D) float32, float64, float16 or bfloat16, any strides. Differentiable.
        gate_up: the first product, in the dtype of x, any strides: (E, 2 I, D), or (E, I, D) for an activation without
            a gate; with ``transposed`` (E, D, 2 I) or (E, D, I). Differentiable.
        down: the second product, (E, D, I); with ``transposed`` (E, I, D). Differentiable.
        topk_weights: (T, k), any float dtype. Differentiable.
        dispatch: of the T * k choices, from ``route`` or ``dispatch``.
        activation: a kind, "swiglu", "geglu", "geglu_tanh" or "reglu" (gate and value), "silu", "gelu", "gelu_tanh",
            "relu" or "relu2" (no gate); or an ``Activation``, which also says where gates lie, limits, scale and shift:
            Activation("swiglu", interleaved=True, limit=7.0, alpha=1.702, shift=1.0) is that of gpt-oss. Default
            "swiglu".
        gate_up_bias: (E, 2 I) or (E, I), in the dtype of x. Differentiable. Default None.
        down_bias: (E, D). Differentiable. Default None.
        shared: (T, D) in the dtype of x, added to the result, such as that of shared experts. Differentiable. Default
            None.
        transposed: whether weights are stored (E, inputs, outputs). Default False.
        activation_budget: bytes that the first product may keep for the gradient; what does not fit is computed again.
            The same bits whatever it is. Default None: everything is kept.
        impl: "auto", "cpu", "triton" or "reference".

    Returns:
        (T, D) in the dtype of x. Sums are added in float32 or better.

    Raises:
        TypeError, ValueError: a tensor of another dtype, shape or device; an activation that is not known; on the CPU,
            or with HOTLOOP_CHECK=1, numbers of a dispatch that are out of range or do not fit each other.
        NotImplementedError: a forced ``impl`` that cannot run; torch.func transforms.

    Examples:
        >>> import torch
        >>> from hotloop.moe import dispatch
        >>> x, up, down = torch.tensor([[1.0], [-1.0]]), torch.ones(3, 1, 1), torch.ones(3, 1, 1)
        >>> order = dispatch(torch.tensor([[2, 0], [1, 2]]), 3)
        >>> weights = torch.tensor([[1.0, 2.0], [1.0, 1.0]])
        >>> expert_mlp(x, up, down, weights, order, activation="relu").tolist()
        [[3.0], [0.0]]

    Reference:
        Gale et al. 2022, arXiv:2211.15841; gated experts: Shazeer 2020, arXiv:2002.05202.
    """
    op = "expert_mlp"
    given = _experts(
        op, x, gate_up, down, dispatch, activation, gate_up_bias, down_bias, transposed, activation_budget
    )  # fmt: skip
    k = arguments.choices(op, dispatch, x.shape[0])
    check.float_tensor(op, "topk_weights", topk_weights, 2)
    check.same_place(op, "topk_weights", topk_weights, "x", x)
    if x.shape[0] == 0:
        k = topk_weights.shape[1]
    check.shape(
        op, "topk_weights", topk_weights, (x.shape[0], k), "(T, k) like the slots of dispatch"
    )
    if shared is not None:
        arguments.beside(op, "shared", check.float_tensor(op, "shared", shared), x)
        check.shape(op, "shared", shared, tuple(x.shape), "like x")
    check.finite(op, topk_weights=topk_weights, shared=shared)
    chosen = _impl.choose(op, impl, "x", x, CANDIDATES)
    if _looks(x, chosen):
        arguments.look_at(op, dispatch, dispatch.slot_of_row.shape[0])
    if chosen != "reference":
        biases = (given["gate_up_bias"], given["down_bias"])
        inputs = Weights(x, gate_up, down, topk_weights, *biases, shared)
        return operator.experts(
            op, inputs, dispatch, given["activation"], given["transposed"], activation_budget
        )
    return reference.expert_mlp(x, gate_up, down, topk_weights, dispatch, shared=shared, **given)


@like(expert_mlp)
def expert_rows(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    dispatch: Dispatch,
    *,
    activation: str | Activation = "swiglu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    transposed: bool = False,
    activation_budget: int | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Both products of every expert, as rows in the order of the experts: what ``combine`` and the depth layers take.

    out[r] = down[e] act(gate_up[e] x[slot_of_row[r] // k] + gate_up_bias[e]) + down_bias[e] for the rows r of expert e;
    0 for rows of nothing.

    Returns:
        (R, D) in the dtype of x, R = dispatch.slot_of_row.shape[0].

    Examples:
        >>> import torch
        >>> from hotloop.moe import dispatch
        >>> x, up, down = torch.tensor([[1.0], [-1.0]]), torch.ones(3, 1, 1), torch.ones(3, 1, 1)
        >>> order = dispatch(torch.tensor([[2, 0], [1, 2]]), 3)
        >>> expert_rows(x, up, down, order, activation="relu").tolist()
        [[1.0], [0.0], [1.0], [0.0]]

    Reference:
        Gale et al. 2022, arXiv:2211.15841; gated experts: Shazeer 2020, arXiv:2002.05202.
    """
    op = "expert_rows"
    given = _experts(
        op, x, gate_up, down, dispatch, activation, gate_up_bias, down_bias, transposed, activation_budget
    )  # fmt: skip
    arguments.choices(op, dispatch, x.shape[0])
    chosen = _impl.choose(op, impl, "x", x, CANDIDATES)
    if _looks(x, chosen):
        arguments.look_at(op, dispatch, dispatch.slot_of_row.shape[0])
    if chosen != "reference":
        biases = (given["gate_up_bias"], given["down_bias"])
        inputs = Weights(x, gate_up, down, None, *biases, None)
        return operator.experts(
            op, inputs, dispatch, given["activation"], given["transposed"], activation_budget
        )
    return reference.expert_rows(x, gate_up, down, dispatch, **given)


def _experts(
    op: str,
    x: Any,
    gate_up: Any,
    down: Any,
    dispatch: Any,
    activation: Any,
    gate_up_bias: Any,
    down_bias: Any,
    transposed: Any,
    activation_budget: Any,
) -> dict[str, Any]:
    """Check everything that both ops on whole experts take; return what follows the dispatch."""
    check.float_tensor(op, "x", x, 2)
    arguments.weights(op, "gate_up", gate_up, x)
    arguments.weights(op, "down", down, x)
    transposed = check.flag(op, "transposed", transposed)
    act = arguments.activation_of(op, activation)
    if activation_budget is not None:
        check.integer(op, "activation_budget", activation_budget, at_least=0)
    experts, width, hidden = gate_up.shape
    if transposed:
        width, hidden = hidden, width
    order = "(E, inputs, outputs)" if transposed else "(E, outputs, inputs)"
    other = f"Pass transposed={not transposed} for the other order."
    if hidden != x.shape[1]:
        raise ValueError(
            f"[{op}] gate_up: expected {x.shape[1]} inputs like the columns of x, got shape {tuple(gate_up.shape)}, "
            f"{order}. {other}"
        )
    if act.gated and width % 2:
        raise ValueError(
            f"[{op}] gate_up: expected an even number of outputs for {act.kind!r}, a gate and a value each, got shape "
            f"{tuple(gate_up.shape)}. Pass an activation without a gate, such as 'silu'."
        )
    inner = width // 2 if act.gated else width
    wanted = (experts, inner, hidden) if transposed else (experts, hidden, inner)
    check.shape(op, "down", down, wanted, f"{order} like gate_up", other)
    arguments.bias_of(op, "gate_up_bias", gate_up_bias, (experts, width), x)
    arguments.bias_of(op, "down_bias", down_bias, (experts, hidden), x)
    arguments.dispatch_of(op, dispatch, experts, x)
    check.finite(
        op, x=x, gate_up=gate_up, down=down, gate_up_bias=gate_up_bias, down_bias=down_bias
    )
    return {
        "activation": act,
        "gate_up_bias": gate_up_bias,
        "down_bias": down_bias,
        "transposed": transposed,
    }


def _rows(op: str, dispatch: Dispatch, rows: int) -> None:
    check.shape(
        op,
        "dispatch.slot_of_row",
        dispatch.slot_of_row,
        (rows,),
        "(R,) like x",
        "Pass the dispatch that these rows were permuted by.",
    )


def _looks(x: Tensor, chosen: str) -> bool:
    """Whether the numbers of a dispatch are looked at here; the loops on the CPU do it themselves."""
    if chosen == "cpu" or arrays.compiling():
        return False
    return x.is_cpu or environment.checks_on()
