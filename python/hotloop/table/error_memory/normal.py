# SPDX-License-Identifier: Apache-2.0
"""Normal numbers that come out the same on every machine."""

from __future__ import annotations

import numpy as np

# Wichura 1988, algorithm AS 241 (PPND16), relative error about 1e-16: numerator and denominator, highest power first,
# for the middle and for the tails down to probabilities of e^-25.
_MIDDLE = (
    (2.5090809287301226727e3, 3.3430575583588128105e4, 6.7265770927008700853e4, 4.5921953931549871457e4,
     1.3731693765509461125e4, 1.9715909503065514427e3, 1.3314166789178437745e2, 3.3871328727963666080e0),
    (5.2264952788528545610e3, 2.8729085735721942674e4, 3.9307895800092710610e4, 2.1213794301586595867e4,
     5.3941960214247511077e3, 6.8718700749205790830e2, 4.2313330701600911252e1, 1.0),
)  # fmt: skip
_TAIL = (
    (7.7454501427834140764e-4, 2.27238449892691845833e-2, 2.41780725177450611770e-1, 1.27045825245236838258e0,
     3.64784832476320460504e0, 5.76949722146069140550e0, 4.63033784615654529590e0, 1.42343711074968357734e0),
    (1.05075007164441684324e-9, 5.47593808499534494600e-4, 1.51986665636164571966e-2, 1.48103976427480074590e-1,
     6.89767334985100004550e-1, 1.67638483018380384940e0, 2.05319162663775882187e0, 1.0),
)  # fmt: skip
_LN2 = 0.6931471805599453


def _polynomial(coefficients: tuple[float, ...], x: np.ndarray) -> np.ndarray:
    total = np.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        total = total * x + c
    return np.asarray(total)


def _log(x: np.ndarray) -> np.ndarray:
    """log by sums and products, whose rounding IEEE 754 fixes; that of a library's log differs between machines.

    x = 2^e m, sqrt(1/2) <= m < sqrt(2), s = (m - 1) / (m + 1): log x = e ln 2 + 2 (s + s^3/3 + ... + s^25/25).
    """
    m, e = np.frexp(x)
    low = m < 0.7071067811865476
    m, e = np.where(low, 2.0 * m, m), np.where(low, e - 1, e)
    s = (m - 1.0) / (m + 1.0)
    series = _polynomial(tuple(1.0 / (2 * n + 1) for n in range(12, -1, -1)), s * s)
    return np.asarray(e * _LN2 + 2.0 * s * series)


def normal_quantile(p: np.ndarray) -> np.ndarray:
    """The inverse of the standard normal distribution function, e^-25 < p < 1 - e^-25."""
    q = p - 0.5
    r = 0.180625 - q * q
    middle = _polynomial(_MIDDLE[0], r) * q / _polynomial(_MIDDLE[1], r)
    t = np.sqrt(-_log(np.minimum(p, 1.0 - p))) - 1.6
    tail = _polynomial(_TAIL[0], t) / _polynomial(_TAIL[1], t)
    return np.asarray(np.where(np.abs(q) <= 0.425, middle, np.where(q < 0, -tail, tail)))
