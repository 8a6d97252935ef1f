"""Checks of plain numbers and choices, and the one form of their errors: ``[op] argument: expected ..., got ....``"""

from __future__ import annotations

import math
from typing import Any

LARGEST = 3.4028234663852886e38
"""The largest float32: more is an infinity inside the loops. ``at_most=math.inf`` lets infinity itself pass."""


def choice(op: str, name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"[{op}] {name}: expected one of {', '.join(allowed)}, got {value!r}.")


def number(
    op: str,
    name: str,
    value: Any,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    hint: str = "",
) -> float:
    """Return ``value`` as a finite float inside the stated range, or raise with the range in the text."""
    # Numbers first: torch.compile traces a default as a symbol, which has no attributes to ask for.
    if not isinstance(value, (int, float)) and (
        hasattr(value, "dtype")
        and getattr(value, "shape", None) == ()
        and hasattr(value, "tobytes")
    ):
        value = value.item()  # a NumPy scalar
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        x = float(value)
        if (
            (-LARGEST <= x <= LARGEST or (at_most == math.inf and x == math.inf))  # NaN neither
            and (above is None or x > above)
            and (at_least is None or x >= at_least)
            and (below is None or x < below)
            and (at_most is None or x <= at_most)
        ):
            return x
    bounds = [
        f"> {above:g}" if above is not None else "",
        f">= {at_least:g}" if at_least is not None else "",
        f"< {below:g}" if below not in (None, math.inf) else "",
        f"<= {at_most:g}" if at_most not in (None, math.inf) else "",
    ]
    kind = "a number"
    if isinstance(value, (int, float)) and abs(value) > LARGEST:
        kind = "a finite number"
    wanted = f"{kind} " + " and ".join(b for b in bounds if b) if any(bounds) else kind
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"[{op}] {name}: expected {wanted}, got {type(value).__name__}. Pass a float."
        )
    raise ValueError(
        f"[{op}] {name}: expected {wanted}, got {value!r}.{' ' + hint if hint else ''}"
    )


def integer(
    op: str, name: str, value: Any, *, at_least: int | None = None, at_most: int | None = None
) -> int:
    """Return ``value`` as an int inside the stated range, or raise with the range in the text."""
    x: int | None
    if isinstance(
        value, int
    ):  # first: torch.compile traces an argument as a symbol without __index__
        x = value
    else:
        try:
            x = int(value.__index__())
        except AttributeError:
            x = None
    if x is None or isinstance(value, bool):
        raise TypeError(f"[{op}] {name}: expected an integer, got {type(value).__name__}.")
    if (at_least is not None and x < at_least) or (at_most is not None and x > at_most):
        low = f">= {at_least}" if at_least is not None else ""
        high = f"<= {at_most}" if at_most is not None else ""
        wanted = " and ".join(b for b in (low, high) if b)
        raise ValueError(f"[{op}] {name}: expected an integer {wanted}, got {x}.")
    return x
