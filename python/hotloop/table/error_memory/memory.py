# SPDX-License-Identifier: Apache-2.0
"""ReLoop2's error memory: recent mistakes of a frozen model, found again by similarity and subtracted."""

from __future__ import annotations

from typing import Any

import numpy as np

from ... import core
from ...front import arrays, check, native
from ...front.check import integer, number
from ...front.impl import Impl, choose
from ...reference.table import error_memory as _reference
from ...reference.table.results import Compensated as Compensated
from .. import _words
from . import checks

_COLUMNS = ("keys", "labels", "base_predictions")


@_words.documented
def error_memory_compensate(
    query: Any,
    base_prediction: Any,
    keys: Any,
    labels: Any,
    base_predictions: Any,
    *,
    k: int = 180,
    temperature: float = 0.1,
    gamma: float = 1.0,
    lam: float = 0.9,
    return_neighbors: bool = False,
    impl: Impl = "auto",
) -> Any:
    """Correct predictions by the errors that were made on the k most similar stored samples.

    s_i = <q, h_i> / (|q| |h_i|); K = the k slots of largest s; a_i = exp(s_i / tau) / sum_K exp(s_j / tau);
    ybar = sum_K a_i y_i; ybar_base = sum_K a_i yb_i; y_err = gamma (ybar - y_base) + (1 - gamma) (ybar - ybar_base);
    y_pred = min(1, max(0, y_base + lam y_err)). With gamma = 1 this is (1 - lam) y_base + lam ybar, an ensemble with a
    nearest-neighbour classifier; with gamma = 0 it adds the mean error of the base model on the neighbours. The
    similarity is exact, not approximate, and no (B, N) matrix is in memory. Of equal similarities the lower slot is
    taken. A vector of norm 0 has similarity 0 to all; one with a NaN or an infinity is no neighbour, and as a query has
    none. Without neighbours y_pred = y_base. No gradients.

    Args:
        query: hidden vectors of the samples to predict, (B, d), float32, float64, float16 or bfloat16.
        keys: stored hidden vectors, (N, d), any of these dtypes. float64 keys are computed in float64, others in
            float32.
        labels: stored labels y, (N,).
        base_predictions: yb, what the model predicted when they were stored, (N,).
        k: neighbours, >= 1; all N where there are fewer. Default 180 (the paper: 180 and 70).
        temperature: tau, > 0. Default 0.1 (the paper also learns it).
        lam: step of the correction, in [0, 1]. Default 0.9 (the paper: 0.9 and 0.4).

    Returns:
        y_pred, (B,), float32 or float64, of the kind of ``query``; with ``return_neighbors`` a ``Compensated`` of
        prediction, weights (B, min(k, N)) and neighbors (B, min(k, N)).

    Examples:
        >>> import numpy as np
        >>> keys, labels, base = np.eye(3), np.array([1, 0, 0]), np.array([0.4, 0.4, 0.4])
        >>> error_memory_compensate(keys[:1], base[:1], keys, labels, base, k=1, gamma=0, lam=0.5).round(3)
        array([0.7])

    Reference:
        Zhu et al. 2023, arXiv:2306.08808, section 3.2, eqs. 6 to 14. The text was read, its equation images were not:
        which end of gamma is which follows from the text.
    """
    op = "error_memory_compensate"
    check.array(op, "keys", keys, arrays.FLOATS, 2)
    slots, dim = int(keys.shape[0]), int(keys.shape[1])
    if dim < 1:
        raise ValueError(
            f"[{op}] keys: expected vectors of at least one number, got shape {tuple(keys.shape)}. Pass (N, d)."
        )
    checks.rows(op, "query", query, dim, "keys", keys)
    batch = int(query.shape[0])
    checks.column(op, "base_prediction", base_prediction, batch, "query", query)
    checks.column(op, "labels", labels, slots, "keys", keys)
    checks.column(op, "base_predictions", base_predictions, slots, "keys", keys)
    k = integer(op, "k", k, at_least=1)
    numbers = checks.readout(op, temperature, gamma, lam)
    stored = (keys, labels, base_predictions)
    return _compensate(op, query, base_prediction, stored, 0, k, numbers, return_neighbors, impl)


def _compensate(
    op: str,
    query: Any,
    base_prediction: Any,
    stored: tuple[Any, Any, Any],
    first: int,
    k: int,
    numbers: dict[str, float],
    return_neighbors: bool,
    impl: Impl,
) -> Any:
    """Checked arguments; ``first`` is the oldest slot, and of equal similarities the older slot is taken."""
    keys = stored[0]
    given = {"query": query, "base_prediction": base_prediction}
    check.finite(op, **given, **dict(zip(_COLUMNS, stored)))
    if choose(op, impl, "query", query) == "reference":
        order = np.roll(np.arange(keys.shape[0]), -first)
        found = _reference.error_memory_compensate(
            query,
            base_prediction,
            *(arrays.from_numpy(arrays.to_numpy(x)[order], keys) for x in stored),
            k=k,
            **numbers,
            return_neighbors=return_neighbors,
        )
        if not return_neighbors or first == 0:
            return found
        at = arrays.to_numpy(found.neighbors)
        at = np.where(at < 0, -1, order[at]) if len(order) else at
        return found._replace(neighbors=arrays.from_numpy(at, query))
    batch, k, real = int(query.shape[0]), min(k, int(keys.shape[0])), _reference.real(keys)
    prediction = arrays.empty(query, (batch,), real)
    weights = arrays.empty(query, (batch, k), real) if return_neighbors else None
    neighbors = arrays.empty(query, (batch, k), "int64") if return_neighbors else None
    if k == 0:
        keys = arrays.empty(query, (0, int(keys.shape[1])), arrays.dtype(keys))
    found = Compensated(prediction, weights, neighbors)
    if batch:
        q, *columns = (arrays.dense(x, real) for x in (query, base_prediction, *stored[1:]))
        near: list[Any] = [arrays.unit_stride(keys), first, *columns, k, tuple(numbers.values())]
        native.core.table.error_memory(q, *[*near, *found])
    return found if return_neighbors else prediction


@_words.documented
class ErrorMemory:
    """The last ``capacity`` samples of a model with their labels, to correct its predictions by (ReLoop2).

    ``write`` stores samples when their labels arrive, over the oldest ones once the memory is full; ``compensate`` is
    ``error_memory_compensate`` over what is stored, where of equal similarities the older sample is taken; ``reset``
    empties it, as after an update of the model, whose hidden vectors then mean something else. A sample is admitted if
    |y - yb| > sigma and by chance ``sample_rate``: the draw belongs to the seed and to the number of the sample in
    order of writing, so that the same samples are kept whether they are written one by one or together, on every
    machine. Not locked: a write must not run beside another call.

    Args:
        capacity: slots, >= 1.
        k, temperature, gamma, lam: as in ``error_memory_compensate``, with the same defaults.
        sigma: least error, >= 0, that is exceeded by what is stored; None stores all. Default None.
        sample_rate: share of the samples that is stored, in [0, 1]; on a grid of 2^-24. Default 1.
        seed: of the draws, 0 to 2^64 - 1. Default 0.
        like: an array of the kind, device and float dtype to store keys in. Default NumPy float32.

    Examples:
        >>> import numpy as np
        >>> memory = ErrorMemory(2, 3, k=1, gamma=0.0, lam=1.0)
        >>> memory.write(np.eye(3, dtype=np.float32), np.array([1, 1, 0]), np.array([0.5, 0.5, 0.5]))
        3
        >>> memory.size, memory.compensate(np.eye(3, dtype=np.float32)[2:], np.array([0.75])).tolist()
        (2, [0.25])

    Reference:
        Zhu et al. 2023, arXiv:2306.08808, section 3.2.1.
    """

    def __init__(
        self,
        capacity: int,
        dim: int,
        *,
        k: int = 180,
        temperature: float = 0.1,
        gamma: float = 1.0,
        lam: float = 0.9,
        sigma: float | None = None,
        sample_rate: float = 1.0,
        seed: int = 0,
        like: Any = None,
    ) -> None:
        op = "ErrorMemory"
        self.capacity = integer(op, "capacity", capacity, at_least=1)
        self.dim = integer(op, "dim", dim, at_least=1)
        self.k = integer(op, "k", k, at_least=1)
        numbers = checks.readout(op, temperature, gamma, lam)
        self.temperature, self.gamma, self.lam = numbers.values()
        self.sigma = None if sigma is None else number(op, "sigma", sigma, at_least=0)
        self.sample_rate = number(op, "sample_rate", sample_rate, at_least=0, at_most=1)
        self.seed = integer(op, "seed", seed, at_least=0, at_most=2**64 - 1)
        like = np.empty(0, np.float32) if like is None else like
        check.array(op, "like", like, arrays.FLOATS)
        real = _reference.real(like)
        self._keys = arrays.empty(like, (self.capacity, self.dim), arrays.dtype(like))
        self._labels = arrays.empty(like, (self.capacity,), real)
        self._base = arrays.empty(like, (self.capacity,), real)
        self._size = self._next = self._offered = 0

    @property
    def size(self) -> int:
        """How many samples are stored."""
        return self._size

    @_words.documented
    def write(self, hidden: Any, label: Any, base_prediction: Any) -> int:
        """Offer samples, oldest first; return how many were admitted.

        Args:
            hidden: (n, d) floats. A NaN or an infinity makes a slot that is no neighbour.
            label: y, (n,).
            base_prediction: yb, (n,).

        Returns:
            How many of the n were stored, those included that others of the same call have pushed out again.

        Raises:
            ValueError: another shape or device; with HOTLOOP_CHECK=1 a value that is not finite.
        """
        op = "ErrorMemory.write"
        checks.rows(op, "hidden", hidden, self.dim, "the memory", self._keys)
        count = int(hidden.shape[0])
        checks.column(op, "label", label, count, "hidden", hidden)
        checks.column(op, "base_prediction", base_prediction, count, "hidden", hidden)
        check.finite(op, hidden=hidden, label=label, base_prediction=base_prediction)
        chosen = np.ones(count, bool)
        if self.sigma is not None:
            y, yb = (_reference.numpy_of(x, np.float64) for x in (label, base_prediction))
            chosen &= np.abs(y - yb) > self.sigma
        if self.sample_rate < 1:
            u = core.philox_uniform(self.seed, count, first_item=self._offered)[:, 0]
            chosen &= u <= self.sample_rate
        self._offered += count
        columns = [checks.detached(x) for x in (hidden, label, base_prediction)]
        admitted = int(chosen.sum())
        if admitted < count:
            at = arrays.from_numpy(np.flatnonzero(chosen), hidden)
            columns = [x[at] for x in columns]
        # What would be pushed out again in the same call is not written.
        skipped = max(admitted - self.capacity, 0)
        self._store([x[skipped:] for x in columns], admitted - skipped)
        return admitted

    def _store(self, columns: list[Any], count: int) -> None:
        done = 0
        while done < count:
            piece = min(count - done, self.capacity - self._next)
            for slots, x in zip((self._keys, self._labels, self._base), columns):
                slots[self._next : self._next + piece] = x[done : done + piece]
            done += piece
            self._next = (self._next + piece) % self.capacity
        self._size = min(self._size + count, self.capacity)

    @_words.documented
    def compensate(
        self,
        hidden: Any,
        base_prediction: Any,
        *,
        return_neighbors: bool = False,
        impl: Impl = "auto",
    ) -> Any:
        """Correct predictions by what is stored: ``error_memory_compensate`` with the memory's settings.

        Returns:
            As ``error_memory_compensate``.
        """
        op = "ErrorMemory.compensate"
        checks.rows(op, "hidden", hidden, self.dim, "the memory", self._keys)
        checks.column(
            op, "base_prediction", base_prediction, int(hidden.shape[0]), "hidden", hidden
        )
        stored = tuple(x[: self._size] for x in (self._keys, self._labels, self._base))
        numbers = {"temperature": self.temperature, "gamma": self.gamma, "lam": self.lam}
        settings = (self._oldest(), self.k, numbers)
        return _compensate(op, hidden, base_prediction, stored, *settings, return_neighbors, impl)

    def _oldest(self) -> int:
        return self._next if self._size == self.capacity else 0

    def reset(self) -> None:
        """Empty the memory. The count of samples offered goes on, so that draws do not repeat."""
        self._size = self._next = 0

    def state_dict(self) -> dict[str, Any]:
        """Copies of what is stored, oldest first: ``keys`` (size, d), ``labels``, ``base_predictions``; ``offered``."""
        order = np.roll(np.arange(self._size), -self._oldest())
        at = arrays.from_numpy(order, self._keys)
        columns = (x[at] for x in (self._keys, self._labels, self._base))
        return {**dict(zip(_COLUMNS, columns)), "offered": self._offered}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave, of a memory of the same kind and dim; settings stay.

        Raises:
            TypeError: an array of another kind or dtype.
            ValueError: an entry is missing, a shape does not fit, or more is stored than fits.
        """
        op = "ErrorMemory.load_state_dict"
        check.entries(op, state, (*_COLUMNS, "offered"))
        offered = integer(op, "offered", state["offered"], at_least=0)
        columns = [state[name] for name in _COLUMNS]
        checks.rows(op, "keys", columns[0], self.dim, "the memory", self._keys)
        count = int(columns[0].shape[0])
        if count > self.capacity:
            raise ValueError(
                f"[{op}] keys: expected at most {self.capacity} rows, got {count}. Make a larger memory."
            )
        for name, x in zip(_COLUMNS[1:], columns[1:]):
            checks.column(op, name, x, count, "keys", columns[0])
        self.reset()
        self._store([checks.detached(x) for x in columns], count)
        self._offered = offered
