# SPDX-License-Identifier: Apache-2.0
"""Beam search by likelihood."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...front import arrays, check, environment, native
from ...front.check import integer
from ...front.impl import Impl, choose
from ...reference.decode import search as reference
from ...reference.decode.results import BeamState
from .checks import FLAGS


def likelihood_beam_search(
    logits: Any,
    state: BeamState,
    ref_logits: Any = None,
    *,
    eos_token_ids: int | tuple[int, ...] | list[int] = (),
    impl: Impl = "auto",
) -> BeamState:
    """Advance a beam search by one token: log-softmax and the best k of all k V children in one pass.

    score(prefix) = sum_t log pi(a_t | s_t), in float64, without length normalisation (Hugging Face's default
    ``length_penalty`` divides by the length; 0.0 there is what happens here). Of all children, the k largest that do
    not end a beam live on. One that ends a beam is finished if it is among the k largest of all; finished beams keep
    their score. A request is done when the best live beam does not beat the worst of k finished ones, as scores only
    fall, or when none lives; its state then stays as it is. Equal scores go to the lower beam, then to the larger
    logit, then to the lower token. With ``ref_logits`` the score is sum_t log pi - log pi_ref, the implicit reward;
    it may rise, so a request is done only when no beam lives. A token that pi_ref rules out is then left out.

    Args:
        logits: of the policy at each beam's end, (B, n, V), float32, float64, float16 or bfloat16; the rows are those
            of the first n live beams, so that n = 1 suffices for the first token. A NaN counts as -inf; a row of only
            -inf, or with +inf, has no children.
        state: ``BeamState.start(B, k)``, later what this function returned. Not changed.
        ref_logits: of the reference policy, shape and dtype of ``logits``. Default None.
        eos_token_ids: one id, or several, that end a beam. Default none.
        impl: "auto", "cpu" or "reference". Default "auto".

    Returns:
        The ``BeamState`` after this token, arrays of the kind of ``logits``. ``best()`` of it is the answer.

    Raises:
        TypeError: not an array, a wrong dtype, or arrays of two libraries.
        ValueError: shapes do not fit, a live beam has no row, or an id is outside the vocabulary.
        NotImplementedError: the forced impl cannot run these inputs.

    Examples:
        >>> import numpy as np
        >>> state = BeamState.start(1, 2)
        >>> for p in ([0.6, 0.4, 0.0], [0.1, 0.2, 0.7]):
        ...     logits = np.log(np.array(p) + 1e-9)
        ...     state = likelihood_beam_search(np.tile(logits, (1, 2, 1)), state, eos_token_ids=2)
        >>> best = state.best()
        >>> best.token_ids[0].tolist(), np.exp(best.scores[0]).round(2).tolist()
        ([[0, 2], [1, 2]], [0.42, 0.28])

    Reference:
        Rafailov et al. 2024, arXiv:2404.12358: beam search by likelihood is search by value for the optimal policy.
    """
    op = "likelihood_beam_search"
    check.array(op, "logits", logits, arrays.FLOATS, 3)
    batch, rows, vocabulary = (int(n) for n in logits.shape)
    check.instance(op, "state", state, BeamState, hint="Use BeamState.start(...).")
    check.array(op, "state.scores", state.scores, ("float64",), 2)
    check.array(op, "state.token_ids", state.token_ids, ("int64",), 3)
    width, length = int(state.scores.shape[1]), int(state.token_ids.shape[-1])
    for name, dtypes, shape in (
        ("scores", ("float64",), (batch, width)),
        ("token_ids", ("int64",), (batch, width, length)),
        ("beam_indices", ("int64",), (batch, width)),
        ("next_token_ids", ("int64",), (batch, width)),
        ("finished_scores", ("float64",), (batch, width)),
        ("finished_token_ids", ("int64",), (batch, width, length)),
        ("finished_lengths", ("int64",), (batch, width)),
        ("done", FLAGS, (batch,)),
    ):
        check.alike(op, f"state.{name}", getattr(state, name), dtypes, shape, "logits", logits)
    if vocabulary < 1 or not 1 <= rows <= width:
        raise ValueError(
            f"[{op}] logits: expected 1 to {width} rows of at least one token, got shape {tuple(logits.shape)}. "
            "Pass a row for each live beam."
        )
    if ref_logits is not None:
        dtype = (arrays.dtype(logits),)
        check.alike(op, "ref_logits", ref_logits, dtype, tuple(logits.shape), "logits", logits)
    several = isinstance(eos_token_ids, (tuple, list))
    ids: Any = eos_token_ids if several else (eos_token_ids,)
    eos = sorted({integer(op, "eos_token_ids", i, at_least=0, at_most=vocabulary - 1) for i in ids})
    chosen = choose(op, impl, "logits", logits)
    lives = (arrays.to_numpy(state.scores) > -np.inf) & (arrays.to_numpy(state.done) == 0)[:, None]
    if rows < width and lives[:, rows:].any():
        b, r = (int(i) for i in np.argwhere(lives[:, rows:])[0])
        raise ValueError(
            f"[{op}] logits: expected a row for each live beam, got {rows} rows and beam {r + rows} of request {b} "
            "alive. Pass all rows."
        )
    if environment.checks_on():
        for name, z in (("logits", logits), ("ref_logits", ref_logits)):
            if z is None:
                continue
            bad = np.isnan(arrays.to_numpy(z)) | (arrays.to_numpy(z) == np.inf)
            check.refuse(op, name, z, bad, "logits below +inf", check.UNSET)
    if chosen == "reference":
        return reference.likelihood_beam_search(logits, state, ref_logits, eos_token_ids=tuple(eos))
    before = [arrays.dense(arrays.to_numpy(state[i])) for i in (0, 1, 4, 5, 6, 7)]
    after = [
        np.empty((*x.shape[:2], length + 1) if x.ndim == 3 else x.shape, x.dtype) for x in before
    ]
    indices, next_ids = (np.empty((batch, width), np.int64) for _ in range(2))
    if batch > 0:
        native.core.decode.beam_step(
            width,
            length,
            arrays.unit_stride(logits),
            None if ref_logits is None else arrays.unit_stride(ref_logits),
            eos,
            tuple(before),
            tuple(after),
            indices,
            next_ids,
        )
    parts = (*after[:2], indices, next_ids, *after[2:])
    return BeamState(*(arrays.from_numpy(x, logits) for x in parts))
