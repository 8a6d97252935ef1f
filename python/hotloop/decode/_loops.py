# SPDX-License-Identifier: Apache-2.0
"""The ops that torch.compile knows as operators, as an eager call runs them: checks, implementation, loop."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..front import arrays, check, environment, native
from ..front.check import integer
from ..front.impl import choose
from ..reference.decode import paths, sampling, speculative
from ..reference.decode import tree as tree_reference
from ..reference.decode.results import Sampled, Verified, VerifiedTree
from . import _call
from .law import check_law, naming, pack, pack_draft, refuse_probabilities


def sample(law: Any, seed: Any, offset: Any, impl: str) -> Sampled:
    op = "sample"
    law = check_law(op, "law", law, 2, 3)
    shape = tuple(map(int, law.values.shape[:-1]))
    _call.check_stream(op, seed, offset, shape[0], law.values)
    chosen = choose(op, impl, "law", law.values, _call.WITH_CUDA)
    if chosen == "reference":
        with naming(op, law=law):
            return sampling.sample(law, seed=seed, offset=offset)
    rows = shape[1] if len(shape) == 2 else 1
    ids = arrays.empty(law.values, (shape[0], rows), "int64")
    logps = arrays.empty(law.values, (shape[0], rows), "float32")
    stream = _call.packed_stream(seed, offset, shape[0], law.values)
    arguments = (shape[0], rows, pack(law), *stream, ids, logps)
    if chosen == "cuda":
        from . import _cuda

        _cuda.run("sample", law.values, *arguments)
    elif native.core.decode.sample(*arguments):
        refuse_probabilities(op, law=law)
    return Sampled(ids.reshape(shape), logps.reshape(shape))


def chain(
    op: str, drafted: _call.Drafted, impl: str, named: dict[str, Any] | None = None
) -> Verified:
    """``named``: the draft's law as the caller passed it, for errors."""
    greedy, block = op == "greedy_speculative_accept", op == "block_speculative_sampling"
    target_name = "target_logits" if greedy else "target_probs"
    ids, target, draft = _call.check_drafted(op, drafted, target_name=target_name)
    _, _, _, lengths, seed, offset = drafted

    def laws() -> dict[str, Any]:
        return {target_name: target, **(named or {"draft_probs": draft})}

    chosen = choose(op, impl, target_name, target.values, _call.WITH_CUDA)
    if chosen == "reference":
        if greedy:
            return paths.greedy_chain(ids, target, lengths)
        whole, each = speculative.block_speculative_sampling, speculative.chain_speculative_sampling
        with naming(op, **laws()):
            return (whole if block else each)(
                draft, ids, target, num_draft_tokens=lengths, seed=seed, offset=offset
            )
    batch, k = map(int, ids.shape)
    outputs = _call.verified_like(ids, batch, k + 1)
    arguments = (
        block, batch, k, arrays.unit_stride(ids), pack(target), pack_draft(draft),
        _call.packed_lengths(lengths, k), *_call.packed_stream(seed, offset, batch, ids), tuple(outputs),
    )  # fmt: skip
    if chosen == "cuda":
        from . import _cuda

        _cuda.run("chain", target.values, *arguments)
    elif native.core.decode.chain(*arguments):
        refuse_probabilities(op, **laws())
    return outputs


def tree(
    drafted: _call.Drafted, parents: Any, replacement: bool, max_depth: int | None, impl: str
) -> VerifiedTree:
    op = "tree_speculative_verify"
    ids, target, draft = _call.check_drafted(op, drafted, tree=True)
    _, _, _, lengths, seed, offset = drafted
    batch, m = map(int, ids.shape)
    check.alike(op, "parents", parents, arrays.INTEGERS, (batch, m), "draft_token_ids", ids)
    depth = m if max_depth is None else integer(op, "max_depth", max_depth, at_least=0, at_most=m)
    if environment.checks_on():
        _check_parents(op, parents, lengths)
    chosen = choose(op, impl, "target_probs", target.values, _call.WITH_CUDA)
    if chosen == "reference":
        with naming(op, target_probs=target, draft_probs=draft):
            return tree_reference.tree_speculative_verify(
                ids, parents, target, draft, replacement=replacement, num_nodes=lengths, max_depth=depth, seed=seed,
                offset=offset,
            )  # fmt: skip
    outputs = _call.verified_like(ids, batch, depth + 1)
    nodes = arrays.empty(ids, (batch, depth), "int64")
    arguments = (
        batch, m, depth, arrays.unit_stride(ids), arrays.dense(parents, "int64"), pack(target),
        pack_draft(draft), bool(replacement), _call.packed_lengths(lengths, m),
        *_call.packed_stream(seed, offset, batch, ids), tuple(outputs), nodes,
    )  # fmt: skip
    if chosen == "cuda":
        from . import _cuda

        _cuda.run("tree", target.values, *arguments)
    elif native.core.decode.tree(*arguments):
        refuse_probabilities(op, target_probs=target, draft_probs=draft)
    return VerifiedTree(outputs.output_token_ids, nodes, *outputs[1:])


def _check_parents(op: str, parents: Any, num_nodes: Any) -> None:
    x = arrays.to_numpy(parents)
    node = np.arange(x.shape[1])
    bad = (x < -1) | (x >= node)
    if num_nodes is not None:
        bad &= node < arrays.to_numpy(num_nodes)[:, None]
    check.refuse(
        op, "parents", x, bad, "-1 or an earlier node", "List every parent before its children; a tree has no cycle."
    )  # fmt: skip
