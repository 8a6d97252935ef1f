# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs: the one vocabulary of ``impl`` and the refusal that lists every reason."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, Literal

from . import arrays, environment, native

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


Refuses = Callable[[Any], str | None]
"""Why an implementation cannot run for the array that decides, or None if it can."""


def everywhere(like: Any) -> str | None:
    return None


def on_cpu(like: Any) -> str | None:
    place = arrays.device(like)
    return None if place == "cpu" else f"device {place}"


def on_cuda(like: Any) -> str | None:
    place = arrays.device(like)
    if not place.startswith("cuda"):
        return f"device {place}"
    return None if native.cuda is not None else "hotloop._cuda is not compiled in"


# Looked up once, at import: Dynamo does not trace find_spec.
_TRITON = importlib.util.find_spec("triton") is not None


def on_triton(like: Any) -> str | None:
    if not _TRITON:
        return "triton is not installed"
    if like.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"device {like.device.type}"
    if arrays.dtype(like) == "float64":
        return "dtype float64 (supports float32, float16, bfloat16)"
    return None


ON_CPU: Mapping[str, Refuses] = {"cpu": on_cpu, "reference": on_cpu}
"""Of an op whose reference is NumPy."""


def choose(
    op: str,
    impl: str,
    name: str,
    like: Any,
    candidates: Mapping[str, Refuses] = ON_CPU,
    **facts: object,
) -> str:
    """Pick an implementation, and log it.

    Args:
        op: public name, for the error text.
        impl: what the caller asked for; ``HOTLOOP_IMPL`` overrides ``"auto"``.
        name: of the argument that decides, for the error text.
        like: that argument.
        candidates: implementations in order of preference, each with what may refuse to run for ``like``.
        facts: what the log names beside the argument.

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
    for chosen in candidates if forced is None else (forced,):
        if chosen in candidates and candidates[chosen](like) is None:
            note(op, chosen)
            if environment.logs() and not arrays.compiling():
                environment.log_call(op, impl=chosen, **{name: tuple(like.shape)}, **facts)
            return chosen
    lines = [
        f"[{op}] no implementation fits {name} {tuple(like.shape)} {arrays.dtype(like)} on {arrays.device(like)}"
        + (f" with impl={forced!r}" if forced else "")
        + ":"
    ]
    for each in IMPLS[1:]:
        reason = candidates[each](like) if each in candidates else "this op has none"
        state = f"refused: {reason}" if reason else f'available; pass impl="{each}" to use it'
        lines.append(f"    {each:10s} {state}")
    lines.append("    details: python -m hotloop info")
    raise NotImplementedError("\n".join(lines))
