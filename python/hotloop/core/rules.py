# SPDX-License-Identifier: Apache-2.0
"""The rules of row optimizers: frozen settings, shared by tables and by ``sparse_dedup_optimize``.

``state_layout(dim)`` names the float32 numbers a rule keeps per row, in the order of memory; ``init_state`` makes them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np

from ..front import arrays
from ..front.check import choice, flag, integer, number
from ..front.check import kind as kind_of

WEIGHT_DECAY_MODES = ("l2", "decoupled")
EPS_MODES = ("torch", "tensorflow")
CHOICES = {"weight_decay_mode": WEIGHT_DECAY_MODES, "eps_mode": EPS_MODES}


def _betas(op: str, value: Any) -> tuple[float, ...]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"[{op}] betas: expected two numbers, got {value!r}.")
    return tuple(number(op, f"betas[{k}]", b, at_least=0, below=1) for k, b in enumerate(value))


@functools.cache
def _fields(cls: type[RowOptimizer]) -> tuple[tuple[str, Any, str], ...]:
    """Name, default and kind of the fields of a rule."""

    def kind(name: str, default: Any) -> str:
        if name in CHOICES or name == "betas":
            return "betas" if name == "betas" else "choice"
        if isinstance(default, bool):
            return "flag"
        return "lr" if name == "lr" and cls._LR_ABOVE_0 else "number"

    found = ((f.name, f.default) for f in dataclasses.fields(cls))  # type: ignore[arg-type]
    return tuple((name, default, kind(name, default)) for name, default in found)


class RowOptimizer:
    """What the rules have in common. Not an optimizer by itself: use one of its subclasses.

    A rule is its fields, each checked by its name and type; ``_STATE``: the names of what it keeps per row, scalars and
    vectors.
    """

    stochastic_rounding: bool
    _NAME: ClassVar[str] = ""
    _STATE: ClassVar[tuple[tuple[str, ...], tuple[str, ...]]] = ((), ())
    _LR_ABOVE_0: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self._take(type(self).__name__, vars(self))

    def _take(self, op: str, given: Mapping[str, Any]) -> None:
        """Set the fields, each checked by its name and type."""
        fields = vars(self)
        for name, default, kind in _fields(type(self)):  # type: ignore[arg-type]
            value = given.get(name, default)
            if kind == "number":
                value = number(op, name, value, at_least=0, below=math.inf)
            elif kind == "lr":
                value = number(op, name, value, above=0, below=math.inf)
            elif kind == "flag":
                value = flag(op, name, value)
            elif kind == "choice":
                choice(op, name, value, CHOICES[name])
            else:
                value = _betas(op, value)
            fields[name] = value

    def _state(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return self._STATE

    def _scalars(self) -> tuple[str, ...]:
        return self._state()[0]

    def state_layout(self, dim: int) -> dict[str, int]:
        """Name and width of what is kept per row, scalars first, in float32."""
        scalars, vectors = self._state()
        return {**dict.fromkeys(scalars, 1), **dict.fromkeys(vectors, dim)}

    def init_state(self, rows: int, dim: int, *, like: Any = None) -> dict[str, Any]:
        """The state of rows that saw no gradient yet: name -> (rows,) or (rows, dim) array.

        Args:
            rows, dim: rows, and width of one.
            like: array whose library and device the state gets (float64 for a float64 one); None: NumPy.
        """
        op = f"{type(self).__name__}.init_state"
        rows = integer(op, "rows", rows, at_least=0)
        dim = integer(op, "dim", dim, at_least=0)
        wide = like is not None and arrays.dtype(like) == "float64"
        made = {}
        for name, width in self.state_layout(dim).items():
            shape = (rows,) if name in self._scalars() else (rows, width)
            accumulates = name in ("state_sum", "n")
            start = getattr(self, "initial_accumulator_value", 0.0) if accumulates else 0.0
            value = np.full(shape, start, np.float64 if wide else np.float32)
            made[name] = value if like is None else arrays.from_numpy(value, like)
        return made

    def _rule(self) -> dict[str, Any]:
        """What the compiled loops take."""
        found: dict[str, Any] = {"rule": self._NAME, **vars(self)}
        if "betas" in found:
            found["beta1"], found["beta2"] = found.pop("betas")
        if "weight_decay_mode" in found:
            found["decoupled"] = found.pop("weight_decay_mode") == "decoupled"
        if "eps_mode" in found:
            found["uncorrected_eps"] = found.pop("eps_mode") == "tensorflow"
        return found


_R = TypeVar("_R", bound=RowOptimizer)


def settings(op: str, cls: type[_R], **given: Any) -> _R:
    """A rule checked in the name of ``op``; of what is given it takes its fields."""
    rule = object.__new__(cls)
    rule._take(op, given)
    return rule


def of_arguments(
    op: str, kind: type[RowOptimizer], given: dict[str, Any]
) -> tuple[RowOptimizer, dict[str, Any], int]:
    """Rule, state and Adam's common step (or 0) of an update of gathered rows, from its arguments by name."""
    if kind is Adam:
        for name in ("exp_avg_sq", "weight"):
            kind_of(op, name, given[name])  # a nested tensor has no shape to ask for
        one, wide = given["exp_avg_sq"].shape, given["weight"].shape
        given = {**given, "rowwise": len(one) == 1 or (one[1:] == (1,) and wide[1:] != (1,))}
    rule = settings(op, kind, **given)
    scalars, vectors = rule._state()
    state = {name: given[name] for name in (*vectors, *scalars) if name in given}
    step = state.get("step")
    if step is not None and hasattr(step, "dtype"):
        kind_of(op, "step", step)
    if step is None or len(getattr(step, "shape", ())):
        return rule, state, 0
    del state["step"]
    return rule, state, integer(op, "step", step, at_least=1, at_most=2**53)


@dataclass(frozen=True, kw_only=True)
class SGD(RowOptimizer):
    """w -= lr (g + weight_decay w). No state, no momentum.

    Args:
        lr: learning rate, >= 0. Default 0.01.
        weight_decay: >= 0. Default 0. Without state both modes are the same rule.
        stochastic_rounding: float16 and bfloat16 weights round up or down at random, without bias.
    """

    lr: float = 0.01
    weight_decay: float = 0.0
    stochastic_rounding: bool = False

    _NAME: ClassVar[str] = "sgd"


@dataclass(frozen=True, kw_only=True)
class RowwiseAdagrad(RowOptimizer):
    """state_sum += mean_j g_j^2; w -= lr g / (sqrt(state_sum) + eps). One number of state per row.

    Args:
        lr: learning rate, >= 0. Default 0.01.
        eps: >= 0. Default 1e-8 as FBGEMM has it (TorchRec: 1e-10).
        weight_decay: >= 0. Default 0.
        weight_decay_mode: "l2" adds weight_decay w to the gradient; "decoupled" scales w by 1 - lr weight_decay.
        initial_accumulator_value: what state_sum starts with, >= 0. Default 0.
        stochastic_rounding: float16 and bfloat16 weights round up or down at random, without bias.
    """

    lr: float = 0.01
    eps: float = 1e-8
    weight_decay: float = 0.0
    weight_decay_mode: str = "l2"
    initial_accumulator_value: float = 0.0
    stochastic_rounding: bool = False

    _NAME: ClassVar[str] = "rowwise_adagrad"
    _STATE: ClassVar[tuple[tuple[str, ...], tuple[str, ...]]] = (("state_sum",), ())


@dataclass(frozen=True, kw_only=True)
class Adagrad(RowOptimizer):
    """state_sum += g^2; w -= lr g / (sqrt(state_sum) + eps), per element, as torch.optim.Adagrad.

    Args:
        lr: learning rate, >= 0. Default 0.01.
        eps: >= 0. Default 1e-10 (Monolith: 0, and initial_accumulator_value 0.1).
        weight_decay, weight_decay_mode, stochastic_rounding: as in ``RowwiseAdagrad``.
        initial_accumulator_value: what state_sum starts with, >= 0. Default 0.
    """

    lr: float = 0.01
    eps: float = 1e-10
    weight_decay: float = 0.0
    weight_decay_mode: str = "l2"
    initial_accumulator_value: float = 0.0
    stochastic_rounding: bool = False

    _NAME: ClassVar[str] = "adagrad"
    _STATE: ClassVar[tuple[tuple[str, ...], tuple[str, ...]]] = ((), ("state_sum",))


@dataclass(frozen=True, kw_only=True)
class Adam(RowOptimizer):
    """Adam whose rows count their own steps: bias correction is that of how often the row was touched.

    Args:
        lr: learning rate, >= 0. Default 1e-3.
        betas: of the first and second moment, each in [0, 1). Default (0.9, 0.999).
        eps: >= 0. Default 1e-8 (Monolith: 0.01, with betas (0.9, 0.99)).
        eps_mode: "torch" adds eps after bias correction, as torch.optim.Adam; "tensorflow" to sqrt(exp_avg_sq) before
            it, as Monolith and torch.optim.SparseAdam.
        weight_decay, weight_decay_mode, stochastic_rounding: as in ``RowwiseAdagrad``; "decoupled" is AdamW.
        nesterov: the first moment looks one step ahead, (1 - beta1) g + beta1 exp_avg, as in Monolith (no schedule of
            beta1 as torch.optim.NAdam has).
        rowwise: one second moment per row, of mean_j g_j^2.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    eps_mode: str = "torch"
    weight_decay: float = 0.0
    weight_decay_mode: str = "l2"
    nesterov: bool = False
    rowwise: bool = False
    stochastic_rounding: bool = False

    _NAME: ClassVar[str] = "adam"
    _STATE: ClassVar[tuple[tuple[str, ...], tuple[str, ...]]] = (
        ("step",),
        ("exp_avg", "exp_avg_sq"),
    )

    def _state(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return (("step", "exp_avg_sq"), ("exp_avg",)) if self.rowwise else self._STATE


@dataclass(frozen=True, kw_only=True)
class FTRL(RowOptimizer):
    """Follow the regularised leader, proximal, per coordinate: the weight is a function of the state z and n.

    Args:
        lr: alpha of the paper, > 0. Default 0.05.
        beta: >= 0. Default 1 (Monolith: 0).
        l1: weights are exactly 0 while abs(z) <= l1. >= 0. Default 0.
        l2: >= 0. Default 1, as River has it.
        group: l1 bounds the norm of z over the row: whole rows are 0. Default False.
        initial_accumulator_value: what n starts with, >= 0. Default 0 (Monolith: 0.1).
        stochastic_rounding: as in ``RowwiseAdagrad``.
    """

    lr: float = 0.05
    beta: float = 1.0
    l1: float = 0.0
    l2: float = 1.0
    group: bool = False
    initial_accumulator_value: float = 0.0
    stochastic_rounding: bool = False

    _NAME: ClassVar[str] = "ftrl"
    _STATE: ClassVar[tuple[tuple[str, ...], tuple[str, ...]]] = ((), ("z", "n"))
    _LR_ABOVE_0: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class GroupAdagrad(RowOptimizer):
    """Adagrad with one number of state per row, of max_j g_j^2, and a penalty on the norm that makes whole rows 0.

    Args:
        lr: learning rate, > 0. Default 0.01.
        beta: added to sqrt(state_sum), >= 0. Default 0.
        l2: strength of the penalty on the norm of the row, >= 0. Default 0.
        weight_decay: adds weight_decay w to the gradient, >= 0. Default 0.
        initial_accumulator_value: what state_sum starts with, >= 0. Default 0.1.
        stochastic_rounding: as in ``RowwiseAdagrad``.
    """

    lr: float = 0.01
    beta: float = 0.0
    l2: float = 0.0
    weight_decay: float = 0.0
    initial_accumulator_value: float = 0.1
    stochastic_rounding: bool = False

    _NAME: ClassVar[str] = "group_adagrad"
    _STATE: ClassVar[tuple[tuple[str, ...], tuple[str, ...]]] = (("state_sum",), ())
    _LR_ABOVE_0: ClassVar[bool] = True
