# SPDX-License-Identifier: Apache-2.0
"""ReLoop2's error memory in constant space: counts and sums by the buckets of a locality-sensitive hash."""

from __future__ import annotations

from typing import Any

import numpy as np

from ... import core
from ...front import arrays, check, native
from ...front.arrays import Array
from ...front.check import choice, integer
from ...front.impl import Impl, choose
from ...reference.table import error_memory
from ...reference.table import error_sketch as _reference
from ...reference.table.results import SketchCompensated as SketchCompensated
from .. import _words
from . import checks
from .normal import normal_quantile

SIMILARITIES = ("count", "const")
MAX_BITS = 24
UNIT = 2.0**-32
"""What labels and predictions are counted in."""


@_words.documented
def lsh_projections(dim: int, *, repeats: int = 180, bits: int = 16, seed: int = 0) -> np.ndarray:
    """Draw the random directions of ``repeats`` hashes of ``bits`` bits: independent, standard normal.

    W[r, l, j] = Phi^-1((word + 1/2) / 2^32), word = word j % 4 of Philox 4x32-10 for item (r bits + l) ceil(d / 4) +
    j // 4. Only operations that IEEE 754 rounds alike everywhere are used: the same numbers on every machine.

    Returns:
        (R, L, d) float32, NumPy.

    Examples:
        >>> (lsh_projections(2, repeats=1, bits=2) * 1000).astype(int).tolist()
        [[[-255, 1177], [1914, -352]]]

    Reference:
        Charikar 2002, "Similarity estimation techniques from rounding algorithms", STOC; Wichura 1988, AS 241; as used
        by Zhu et al. 2023, arXiv:2306.08808, section 3.2.2.
    """
    op = "lsh_projections"
    d = integer(op, "dim", dim, at_least=1)
    r = integer(op, "repeats", repeats, at_least=1)
    b = integer(op, "bits", bits, at_least=1, at_most=MAX_BITS)
    seed = integer(op, "seed", seed, at_least=0, at_most=2**64 - 1)
    items = -(-d // 4)
    words = core.philox(seed, r * b * items).reshape(r, b, 4 * items)[..., :d]
    return normal_quantile((words + 0.5) * 2.0**-32).astype(np.float32)


@_words.documented
def lsh_buckets(hidden: Array, projections: Any, *, impl: Impl = "auto") -> Array:
    """Hash hidden vectors: one bucket per repeat, from the signs of projections (SimHash).

    bucket_r(h) = sum_{l < L} 2^l [<W_rl, h> > 0]. Two vectors at an angle a share a bit with probability 1 - a / pi,
    and a bucket with that to the power L. h is rounded to float32; products and sums are rounded one by one, in the
    order of the dimensions, so that a vector falls into the same bucket on every machine. A NaN is not above 0.

    Args:
        hidden: (B, d), float32, float64, float16 or bfloat16.
        projections: W, (R, L, d) float32, from ``lsh_projections``; L from 1 to 24.

    Returns:
        (B, R) int32, 0 to 2^L - 1, of the kind of ``hidden``.

    Examples:
        >>> import numpy as np
        >>> directions = np.array([[[1, 0], [0, 1]]], np.float32)
        >>> lsh_buckets(np.array([[2.0, 3.0], [-1.0, 5.0]]), directions).tolist()
        [[3], [2]]

    Reference:
        Zhu et al. 2023, arXiv:2306.08808, eq. 17; Charikar 2002, STOC.
    """
    op = "lsh_buckets"
    check.array(op, "projections", projections, ("float32",), 3)
    repeats, bits, dim = (int(n) for n in projections.shape)
    if dim < 1 or repeats < 1 or not 1 <= bits <= MAX_BITS:
        raise ValueError(
            f"[{op}] projections: expected shape (R, L, d) with L from 1 to {MAX_BITS}, got "
            f"{tuple(projections.shape)}. Use lsh_projections(...)."
        )
    checks.rows(op, "hidden", hidden, dim, "projections", projections)
    check.finite(op, hidden=hidden)
    if choose(op, impl, "hidden", hidden) == "reference":
        return _reference.lsh_buckets(hidden, projections)
    batch = int(hidden.shape[0])
    buckets = arrays.empty(hidden, (batch, repeats), "int32")
    if batch:
        native.core.table.lsh_buckets(
            arrays.dense(hidden, "float32"), arrays.dense(projections, "float32"), buckets
        )
    return buckets


def _checked_sketch(op: str, sketch: Any, buckets: Any) -> None:
    """Refuse a sketch that is none, and buckets that are not of it."""
    check.array(op, "buckets", buckets, ("int32",), 2)
    check.array(op, "sketch", sketch, ("int64",), 3)
    check.same_place(op, "sketch", sketch, "buckets", buckets)
    repeats = int(buckets.shape[1])
    size = int(sketch.shape[1])
    if tuple(sketch.shape) != (repeats, size, 3) or repeats < 1:
        raise ValueError(
            f"[{op}] sketch: expected shape ({repeats}, 2^L, 3) for the repeats of buckets, got "
            f"{tuple(sketch.shape)}. Start from zeros."
        )
    if not (sketch.is_contiguous() if arrays.is_torch(sketch) else sketch.flags.c_contiguous):
        raise ValueError(
            f"[{op}] sketch: expected a contiguous array, got one with gaps or another order. Pass a copy."
        )
    at = arrays.to_numpy(buckets)
    check.refuse(
        op, "buckets", buckets, (at < 0) | (at >= size), f"0 to {size - 1}", "Use lsh_buckets(...)."
    )


@_words.documented
def lsh_error_sketch_write(
    buckets: Any, labels: Any, base_predictions: Any, sketch: Any, *, impl: Impl = "auto"
) -> None:
    """Add samples to a sketch, in place: for every repeat r, sketch[r, bucket_r] += (1, y, yb).

    y and yb are counted in whole multiples of 2^-32 and everything in int64, so that the order of the samples, the
    number of threads and the way writes are cut do not matter to the last bit, sketches of shards simply add up, and no
    count saturates: a sum is exact up to 2^31 samples in one bucket, where float32 counts stop at 2^24.

    Args:
        buckets: (n, R) int32, from ``lsh_buckets``.
        labels: y, (n,), in [0, 1].
        base_predictions: yb, what the model predicted, (n,), in [0, 1].
        sketch: (R, 2^L, 3) int64, contiguous; zeros at first. Changed.

    Raises:
        ValueError: shapes or devices do not fit, a bucket is not of the sketch, or a number is not in [0, 1]; nothing
            is written then.

    Examples:
        >>> import numpy as np
        >>> sketch = np.zeros((1, 4, 3), np.int64)
        >>> lsh_error_sketch_write(np.array([[3], [3]], np.int32), np.array([1, 0]), np.array([0.5, 0.5]), sketch)
        >>> (sketch[0, 3] * [1, 2.0**-32, 2.0**-32]).tolist()
        [2.0, 1.0, 1.0]

    Reference:
        Zhu et al. 2023, arXiv:2306.08808, section 3.2.2, eq. 17.
    """
    op = "lsh_error_sketch_write"
    _checked_sketch(op, sketch, buckets)
    count = int(buckets.shape[0])
    for name, x in (("labels", labels), ("base_predictions", base_predictions)):
        checks.column(op, name, x, count, "buckets", buckets)
        value = arrays.to_numpy(x)
        check.refuse(op, name, x, ~((value >= 0) & (value <= 1)), "0 to 1", "Pass probabilities.")
    check.writable(op, "sketch", sketch)
    if choose(op, impl, "buckets", buckets) == "reference":
        _reference.lsh_error_sketch_write(buckets, labels, base_predictions, sketch)
    elif count:
        y, yb = (arrays.dense(x, "float64") for x in (labels, base_predictions))
        native.core.table.lsh_sketch_write(arrays.dense(buckets, "int32"), y, yb, sketch)


@_words.documented
def lsh_error_sketch(
    buckets: Any,
    base_prediction: Any,
    sketch: Any,
    *,
    similarity: str = "count",
    temperature: float = 0.1,
    gamma: float = 1.0,
    lam: float = 0.9,
    return_weights: bool = False,
    impl: Impl = "auto",
) -> Any:
    """Correct predictions by the errors of the samples that fell into the same buckets of a sketch.

    c_r = count of bucket_r; y_r, yb_r = its sums over c_r; a_r = exp(s_r / tau) / sum_r exp(s_r / tau) over the repeats
    with c_r > 0; ybar = sum_r a_r y_r; ybar_base = sum_r a_r yb_r; the rest as in ``error_memory_compensate``:
    y_err = gamma (ybar - y_base) + (1 - gamma) (ybar - ybar_base), y_pred = min(1, max(0, y_base + lam y_err)). Where
    all buckets are empty y_pred = y_base. The paper's eq. 18 averages over buckets to get the similarity s_r; how it is
    normalised could not be read. Offered are s_r = c_r / (samples written), "count", and s_r = 0, "const", which weighs
    all repeats alike. No gradients.

    Args:
        buckets: of the samples to predict, (B, R) int32, from ``lsh_buckets``.
        sketch: (R, 2^L, 3) int64, from ``lsh_error_sketch_write``.
        similarity: "count" or "const". Default "count".
        return_weights: also return the weights of the repeats. Default False.

    Returns:
        y_pred, (B,), float64 where ``base_prediction`` is, else float32; with ``return_weights`` a
        ``SketchCompensated`` of prediction and weights (B, R).

    Raises:
        ValueError: shapes or devices do not fit, a bucket is not of the sketch, or a number is out of range.

    Examples:
        >>> import numpy as np
        >>> sketch, buckets = np.zeros((2, 4, 3), np.int64), np.array([[3, 0]], np.int32)
        >>> lsh_error_sketch_write(buckets, np.array([1]), np.array([0.25]), sketch)
        >>> lsh_error_sketch(buckets, np.array([0.125]), sketch, gamma=0.0, lam=1.0).tolist()
        [0.875]

    Reference:
        Zhu et al. 2023, arXiv:2306.08808, section 3.2.2, eqs. 17 and 18 (equation images not decoded).
    """
    op = "lsh_error_sketch"
    _checked_sketch(op, sketch, buckets)
    checks.column(op, "base_prediction", base_prediction, int(buckets.shape[0]), "buckets", buckets)
    choice(op, "similarity", similarity, SIMILARITIES)
    numbers = checks.readout(op, temperature, gamma, lam)
    check.finite(op, base_prediction=base_prediction)
    written = int(sketch[0, :, 0].sum()) if similarity == "count" else 0
    return _read(op, buckets, base_prediction, sketch, written, numbers, return_weights, impl)


def _read(
    op: str,
    buckets: Any,
    base_prediction: Any,
    sketch: Any,
    written: int,
    numbers: dict[str, float],
    return_weights: bool,
    impl: Impl,
) -> Any:
    """Checked arguments; ``written`` is 0 where all repeats weigh alike."""
    if choose(op, impl, "buckets", buckets) == "reference":
        return _reference.lsh_error_sketch(
            buckets,
            base_prediction,
            sketch,
            similarity="count" if written else "const",
            **numbers,
            return_weights=return_weights,
        )
    batch, repeats = (int(n) for n in buckets.shape)
    prediction = arrays.empty(buckets, (batch,), "float64")
    weights = arrays.empty(buckets, (batch, repeats), "float64") if return_weights else None
    if batch:
        native.core.table.lsh_sketch_read(
            arrays.dense(buckets, "int32"),
            arrays.dense(base_prediction, "float64"),
            sketch,
            1.0 / written if written else 0.0,
            tuple(numbers.values()),
            prediction,
            weights,
        )
    prediction = arrays.dense(prediction, error_memory.real(base_prediction))
    if weights is None:
        return prediction
    return SketchCompensated(prediction, arrays.dense(weights, error_memory.real(base_prediction)))


@_words.documented
class ErrorSketch:
    """The errors of a model on all samples since the last reset, in constant space (ReLoop2).

    ``write`` hashes samples into R tables of 2^L buckets and adds their labels and predictions up there; ``compensate``
    reads the R buckets that a sample falls into. Both cost the same however many samples were written. See
    ``lsh_buckets``, ``lsh_error_sketch_write`` and ``lsh_error_sketch`` for the formulas. The sketch takes 24 R 2^L
    bytes: 283 MB at the defaults, 12 MB with R = 8. ``reset`` it when the model changes. Not locked: a write must not
    run beside another call.

    Args:
        similarity, temperature, gamma, lam: as in ``lsh_error_sketch``, with the same defaults.
        seed: of the projections, 0 to 2^64 - 1: the same on every machine. Default 0.
        like: an array of the kind of the arrays to come. Default NumPy.

    Examples:
        >>> import numpy as np
        >>> sketch = ErrorSketch(3, repeats=4, bits=8, lam=1.0, gamma=0.0)
        >>> h = np.array([[1.0, -2.0, 0.5]])
        >>> sketch.write(h, np.array([1]), np.array([0.25]))
        >>> sketch.compensate(h, np.array([0.125])).tolist(), sketch.writes
        ([0.875], 1)

    Reference:
        Zhu et al. 2023, arXiv:2306.08808, section 3.2.2.
    """

    def __init__(
        self,
        dim: int,
        *,
        repeats: int = 180,
        bits: int = 16,
        similarity: str = "count",
        temperature: float = 0.1,
        gamma: float = 1.0,
        lam: float = 0.9,
        seed: int = 0,
        like: Any = None,
    ) -> None:
        op = "ErrorSketch"
        self.dim = integer(op, "dim", dim, at_least=1)
        self.repeats = integer(op, "repeats", repeats, at_least=1)
        self.bits = integer(op, "bits", bits, at_least=1, at_most=MAX_BITS)
        choice(op, "similarity", similarity, SIMILARITIES)
        self.similarity = similarity
        numbers = checks.readout(op, temperature, gamma, lam)
        self.temperature, self.gamma, self.lam = numbers.values()
        self.seed = integer(op, "seed", seed, at_least=0, at_most=2**64 - 1)
        like = np.empty(0) if like is None else like
        check.kind(op, "like", like)
        drawn = lsh_projections(self.dim, repeats=self.repeats, bits=self.bits, seed=self.seed)
        self.projections = arrays.from_numpy(drawn, like)
        zeros = np.zeros((self.repeats, 2**self.bits, 3), np.int64)
        # Every write touches pages all over: the first one of 1024 samples takes 100 instead of 180 ms.
        native.core.advise_huge_pages(zeros.ctypes.data, zeros.nbytes)
        self.sketch = arrays.from_numpy(zeros, like)
        self.writes = 0

    def write(self, hidden: Any, label: Any, base_prediction: Any, *, impl: Impl = "auto") -> None:
        """Add samples: hidden (n, d), label y (n,) and base_prediction yb (n,), both in [0, 1].

        Raises:
            TypeError, ValueError, NotImplementedError: as ``lsh_buckets`` and ``lsh_error_sketch_write``.
        """
        buckets = lsh_buckets(hidden, self.projections, impl=impl)
        lsh_error_sketch_write(buckets, label, base_prediction, self.sketch, impl=impl)
        self.writes += int(buckets.shape[0])

    def compensate(
        self,
        hidden: Any,
        base_prediction: Any,
        *,
        return_weights: bool = False,
        impl: Impl = "auto",
    ) -> Any:
        """Correct predictions: hidden (B, d), base_prediction (B,); returns as ``lsh_error_sketch``.

        Raises:
            TypeError, ValueError, NotImplementedError: as ``lsh_buckets`` and ``lsh_error_sketch``.
        """
        op = "ErrorSketch.compensate"
        buckets = lsh_buckets(hidden, self.projections, impl=impl)
        checks.column(
            op, "base_prediction", base_prediction, int(hidden.shape[0]), "hidden", hidden
        )
        check.finite(op, base_prediction=base_prediction)
        numbers = {"temperature": self.temperature, "gamma": self.gamma, "lam": self.lam}
        written = self.writes if self.similarity == "count" else 0
        return _read(
            op, buckets, base_prediction, self.sketch, written, numbers, return_weights, impl
        )

    def reset(self) -> None:
        """Forget all samples; the projections stay."""
        self.sketch[...] = 0
        self.writes = 0

    def state_dict(self) -> dict[str, Any]:
        """``sketch``: a copy; ``writes``; and what the projections follow from: ``dim``, ``seed``."""
        copy = self.sketch.copy() if hasattr(self.sketch, "copy") else self.sketch.clone()
        return {"sketch": copy, "writes": self.writes, "dim": self.dim, "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave, of a sketch with the same projections; settings stay.

        Raises:
            TypeError: an array of another kind or dtype.
            ValueError: an entry is missing, or the sketch has another shape, dim or seed.
        """
        op = "ErrorSketch.load_state_dict"
        check.entries(op, state, ("sketch", "writes", "dim", "seed"))
        sketch = check.array(op, "sketch", state["sketch"], ("int64",), 3)
        check.same_place(op, "sketch", sketch, "this sketch", self.sketch)
        writes = integer(op, "writes", state["writes"], at_least=0)
        for name, got, wanted in (
            ("sketch", tuple(sketch.shape), tuple(self.sketch.shape)),
            ("dim", state["dim"], self.dim),
            ("seed", state["seed"], self.seed),
        ):
            if got != wanted:
                raise ValueError(
                    f"[{op}] {name}: expected {wanted}, got {got}. Make the sketch with the same arguments."
                )
        self.sketch[...] = sketch
        self.writes = writes
