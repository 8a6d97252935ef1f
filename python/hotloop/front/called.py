# SPDX-License-Identifier: Apache-2.0
"""Whether a module may be read instead of called.

An op that computes a norm or an activation itself takes the numbers of a module and not its ``forward``. A subclass
with another formula, a hook or an adapter in its place would then be passed over without a word.
"""

from __future__ import annotations

import torch

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def as_defined(module: torch.nn.Module, *classes: type[torch.nn.Module]) -> bool:
    """Whether a call of ``module`` is the ``forward`` of one of these classes and nothing else."""
    if "forward" in module.__dict__ or any(getattr(module, name) for name in _HOOKS):
        return False
    own = type(module).forward
    return any(own is each.forward for each in classes) and not _watched()


def _watched() -> bool:
    """Whether every module of the process has a hook."""
    if torch.compiler.is_compiling():  # a traced graph has none of them
        return False
    return torch.nn.modules.module._has_any_global_hook()
