"""What rule moves a row of a table: frozen settings, shared by the tables and by ``sparse_dedup_optimize``.

``state_layout(dim)`` names the float32 numbers a rule keeps per row, in the order of memory; ``init_state`` makes them.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np

from ..front import arrays
from ..front.check import choice, integer, number

WEIGHT_DECAY_MODES = ("l2", "decoupled")
EPS_MODES = ("torch", "tensorflow")


def _flag(op: str, name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"[{op}] {name}: expected True or False, got {type(value).__name__}.")
    return bool(value)


class RowOptimizer:
    """What the rules have in common. Not an optimizer by itself: use one of its subclasses."""

    stochastic_rounding: bool
    _NAME: ClassVar[str] = ""

    def __post_init__(self) -> None:
        self._check(type(self).__name__)

    def _check(self, op: str) -> None:
        raise NotImplementedError

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _at_least_0(self, op: str, *names: str) -> None:
        for name in names:
            self._set(name, number(op, name, getattr(self, name), at_least=0, below=math.inf))

    def _check_common(self, op: str) -> None:
        if hasattr(self, "weight_decay_mode"):
            choice(op, "weight_decay_mode", self.weight_decay_mode, WEIGHT_DECAY_MODES)
        self._set(
            "stochastic_rounding",
            _flag(op, "stochastic_rounding", self.stochastic_rounding),
        )

    def state_layout(self, dim: int) -> dict[str, int]:
        """Name and width of what is kept per row, scalars first, in float32."""
        raise NotImplementedError

    def init_state(self, rows: int, dim: int, *, like: Any = None) -> dict[str, Any]:
        """The state of rows that saw no gradient yet: name -> (rows,) or (rows, dim) array.

        Args:
            rows, dim: rows, and width of one.
            like: array whose library and device the state gets (float64 for a float64 one); None: NumPy.
        """
        op = f"{type(self).__name__}.init_state"
        rows = integer(op, "rows", rows, at_least=0)
        dim = integer(op, "dim", dim, at_least=0)
        made = {}
        for name, width in self.state_layout(dim).items():
            shape = (rows,) if name in self._scalars() else (rows, width)
            start = (
                getattr(self, "initial_accumulator_value", 0.0)
                if name in ("state_sum", "n")
                else 0.0
            )
            wide = like is not None and arrays.dtype(like) == "float64"
            value = np.full(shape, start, np.float64 if wide else np.float32)
            made[name] = value if like is None else arrays.from_numpy(value, like)
        return made

    def _scalars(self) -> tuple[str, ...]:
        return ()

    def _rule(self) -> dict[str, Any]:
        """What the compiled loops take."""
        found: dict[str, Any] = {"rule": self._NAME}
        for name in (
            "lr",
            "eps",
            "weight_decay",
            "initial_accumulator_value",
            "beta",
            "l1",
            "l2",
            "nesterov",
            "rowwise",
            "group",
            "stochastic_rounding",
        ):
            if hasattr(self, name):
                found[name] = getattr(self, name)
        if hasattr(self, "betas"):
            found["beta1"], found["beta2"] = self.betas
        if hasattr(self, "weight_decay_mode"):
            found["decoupled"] = self.weight_decay_mode == "decoupled"
        if hasattr(self, "eps_mode"):
            found["uncorrected_eps"] = self.eps_mode == "tensorflow"
        return found


_R = TypeVar("_R", bound=RowOptimizer)


def settings(op: str, cls: type[_R], **given: Any) -> _R:
    """A rule checked in the name of ``op``."""
    rule = object.__new__(cls)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        object.__setattr__(rule, field.name, given.get(field.name, field.default))
    rule._check(op)
    return rule


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

    def _check(self, op: str) -> None:
        self._at_least_0(op, "lr", "weight_decay")
        self._check_common(op)

    def state_layout(self, dim: int) -> dict[str, int]:
        return {}


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

    def _check(self, op: str) -> None:
        self._at_least_0(op, "lr", "eps", "weight_decay", "initial_accumulator_value")
        self._check_common(op)

    def state_layout(self, dim: int) -> dict[str, int]:
        return {"state_sum": 1}

    def _scalars(self) -> tuple[str, ...]:
        return ("state_sum",)


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

    def _check(self, op: str) -> None:
        self._at_least_0(op, "lr", "eps", "weight_decay", "initial_accumulator_value")
        self._check_common(op)

    def state_layout(self, dim: int) -> dict[str, int]:
        return {"state_sum": dim}


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

    def _check(self, op: str) -> None:
        self._at_least_0(op, "lr", "eps", "weight_decay")
        if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2:
            raise ValueError(f"[{op}] betas: expected two numbers, got {self.betas!r}.")
        betas = tuple(
            number(op, f"betas[{k}]", b, at_least=0, below=1) for k, b in enumerate(self.betas)
        )
        self._set("betas", betas)
        choice(op, "eps_mode", self.eps_mode, EPS_MODES)
        self._set("nesterov", _flag(op, "nesterov", self.nesterov))
        self._set("rowwise", _flag(op, "rowwise", self.rowwise))
        self._check_common(op)

    def state_layout(self, dim: int) -> dict[str, int]:
        if self.rowwise:
            return {"step": 1, "exp_avg_sq": 1, "exp_avg": dim}
        return {"step": 1, "exp_avg": dim, "exp_avg_sq": dim}

    def _scalars(self) -> tuple[str, ...]:
        return ("step", "exp_avg_sq") if self.rowwise else ("step",)


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

    def _check(self, op: str) -> None:
        self._set("lr", number(op, "lr", self.lr, above=0, below=math.inf))
        self._at_least_0(op, "beta", "l1", "l2", "initial_accumulator_value")
        self._set("group", _flag(op, "group", self.group))
        self._check_common(op)

    def state_layout(self, dim: int) -> dict[str, int]:
        return {"z": dim, "n": dim}


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

    def _check(self, op: str) -> None:
        self._set("lr", number(op, "lr", self.lr, above=0, below=math.inf))
        self._at_least_0(op, "beta", "l2", "weight_decay", "initial_accumulator_value")
        self._check_common(op)

    def state_layout(self, dim: int) -> dict[str, int]:
        return {"state_sum": 1}

    def _scalars(self) -> tuple[str, ...]:
        return ("state_sum",)
