"""Where the draws of a call come from: a seed, one seed for each request, or a generator that gives a new one."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from ..front import arrays, check
from ..front.check import integer

BELOW = 2**63 - 1


def check_stream(op: str, seed: Any, offset: Any, batch: int, like: Any) -> None:
    """Seeds and offsets: an int for all requests, or int64 arrays (B,); a seed may also be None or a generator."""
    # Plain numbers first: small calls pass them, and count microseconds.
    if type(seed) is int and 0 <= seed < 2**64:
        pass
    elif _is_generator(seed):
        _check_generator(op, seed, like)
    elif seed is not None:
        _check(op, "seed", seed, 2**64 - 1, batch, like)
    if not (type(offset) is int and 0 <= offset < 2**63):
        _check(op, "offset", offset, 2**63 - 1, batch, like)


def _check(op: str, name: str, value: Any, most: int, batch: int, like: Any) -> None:
    if isinstance(value, (int, np.integer)):
        integer(op, name, value, at_least=0, at_most=most)
        return
    check.array(op, name, value, ("int64",), 1)
    check.same_place(op, name, value, "the other arrays", like)
    if tuple(value.shape) != (batch,):
        raise ValueError(
            f"[{op}] {name}: expected an integer or shape ({batch},), got shape {tuple(value.shape)}."
        )


def _is_generator(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return isinstance(value, (np.random.Generator, np.random.RandomState)) or (
        torch is not None and isinstance(value, torch.Generator)
    )


def _check_generator(op: str, generator: Any, like: Any) -> None:
    got = f"{type(generator).__module__}.{type(generator).__name__}"
    if isinstance(like, np.ndarray):
        if not isinstance(generator, (np.random.Generator, np.random.RandomState)):
            raise TypeError(
                f"[{op}] seed: expected a numpy.random.Generator for NumPy arrays, got {got}. "
                "Use numpy.random.default_rng(...)."
            )
        return
    if arrays.kind(like) == "cupy":
        raise TypeError(
            f"[{op}] seed: expected an integer, an int64 array or None for CuPy arrays, got {got}. "
            "Leave it out and call cupy.random.seed(...)."
        )
    if not hasattr(generator, "device"):
        raise TypeError(
            f"[{op}] seed: expected a torch.Generator for torch tensors, got {got}. "
            "Use torch.Generator(device=...)."
        )
    if generator.device.type != like.device.type:
        raise ValueError(
            f"[{op}] seed: expected a generator on {like.device} like the other arrays, got one on "
            f"{generator.device}. Use torch.Generator(device={str(like.device)!r})."
        )


def drawn(seed: Any, batch: int, like: Any) -> Any:
    """The seed as given, or, for None and generators, a new one: a number for NumPy, (B,) on the device otherwise.

    torch tensors take theirs from torch's generator of their device, without a synchronisation, so that
    CUDA graphs and torch.compile draw anew at every replay.
    """
    if type(seed) is int or (seed is not None and not _is_generator(seed)):
        return seed
    if isinstance(like, np.ndarray):
        if isinstance(seed, np.random.Generator):
            return int(seed.integers(0, BELOW, dtype=np.int64))
        source = np.random if seed is None else seed
        return int(source.randint(0, BELOW, dtype=np.int64))
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(like, torch.Tensor):
        return torch.randint(BELOW, (batch,), generator=seed, device=like.device)
    return sys.modules["cupy"].random.get_random_state().tomaxint((batch,))
