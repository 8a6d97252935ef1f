# SPDX-License-Identifier: Apache-2.0
"""Decisions of retrospective backtracking."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...front import arrays, check, native
from ...front.check import integer, number
from ...front.impl import Impl, choose
from ...reference.decode import search as reference
from ...reference.decode.results import Backtrack, BacktrackState
from .checks import FLAGS, TREE_FLOATS


def retrospective_backtrack(
    p_unconfident: Any,
    span_ends: Any,
    chunk_lengths: Any,
    prefix_lengths: Any,
    sentence_lengths: Any,
    state: BacktrackState,
    *,
    tau: float = 0.003,
    temperature: float = 1.0,
    temperature_step: float = 0.05,
    temperature_rise: float = 0.5,
    max_local_attempts: int = 10,
    max_total_attempts: int = 50,
    impl: Impl = "auto",
) -> Backtrack:
    """Decide what of a generated chunk to keep: accept it, or truncate it before its first unconfident phrase.

    A phrase i is flagged if p_un[i] > tau. None: the answer is accepted. Else keep the prefix and the chunk up to
    e_{i-1} + 1 (nothing of it for the first phrase) and resample with temperature min(T + step, T0 + rise). After N
    local failures in a row cut the prefix back to its last sentence end; stop after K attempts in all. As in the
    authors' code, after a failure only the first phrase of a chunk is looked at: if it is confident the chunk is kept
    up to its end, the temperature is T0 again, and generation continues.

    Args:
        p_unconfident: probability of the closing token "unconfident" at each phrase end, (B, P), floats.
        span_ends: position in the chunk of each closing token, rising, -1 after the last, (B, P), integers.
        chunk_lengths: tokens of the chunk, without an end-of-text token, (B,), integers.
        prefix_lengths: tokens of the answer kept before the chunk, (B,), integers.
        sentence_lengths: tokens of the prefix up to its last sentence end, 0 for none, (B,), integers.
        state: ``BacktrackState.start(B)``, later that of the result. Not changed; done answers are passed over.
        tau: threshold, in [0, 1]. Default 0.003.
        temperature: T0, >= 0. Default 1.
        temperature_step: >= 0. Default 0.05.
        temperature_rise: most that is added to T0, >= 0. Default 0.5.
        max_local_attempts: N, >= 1. Default 10.
        max_total_attempts: K, >= 1. Default 50.
        impl: "auto", "cpu" or "reference". Default "auto".

    Returns:
        ``Backtrack``: "accept" (keep all, done), "continue" (a correction held), "resample", "cut" (keep up to the
        sentence end) or "stop" (attempts used up, done); "none" for answers that were done. Arrays of the kind of
        ``p_unconfident``.

    Raises:
        TypeError: not an array, a wrong dtype, or arrays of two libraries.
        ValueError: shapes do not fit, ends do not rise or lie outside the chunk, or a number is out of range.
        NotImplementedError: the forced impl cannot run these inputs.

    Examples:
        >>> import numpy as np
        >>> from hotloop.decode import ACTIONS
        >>> p, ends = np.array([[0.001, 0.2]]), np.array([[3, 8]])
        >>> n = np.array([10]), np.array([0]), np.array([0])
        >>> done = retrospective_backtrack(p, ends, *n, BacktrackState.start(1))
        >>> done.actions.tolist() == [ACTIONS["resample"]], done.kept_lengths.tolist(), done.state.temperatures.tolist()
        (True, [4], [1.05])

    Reference:
        Wu et al. 2025, REVERSE, arXiv:2504.13169, and the published code.
    """
    op = "retrospective_backtrack"
    check.array(op, "p_unconfident", p_unconfident, arrays.FLOATS, 2)
    batch, phrases = (int(n) for n in p_unconfident.shape)
    check.instance(op, "state", state, BacktrackState, hint="Use BacktrackState.start(...).")
    named = {
        "chunk_lengths": chunk_lengths,
        "prefix_lengths": prefix_lengths,
        "sentence_lengths": sentence_lengths,
    }
    like = ("p_unconfident", p_unconfident)
    check.alike(op, "span_ends", span_ends, arrays.INTEGERS, (batch, phrases), *like)
    for name, x in named.items():
        check.alike(op, name, x, arrays.INTEGERS, (batch,), *like)
    kinds = (arrays.INTEGERS, arrays.INTEGERS, TREE_FLOATS, FLAGS, FLAGS)
    for name, dtypes, x in zip(state._fields, kinds, state):
        check.alike(op, f"state.{name}", x, dtypes, (batch,), *like)
    numbers = (
        number(op, "tau", tau, at_least=0, at_most=1),
        number(op, "temperature", temperature, at_least=0),
        number(op, "temperature_step", temperature_step, at_least=0),
        number(op, "temperature_rise", temperature_rise, at_least=0),
    )
    limits = (
        integer(op, "max_local_attempts", max_local_attempts, at_least=1),
        integer(op, "max_total_attempts", max_total_attempts, at_least=1),
    )
    chosen = choose(op, impl, "p_unconfident", p_unconfident)
    p, ends = (
        arrays.dense(arrays.to_numpy(p_unconfident), "float64"),
        arrays.dense(arrays.to_numpy(span_ends), "int64"),
    )
    chunk, prefix, sentence = (arrays.dense(arrays.to_numpy(x), "int64") for x in named.values())
    used = ends >= 0
    check.refuse(op, "p_unconfident", p, used & ~((p >= 0) & (p <= 1)), "probabilities from 0 to 1")
    before = np.concatenate((np.full((batch, 1), -1, np.int64), ends[:, :-1]), axis=1)[:, :phrases]
    gap = used & (before < 0) & (np.arange(phrases) > 0)
    wrong = (ends < -1) | gap | (used & ((ends <= before) | (ends >= chunk[:, None])))
    check.refuse(op, "span_ends", ends, wrong, "rising positions inside the chunk, then -1")
    check.refuse(op, "prefix_lengths", prefix, prefix < 0, "counts of tokens >= 0")
    check.refuse(op, "chunk_lengths", chunk, chunk < 0, "counts of tokens >= 0")
    wrong = (sentence < 0) | (sentence > prefix)
    check.refuse(op, "sentence_lengths", sentence, wrong, "0 to prefix_lengths", "")
    if chosen == "reference":
        return reference.retrospective_backtrack(
            p_unconfident, span_ends, chunk_lengths, prefix_lengths, sentence_lengths, state, tau=tau,
            temperature=temperature, temperature_step=temperature_step, temperature_rise=temperature_rise,
            max_local_attempts=max_local_attempts, max_total_attempts=max_total_attempts,
        )  # fmt: skip
    types = ("int64", "int64", "float64", "bool", "bool")
    start = tuple(arrays.dense(arrays.to_numpy(x), t) for x, t in zip(state, types))
    after = tuple(np.empty(batch, t) for t in types)
    found = tuple(np.empty(batch, np.int64) for _ in range(3))
    native.core.decode.backtrack(
        batch, phrases, p, ends, (chunk, prefix, sentence), start, numbers, limits, after, found
    )
    back = [arrays.from_numpy(x, p_unconfident) for x in found]
    counters = (arrays.from_numpy(x, p_unconfident) for x in after)
    return Backtrack(back[0], back[1], back[2], BacktrackState(*counters))
