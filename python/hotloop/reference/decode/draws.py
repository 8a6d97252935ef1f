# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of a draw in NumPy: weights on a grid, sums of whole numbers, Philox. See csrc/decode/heads.hpp.

Everything here is what the compiled loops do, step by step and with the same rounding, so that the same seed gives the
same tokens. The probabilities themselves are checked against plain float64 softmax in the tests.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from ...front import arrays
from .. import core
from .law import MOST_PROBABILITY, Law, Logits, NoProbability

WEIGHT_UNIT = 2.0**-42
RESIDUAL_UNIT = 2.0**-51
SAMPLING, VERIFICATION = 0, 1
_F = np.float32
BELOW = 2**63 - 1
"""Seeds that are drawn lie below this."""


def exp_weight(x: np.ndarray) -> np.ndarray:
    """e^x for x <= 0, to the nearest multiple of 2^-42; 0 below -30 and for NaN."""
    x = x.astype(_F)
    usable = x >= _F(-30)
    x = np.where(usable, x, _F(-30))
    shift = _F(12582912.0)
    shifted = x * _F(1.44269504) + shift
    k = shifted.view(np.int32) - shift.view(np.int32)
    kf = shifted - shift
    r = (x - kf * _F(0.693359375)) - kf * _F(-2.12194440e-4)
    p = _F(1.38144663e-3)
    for c in (8.36878047e-3, 4.16683942e-2, 1.66665201e-1, 4.99999934e-1):
        p = p * r + _F(c)
    y = r + r * r * p
    e = np.where(usable, np.ldexp(_F(1) + y, k), _F(0))
    weight: np.ndarray = np.rint(e.astype(np.float64) / WEIGHT_UNIT) * WEIGHT_UNIT
    return weight


def scale_of(temperature: float, largest: Any) -> Any:
    """1 / temperature in the type of ``largest``, or less where its product with the largest logit would overflow."""
    real = type(largest)
    most, least = np.finfo(real).max, np.finfo(real).smallest_subnormal
    scale = np.maximum(real(min(1.0 / temperature, float(most))), least)
    return scale if abs(largest) * scale <= most else most / real(2) / abs(largest)


def number(value: Any, b: int) -> Any:
    """A per-request parameter of request b."""
    scalar = isinstance(value, (int, float, np.number))
    return value if scalar else arrays.to_numpy(value)[b].item()


class Row:
    """One row's law: ``weight`` are multiples of 2^-42, ``p`` probabilities; not ``valid`` where there is no law."""

    def __init__(self, law: Law, b: int, index: tuple[int, ...]) -> None:
        with np.errstate(all="ignore"):
            self._make(law, b, index)

    def _make(self, law: Law, b: int, index: tuple[int, ...]) -> None:
        x = arrays.to_numpy(law.values)[index]
        real = x.dtype.type
        greedy = False
        if isinstance(law, Logits):
            if law.reference is not None:
                m = real(law.mixture)
                x = (real(1.0 - law.mixture)) * x + m * arrays.to_numpy(law.reference)[index]
            if law.bias_ids is not None:
                x = x.copy()
                ids, bias = (arrays.to_numpy(part)[b] for part in (law.bias_ids, law.bias))
                for at in np.argsort(ids, kind="stable"):
                    if 0 <= ids[at] < x.size:
                        x[ids[at]] = x[ids[at]] + real(bias[at])
            temperature = number(law.temperature, b)
            greedy = not temperature > 0
            x = np.where(np.isnan(x), real(-np.inf), x)
            self.valid = bool(np.isfinite(x.max()))
            scale = real(1.0) if greedy or not self.valid else scale_of(temperature, x.max())
            z = x * scale
            largest = z.max()
            weight = exp_weight(z - largest) if self.valid else np.zeros(z.size)
            self.log_shift = z.astype(np.float64) - float(largest) if self.valid else z
            top = 1.0
        else:
            bad = ~((x >= 0) & (x <= MOST_PROBABILITY))
            if bad.any():
                raise NoProbability(
                    f"[reference] values: expected probabilities from 0 to 1, got {x[bad][0]}. "
                    "Wrap logits in Logits(...)."
                )
            z = np.where(x < 1, x, real(1))
            weight = np.rint(z.astype(np.float64) / WEIGHT_UNIT) * WEIGHT_UNIT
            largest = z.max()
            top = float(weight.max())
            self.valid = True
            self.log_shift = None
        self.entropy = self._entropy(weight) if self.valid else float("nan")
        keep = np.ones(z.size, bool)
        if greedy and self.valid:
            keep[:] = False
            keep[int(np.argmax(z))] = True
            weight = np.where(keep, 1.0, 0.0)
            self.log_shift = np.where(keep, 0.0, -np.inf)
        truncated = greedy
        k, top_p, min_p = (int(number(law.top_k, b)), number(law.top_p, b), number(law.min_p, b))
        if not greedy and self.valid:
            if 0 < k < z.size:
                truncated = True
                keep &= z >= np.sort(z)[-k]
            within = keep if law.filter_order == "top_k_first" else np.ones(z.size, bool)
            if top_p < 1:
                truncated = True
                order = np.argsort(-z[within], kind="stable")
                units = (weight[within][order] / WEIGHT_UNIT).astype(np.uint64).cumsum()
                at = int(np.argmax(units.astype(np.float64) >= top_p * float(units[-1])))
                keep &= z >= z[within][order][at]
            if min_p > 0:
                truncated = True
                keep &= weight >= min_p * top
        self.weight = np.where(keep, weight, 0.0)
        self.units = (self.weight / WEIGHT_UNIT).astype(np.uint64)
        self.mass = int(self.units.sum())
        self.as_given = not isinstance(law, Logits) and not truncated
        inverse = 1.0 / (float(self.mass) * WEIGHT_UNIT) if self.mass else 0.0
        self.p = z.astype(np.float64) if self.as_given else self.weight * inverse
        # Whole probabilities are looked up and not read: that a row holds none shows when a token is to be drawn.
        self.valid = self.valid and (self.as_given or self.mass > 0)
        self.best = int(np.argmax(z))
        self.order = z  # what ranks the tokens

    def _entropy(self, weight: np.ndarray) -> float:
        mass = weight.sum()
        if self.log_shift is None:
            p = weight[weight > 0]
            return float(-(p * np.log(p)).sum())
        used = weight > 0
        return float(np.log(mass) - (weight[used] * self.log_shift[used]).sum() / mass)

    def probability(self, token: int) -> float:
        return float(self.p[token]) if 0 <= token < self.p.size else 0.0

    def logp(self, token: int) -> float:
        """Log-probability under the law, before its weight was rounded to the grid."""
        if self.probability(token) == 0.0:
            return float("-inf")
        if self.log_shift is None:
            return float(np.log(self.p[token]))
        return float(self.log_shift[token] - np.log(float(self.mass) * WEIGHT_UNIT))

    def pick(self, u: float) -> int:
        return pick(self.units, self.mass, u)


def residual(a: float, p: np.ndarray, b: float, q: np.ndarray | float) -> np.ndarray:
    """max(a p - b q, 0) in units of 2^-51."""
    left = a * p - b * q
    return np.rint(np.maximum(left, 0.0) / RESIDUAL_UNIT).astype(np.uint64)


def pick(units: np.ndarray, mass: int, u: float) -> int:
    """The first token at which the running sum of units reaches ceil(u * mass)."""
    if mass <= 0:
        return -1
    wanted = min(max(int(np.ceil(u * float(mass))), 1), mass)
    return int(np.searchsorted(units.cumsum(dtype=np.uint64), np.uint64(wanted)))


def draw(seed: int, request: int, position: int, attempt: int, domain: int) -> tuple[float, float]:
    """(accept, pick): two uniforms in (0, 1] of 53 bits."""
    item = (request & 0xFFFFFFFF) | ((attempt & 0xFFFFFF) << 32) | (domain << 56)
    words = core.philox(seed, 1, offset=position & (2**64 - 1), first_item=item)[0].astype(object)
    a, b = ((int(words[i]) << 32 | int(words[i + 1])) for i in (0, 2))
    return ((a >> 11) + 1) * 2.0**-53, ((b >> 11) + 1) * 2.0**-53


class Stream:
    """The draws of one request: an array of seeds names requests, one seed for all counts them."""

    def __init__(self, seed: Any, offset: Any, b: int) -> None:
        self.seed = int(number(seed, b)) & (2**64 - 1)
        self.request = b if isinstance(seed, (int, np.integer)) else 0
        self.offset = int(number(offset, b))

    def draw(self, position: int, domain: int, attempt: int = 0) -> tuple[float, float]:
        return draw(self.seed, self.request, self.offset + position, attempt, domain)


def is_generator(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return isinstance(value, (np.random.Generator, np.random.RandomState)) or (
        torch is not None and isinstance(value, torch.Generator)
    )


def drawn(seed: Any, batch: int, like: Any) -> Any:
    """The seed as given, or, for None and generators, a new one: a number for NumPy, (B,) on the device otherwise.

    torch tensors take theirs from torch's generator of their device, without a synchronisation, so that
    CUDA graphs and torch.compile draw anew at every replay.
    """
    if type(seed) is int or (seed is not None and not is_generator(seed)):
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
