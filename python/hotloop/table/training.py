# SPDX-License-Identifier: Apache-2.0
"""Hash modules among dense parameters: schedulers, and loss scaling and clipping with ``update="step"``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..front import check
from . import _kept, _lookups
from ._lookups import Held
from .modules import HashEmbedding, HashEmbeddingBag


def _held(source: nn.Module) -> list[Held]:
    """The hash modules in a model that learn."""
    return [
        m._held
        for m in source.modules()
        if isinstance(m, (HashEmbedding, HashEmbeddingBag))
        and m.table.optimizer is not None
        and m._held.anchor.requires_grad
    ]


class TableOptimizer(torch.optim.Optimizer):
    """A ``torch.optim.Optimizer`` over the hash modules of a model, for learning-rate schedulers and ``GradScaler``.

    Every module with an optimizer is a parameter group of its settings (``lr``, ``weight_decay``, ``betas``), which
    rule its next moves: those in backward as well as those of ``step``. ``step`` applies what modules with
    ``update="step"`` keep; rows of the others have moved in backward. Optimizer state lies in the table with its rows:
    it travels with the model's ``state_dict``, the groups with this one's.

    Under ``torch.amp.GradScaler`` all modules need ``update="step"``: gradients are unscaled between backward and step.

    Args:
        modules: a model, a hash module, or several.
        summed: sum all gradients kept since the last step, those of several modules over one table too, so that every
            row moves once, as torch's optimizers do. False moves rows lookup by lookup. Default True.

    Raises:
        TypeError: not modules.
        ValueError: none of them is a hash module with an optimizer that is not frozen.

    Examples:
        >>> import torch
        >>> from hotloop.table import SGD, HashEmbedding
        >>> layer = HashEmbedding(4, optimizer=SGD(lr=0.1))
        >>> rows = TableOptimizer(layer)
        >>> schedule = torch.optim.lr_scheduler.ExponentialLR(rows, 0.5)
        >>> layer(torch.tensor([7])).sum().backward()  # moved by lr = 0.1
        >>> rows.step()
        >>> schedule.step()
        >>> rows.param_groups[0]["lr"]
        0.05
    """

    def __init__(self, modules: nn.Module | Iterable[nn.Module], *, summed: bool = True) -> None:
        op = "TableOptimizer"
        given = [modules] if isinstance(modules, nn.Module) else list(modules)
        for module in given:
            hint = "Pass the model, not its parameters()."
            check.instance(op, "modules", module, nn.Module, hint=hint)
        self._held = list(dict.fromkeys(held for module in given for held in _held(module)))
        if not self._held:
            raise ValueError(
                f"[{op}] modules: expected a HashEmbedding or HashEmbeddingBag with an optimizer, got none. "
                "Pass optimizer=... to the module; parameters go to an optimizer of torch."
            )
        self._summed = summed
        groups = [_settings(held) for held in self._held]
        # Schedulers of momentum ask the defaults whether there are betas.
        common = set.intersection(*(set(group) for group in groups)) - {"params", "rule"}
        super().__init__(groups, {name: groups[0][name] for name in groups[0] if name in common})
        self._attach()

    def _attach(self) -> None:
        for held, group in zip(self._held, self.param_groups):
            held.group = group

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """The groups are those of the modules: no others are taken.

        Raises:
            NotImplementedError: at any call from outside.
        """
        if len(self.param_groups) == len(self._held):
            raise NotImplementedError(
                "[TableOptimizer.add_param_group] param_group: expected no parameters, got a group of them. Give "
                "parameters to an optimizer of torch, and make a TableOptimizer of all modules, new ones too."
            )
        super().add_param_group(param_group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Apply the gradients that modules with ``update="step"`` keep.

        Raises:
            ValueError: a gradient is NaN or infinite, or modules over one table have groups of other settings where
                gradients are summed. Nothing was written, and all stay kept.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        kept = [held for held in self._held if not held.fused]
        _lookups.step("TableOptimizer.step", kept, None, self._summed)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients that modules keep."""
        for held in self._held:
            held.drop()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over learning rates and other settings.

        Raises:
            ValueError: the state is that of other rules. Nothing is changed.
        """
        rules = [group.get("rule") for group in state_dict["param_groups"]]
        mine = [group["rule"] for group in self.param_groups]
        if rules != mine:
            raise ValueError(
                f"[TableOptimizer.load_state_dict] rule: expected {mine}, got {rules}. "
                "Make modules with the optimizers of those saved."
            )
        super().load_state_dict(state_dict)
        self._attach()

    def clip_grad_norm_(
        self,
        parameters: nn.Module | Iterable[Tensor],
        max_norm: float,
        norm_type: float = 2.0,
        *,
        error_if_nonfinite: bool = False,
    ) -> Tensor:
        """Scale gradients of parameters and what the modules keep, so that their common norm is at most max_norm.

        ``torch.nn.utils.clip_grad_norm_`` with the rows in it: norm = (sum over all elements of |g|^p)^(1/p), all
        gradients times min(1, max_norm / (norm + 1e-6)). The gradient of a table is that of a dense one, summed per row
        over all that the modules over it keep.

        Args:
            parameters: a model, or parameters.
            max_norm: >= 0.
            norm_type: p, > 0; may be infinite. Default 2.
            error_if_nonfinite: raise where the norm is NaN or infinite. Default False, as in torch.

        Returns:
            The norm before, () float32.
        Raises:
            ValueError: a module moves its rows in backward, so that there is nothing left to clip, or is none of this
                optimizer's; a number out of range; the norm is not finite and ``error_if_nonfinite`` is set. Nothing is
                changed.
            TypeError: ``parameters`` are something else.
        """
        op = "TableOptimizer.clip_grad_norm_"
        max_norm = check.number(op, "max_norm", max_norm, at_least=0)
        norm_type = check.number(op, "norm_type", norm_type, above=0, at_most=math.inf)
        if isinstance(parameters, nn.Module):
            strange = [held for held in _held(parameters) if held not in self._held]
            if strange:
                raise ValueError(
                    f"[{op}] parameters: expected a model whose hash modules are this optimizer's, got "
                    f"{len(strange)} that are not. Make the TableOptimizer of the same model."
                )
        given = parameters.parameters() if isinstance(parameters, nn.Module) else parameters
        params = dict.fromkeys([given] if isinstance(given, Tensor) else given)
        for p in params:
            check.instance(op, "parameters", p, Tensor)
        if any(held.fused for held in self._held):
            raise ValueError(
                f'[{op}] update: expected "step", got a module with "backward", whose rows have moved. '
                'Make the modules with update="step".'
            )
        grads = [p.grad for p in params if p.grad is not None]
        kept = _lookups.by_table([held for held in self._held if held.pending])
        parts = [*grads, *(_kept.summed(same).grads for same in kept)]
        if not parts:
            return torch.zeros((), dtype=torch.float32, device="cpu")
        at = parts[0].device
        norms = [torch.linalg.vector_norm(x.detach(), norm_type).to(at).float() for x in parts]
        total: Tensor = torch.linalg.vector_norm(torch.stack(norms), norm_type)
        if error_if_nonfinite and not torch.isfinite(total):
            raise ValueError(
                f"[{op}] parameters: expected a finite norm, got {float(total)}. Skip this batch: call zero_grad."
            )
        factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
        for grad in grads:
            grad.detach().mul_(factor.to(grad.device, grad.dtype))
        for held in self._held:
            held.scale(factor)
        return total

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What ``GradScaler.step`` asks first."""
        if any(held.fused for held in self._held):
            raise ValueError(
                '[TableOptimizer] update: expected "step" under a GradScaler, got "backward": rows have moved by '
                'gradients that were still scaled. Make the modules with update="step".'
            )
        return False


def _settings(held: Held) -> dict[str, Any]:
    rule: Any = held.table.optimizer
    fields = {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule)}
    return {"params": [held.anchor], "rule": type(rule).__name__, **fields}
