"""Which implementation runs: the one vocabulary of ``impl`` and the refusal that lists every reason."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Literal

from . import environment

Impl = Literal["auto", "reference", "cpu", "cuda", "triton"]
IMPLS = ("auto", "reference", "cpu", "cuda", "triton")

_ran: dict[str, str] = {}
"""The implementation that ran last, by op: what tests look at to see that the forced one really ran."""


def last_impl(op: str) -> str | None:
    """Return the implementation that ran last for ``op``, or None."""
    return _ran.get(op)


def note(op: str, impl: str) -> None:
    """Remember what runs, but not while Dynamo traces: inside ``torch.utils.checkpoint`` it refuses a write to a
    dict of the module."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.compiler.is_compiling():
        _ran[op] = impl


def choose(
    op: str,
    impl: str,
    candidates: dict[str, Callable[[], str | None]],
    inputs: Callable[[], str],
) -> str:
    """Pick an implementation.

    Args:
        op: public name, for the error text.
        impl: what the caller asked for; ``HOTLOOP_IMPL`` overrides ``"auto"``.
        candidates: implementations in order of preference, each with a function that returns None if it
            can run these inputs, or the reason why not.
        inputs: describes the inputs, for the error text.

    Raises:
        ValueError: unknown ``impl``.
        NotImplementedError: the forced implementation, or every one, refuses.
    """
    if impl not in IMPLS:
        raise ValueError(
            f"[{op}] impl: expected one of {', '.join(IMPLS)}, got {impl!r}. Leave it at 'auto'."
        )
    forced = impl if impl != "auto" else environment.forced_impl()
    if forced is not None and forced not in IMPLS[1:]:
        raise ValueError(
            f"[{op}] HOTLOOP_IMPL: expected one of {', '.join(IMPLS[1:])}, got {forced!r}. Unset it."
        )
    if forced is None:
        for name, refuses in candidates.items():
            if refuses() is None:
                note(op, name)
                return name
    elif forced in candidates and candidates[forced]() is None:
        note(op, forced)
        return forced
    lines = [
        f"[{op}] no implementation fits {inputs()}"
        + (f" with impl={forced!r}" if forced else "")
        + ":"
    ]
    for name in IMPLS[1:]:
        if name not in candidates:
            lines.append(f"    {name:10s} refused: this op has none")
            continue
        reason = candidates[name]()
        state = f"refused: {reason}" if reason else f'available; pass impl="{name}" to use it'
        lines.append(f"    {name:10s} {state}")
    lines.append("    details: python -m hotloop info")
    raise NotImplementedError("\n".join(lines))
