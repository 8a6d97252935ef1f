"""Searching with a model: beams by likelihood, two tree searches, backtracking, neighbours of a codebook.

Each op is one step of a loop whose other half, the model, runs in the caller's engine. Trees are updated in place;
everything else comes back as a new state. Arguments are checked before anything is written.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..front import arrays, check, environment, native
from ..front.check import integer, number
from ..front.impl import Impl, choose
from ..reference.decode import search as _reference
from ._search import (
    ACTIONS as ACTIONS,
)
from ._search import (
    FLAGS,
    TREE_FLOATS,
    Backtrack,
    BacktrackState,
    BeamState,
    PuctStep,
    PuctTree,
    StarStep,
    StarTree,
    check_tree,
    nodes_in_use,
)

TILE_BYTES = 8 * 2**20
"""Products of ``vq_neighbor_table`` that lie in memory at a time. From 2 to 32 MiB the time is the same within 30%
(4096 and 16384 codes of 8 dimensions, 8192 of 256; one core)."""


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

    Example:
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
    if not isinstance(state, BeamState):
        raise TypeError(
            f"[{op}] state: expected a BeamState, got {type(state).__name__}. Use BeamState.start(...)."
        )
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
        return _reference.likelihood_beam_search(
            logits, state, ref_logits, eos_token_ids=tuple(eos)
        )
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


def mcts_star_step(
    tree: StarTree,
    leaves: Any = None,
    rollout_values: Any = None,
    starts: Any = None,
    roots: Any = None,
    *,
    c: float = 0.7,
    alpha: float = 0.5,
    unvisited_bonus: float = math.inf,
    end_gate: float = 0.9,
    max_depth: int | None = None,
    seed: int | None = None,
    offset: int = 0,
    impl: Impl = "auto",
) -> StarStep:
    """Back up what was evaluated and select the next node, in each of B trees (MCTS*). Updates the tree in place.

    Backup from leaf l with rollout value r: V_l <- (1 - alpha) V_l + alpha r, N_l += 1; then for each node above it up
    to the root: N += 1, V = sum_c V_c N_c / sum_c N_c over its children (V stays if none was visited). Without r a
    leaf is treated like the nodes above it. Select, from the start: while the node has children go to
    argmax_c V_c + c sqrt(2 ln N / N_c); unvisited children come first, by V. Ties go to the lowest index, or to one
    drawn with ``seed``. An iteration is: select; append children with the model's values; select with ``starts`` = the
    expanded node for the child to roll out; roll out; back up, which also selects the next node.

    Args:
        tree: ``StarTree``; float32 or float64 values, int64 or int32 parents and visits, any strides.
        leaves: node to back up from in each tree, -1 for none, (B,) integers. Default None: only select.
        rollout_values: r, (B,) floats, NaN for none. Default None.
        starts: node to select from, -1 for none, (B,) integers. Default: the roots.
        roots: node at which backing up ends and from which depth is counted, (B,) integers. Default node 0.
        c: exploration constant, >= 0. Default 0.7.
        alpha: weight of the rollout, in [0, 1]. Default 0.5.
        unvisited_bonus: added to V of an unvisited child; infinity (default) puts all of them first. The authors' code
            has 1.0, so that a visited child with a large bonus can go before them.
        end_gate: value from which a selected node counts as solved. Default 0.9.
        max_depth: greatest depth selected, >= 0. Default None: no limit.
        seed: draws ties with Philox, from 0 to 2^64 - 1. Default None: the lowest index.
        offset: position of this call in the seed's stream, >= 0: count the calls. Default 0.
        impl: "auto", "cpu" or "reference". Default "auto".

    Returns:
        ``StarStep``: nodes, depths, and whether V >= end_gate there.

    Raises:
        TypeError: not an array, a wrong dtype, or arrays of two libraries.
        ValueError: shapes do not fit, a node is not in the tree, or a number is out of range. The tree is unchanged.
        NotImplementedError: the forced impl cannot run these inputs.

    Example:
        >>> import numpy as np
        >>> tree = StarTree(np.array([[-1, 0, 0]]), np.array([[0.0, 0.4, 0.6]]), np.zeros((1, 3), int))
        >>> child = mcts_star_step(tree).nodes
        >>> step = mcts_star_step(tree, child, np.array([0.8]))
        >>> child.tolist(), tree.values.round(2).tolist(), step.nodes.tolist()
        ([2], [[0.7, 0.4, 0.7]], [1])

    Reference:
        Zhang et al. 2024, ReST-MCTS*, arXiv:2406.03816, and the published code.
    """
    op = "mcts_star_step"
    if not isinstance(tree, StarTree):
        raise TypeError(
            f"[{op}] tree: expected a StarTree, got {type(tree).__name__}. Use StarTree(...)."
        )
    parents = check_tree(op, tree, ("values",), ("visits",))
    numbers = (
        number(op, "c", c, at_least=0),
        number(op, "alpha", alpha, at_least=0, at_most=1),
        number(op, "unvisited_bonus", unvisited_bonus, at_least=0, at_most=math.inf),
        number(op, "end_gate", end_gate),
    )
    depth = -1 if max_depth is None else integer(op, "max_depth", max_depth, at_least=0)
    key = None if seed is None else integer(op, "seed", seed, at_least=0, at_most=2**64 - 1)
    place = integer(op, "offset", offset, at_least=0, at_most=2**64 - 1)
    places = nodes_in_use(op, parents, tree.parents, leaves, roots, starts)
    rollouts = None
    if rollout_values is not None:
        if leaves is None:
            raise ValueError(
                f"[{op}] rollout_values: expected leaves too, got None for them. Pass leaves."
            )
        shape = (parents.shape[0],)
        check.alike(
            op,
            "rollout_values",
            rollout_values,
            arrays.FLOATS,
            shape,
            "tree.parents",
            tree.parents,
        )
        rollouts = arrays.dense(arrays.to_numpy(rollout_values), "float64")
    if choose(op, impl, "tree.parents", tree.parents) == "reference":
        return _reference.mcts_star_step(
            tree, leaves, rollout_values, starts, roots, c=c, alpha=alpha, unvisited_bonus=unvisited_bonus,
            end_gate=end_gate, max_depth=max_depth, seed=seed, offset=offset,
        )  # fmt: skip
    trees = parents.shape[0]
    found = (np.empty(trees, np.int64), np.empty(trees, np.int64), np.empty(trees, bool))
    native.core.decode.star_step(
        tuple(tree),
        places,
        rollouts,
        depth,
        numbers,
        key,
        place,
        found,
    )
    return StarStep(*(arrays.from_numpy(x, tree.parents) for x in found))


def puct_select_backup(
    tree: PuctTree,
    leaves: Any = None,
    starts: Any = None,
    roots: Any = None,
    *,
    c_puct: float = 1.0,
    gamma: float = 1.0,
    length_penalty: float = 1.25,
    max_depth: int | None = None,
    impl: Impl = "auto",
) -> PuctStep:
    """Back up what was evaluated and select the next node, in each of B trees (MCTS-DPO). Updates the tree in place.

    With r = value - value of the parent: backup sets Q = r + gamma V and N += 1 at the leaf; then, for each node above
    it up to the root, V = sum_c max(1, N_c) Q_c / sum_c max(1, N_c) over its children, N += 1, Q = r + gamma V. Select,
    from the start: while the node has children go to argmax_c Q_c + c_puct p_c sqrt(N) / (1 + N_c), p_c =
    exp(logp_c / length_c^length_penalty); ties to the lowest index. As in the authors' code Q of node 0 changes only
    when it is the leaf. They count one more visit of the root before each iteration; add it to ``visits`` for the same.

    Args:
        tree: ``PuctTree``; float32 or float64 and int64 or int32 arrays, any strides.
        leaves: node to back up from in each tree, -1 for none, (B,) integers. Default None: only select.
        starts: node to select from, -1 for none, (B,) integers. Default: the roots.
        roots: node at which backing up ends and from which depth is counted, (B,) integers. Default node 0.
        c_puct: exploration constant, >= 0. Default 1.
        gamma: discount, in [0, 1]. Default 1.
        length_penalty: exponent of the length, >= 0; 1 is the mean log-probability. Default 1.25.
        max_depth: greatest depth selected, >= 0; the paper searches to 5. Default None: no limit.
        impl: "auto", "cpu" or "reference". Default "auto".

    Returns:
        ``PuctStep``: nodes and depths.

    Raises:
        TypeError: not an array, a wrong dtype, or arrays of two libraries.
        ValueError: shapes do not fit, a node is not in the tree, or a number is out of range. The tree is unchanged.
        NotImplementedError: the forced impl cannot run these inputs.

    Example:
        >>> import numpy as np
        >>> values = np.array([[0.0, 0.2, 0.6]])
        >>> counts, logps = np.zeros((1, 3), int), np.full((1, 3), -1.0)
        >>> tree = PuctTree(np.array([[-1, 0, 0]]), values.copy(), 0 * values, counts, values, logps, counts + 1)
        >>> leaf = puct_select_backup(tree).nodes
        >>> _ = puct_select_backup(tree, leaf)
        >>> leaf.tolist(), tree.visits.tolist(), tree.v.round(2).tolist()
        ([2], [[1, 0, 1]], [[0.4, 0.0, 0.0]])

    Reference:
        Xie et al. 2024, MCTS-DPO, arXiv:2405.00451, and the published code.
    """
    op = "puct_select_backup"
    if not isinstance(tree, PuctTree):
        raise TypeError(
            f"[{op}] tree: expected a PuctTree, got {type(tree).__name__}. Use PuctTree(...)."
        )
    parents = check_tree(op, tree, ("q", "v"), ("visits",), ("values", "logps"), ("lengths",))
    numbers = (
        number(op, "c_puct", c_puct, at_least=0),
        number(op, "gamma", gamma, at_least=0, at_most=1),
        number(op, "length_penalty", length_penalty, at_least=0),
    )
    depth = -1 if max_depth is None else integer(op, "max_depth", max_depth, at_least=0)
    places = nodes_in_use(op, parents, tree.parents, leaves, roots, starts)
    if choose(op, impl, "tree.parents", tree.parents) == "reference":
        return _reference.puct_select_backup(
            tree,
            leaves,
            starts,
            roots,
            c_puct=c_puct,
            gamma=gamma,
            length_penalty=length_penalty,
            max_depth=max_depth,
        )
    found = (np.empty(parents.shape[0], np.int64), np.empty(parents.shape[0], np.int64))
    native.core.decode.puct_step(tuple(tree), places, depth, numbers, found)
    return PuctStep(*(arrays.from_numpy(x, tree.parents) for x in found))


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

    Example:
        >>> import numpy as np
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
    if not isinstance(state, BacktrackState):
        raise TypeError(
            f"[{op}] state: expected a BacktrackState, got {type(state).__name__}. Use BacktrackState.start(...)."
        )
    named = {
        "chunk_lengths": chunk_lengths,
        "prefix_lengths": prefix_lengths,
        "sentence_lengths": sentence_lengths,
    }
    check.alike(
        op,
        "span_ends",
        span_ends,
        arrays.INTEGERS,
        (batch, phrases),
        "p_unconfident",
        p_unconfident,
    )
    for name, x in named.items():
        check.alike(op, name, x, arrays.INTEGERS, (batch,), "p_unconfident", p_unconfident)
    kinds = (arrays.INTEGERS, arrays.INTEGERS, TREE_FLOATS, FLAGS, FLAGS)
    for name, dtypes, x in zip(state._fields, kinds, state):
        check.alike(op, f"state.{name}", x, dtypes, (batch,), "p_unconfident", p_unconfident)
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
    check.refuse(
        op,
        "sentence_lengths",
        sentence,
        (sentence < 0) | (sentence > prefix),
        "0 to prefix_lengths",
        "",
    )
    if chosen == "reference":
        return _reference.retrospective_backtrack(
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


def vq_neighbor_table(codebook: Any, *, k: int | None = None, impl: Impl = "auto") -> Any:
    """List the nearest other codes of every code of a codebook, nearest first.

    D_ij = |E_i - E_j|_2, D_ii = infinity; row i holds the k columns of smallest D_ij. Unlike the authors' script only
    the k nearest are kept and sorted, and V x V distances never lie in memory at once. Distances are compared as
    squares, in float64, summed in the order of the dimensions; where two of them are the same number the lower index
    comes first, so duplicates of a code are its first neighbours in their order. A tile of distances comes from a
    matrix product; whatever lies closer together than its rounding is measured again, term by term.

    Args:
        codebook: E, (V, dim), float32, float64, float16 or bfloat16, finite, below 1e150.
        k: neighbours kept, 1 to V - 1. Default min(1000, V - 1).
        impl: "auto", "cpu" or "reference". Default "auto".

    Returns:
        (V, k) int32, of the kind of ``codebook``. Row i never holds i.

    Raises:
        TypeError: not an array, or a wrong dtype.
        ValueError: not two dimensions, a number that is not finite, or k out of range.
        NotImplementedError: the forced impl cannot run these inputs.

    Example:
        >>> import numpy as np
        >>> vq_neighbor_table(np.array([[0.0], [1.0], [3.0]]), k=2).tolist()
        [[1, 2], [0, 2], [1, 0]]

    Reference:
        Jang et al. 2024, LANTERN, arXiv:2410.03355, and the published code.
    """
    op = "vq_neighbor_table"
    check.array(op, "codebook", codebook, arrays.FLOATS, 2)
    codes, dim = (int(n) for n in codebook.shape)
    width = (
        min(1000, max(codes - 1, 0))
        if k is None
        else integer(op, "k", k, at_least=1, at_most=codes - 1)
    )
    chosen = choose(op, impl, "codebook", codebook)
    e = arrays.dense(arrays.to_numpy(codebook), "float64")
    check.refuse(op, "codebook", e, ~(np.abs(e) < 1e150), "finite numbers below 1e150")
    if chosen == "reference":
        return _reference.vq_neighbor_table(codebook, k=k)
    table = np.empty((codes, width), np.int32)
    squares = (e * e).sum(axis=1)
    # A sum of `dim` products, in any order, is off by at most 1.01 (dim + 1) units of |E_i| |E_j|, and by the least
    # normal number for each term that is flushed to zero.
    errors = (1.01 * (dim + 1) * 2.0**-53, dim * 2.0**-1021)
    rows = max(1, min(TILE_BYTES, environment.workspace_bytes()) // max(8 * codes, 1))
    for first in range(0, codes if width > 0 else 0, rows):
        products = e[first : first + rows] @ e.T
        native.core.decode.nearest_codes(
            products, e, squares, first, errors, table[first : first + rows]
        )
    return arrays.from_numpy(table, codebook)
