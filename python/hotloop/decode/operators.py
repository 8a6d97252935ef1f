# SPDX-License-Identifier: Apache-2.0
"""The ops of this room as torch operators: what ``torch.compile`` sees of them.

An operator takes tensors and numbers, so a law travels as its values, its arrays and its numbers, and is put together
again inside, where the eager front door checks and runs it. Eager calls do not come here: taking a law apart and
the dispatcher would make a small call 42 instead of 28 us (docs/perf-notes.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.decode.draws import BELOW
from ..reference.decode.law import Law, Logits, Probs, as_law
from ..reference.decode.results import Sampled, Verified, VerifiedTree
from . import _loops
from ._call import Drafted

_LAW = "{1} {0}, Tensor?[] {0}_arrays, float[] {0}_numbers, str {0}_kind"
_TARGET, _DRAFT = _LAW.format("target", "Tensor"), _LAW.format("draft", "Tensor?")
_STREAM = "Tensor? seeds, Tensor? offsets, SymInt seed, SymInt offset, str impl"

Packed = tuple[Any, list[Any], list[float], str]


def _take_apart(law: Any) -> Packed:
    if law is None:
        return None, [], [], ""
    law = as_law(law)
    logits = isinstance(law, Logits)
    parameters = [getattr(law, "temperature", 1.0), law.top_k, law.top_p, law.min_p]
    arrays = [p if isinstance(p, Tensor) else None for p in parameters]
    numbers = [0.0 if isinstance(p, Tensor) else float(p) for p in parameters]
    if isinstance(law, Logits):
        arrays += [law.reference, law.bias_ids, law.bias]
        numbers.append(float(law.mixture))
    kind = ("logits " if logits else "probs ") + law.filter_order
    return law.values, arrays, numbers, kind


def _put_together(values: Any, arrays: list[Any], numbers: list[float], kind: str) -> Law | None:
    if values is None:
        return None
    parts: Any = kind.split(" ")
    name, order = parts
    temperature, top_k, top_p, min_p = (n if a is None else a for a, n in zip(arrays, numbers[:4]))
    top_k = int(top_k) if isinstance(top_k, float) else top_k
    if name == "probs":
        return Probs(values, top_k, top_p, min_p, order)
    reference, bias_ids, bias = arrays[4:]
    return Logits(
        values, temperature, top_k, top_p, min_p, order, reference, numbers[4], bias_ids, bias
    )


def _stream(op: str, seed: Any, offset: Any, like: Any) -> tuple[Any, Any, Any, Any]:
    if isinstance(seed, torch.Generator):
        raise TypeError(
            f"[{op}] seed: expected None, an integer or an int64 tensor under torch.compile, got a torch.Generator. "
            "Draw the seeds outside: torch.randint(2**63 - 1, (B,), generator=...)."
        )
    if seed is None:
        # A node of the graph, so that every run draws anew. The operator itself is a function of its arguments:
        # drawn inside it, two equal calls would be merged into one.
        seed = torch.randint(BELOW, (like.shape[0],), device=like.device)
    seeds = seed if isinstance(seed, Tensor) else None
    offsets = offset if isinstance(offset, Tensor) else None
    number = 0 if seeds is not None else seed
    # A schema's integers have a sign; the bits are what counts.
    signed = number - 2**64 if number >= 2**63 else number
    return seeds, offsets, signed, 0 if offsets is not None else offset


def _seed(seeds: Any, offsets: Any, seed: int, offset: int) -> tuple[Any, Any]:
    return seed % 2**64 if seeds is None else seeds, offset if offsets is None else offsets


torch.library.define(
    "hotloop::decode_chain",
    f"(str op, Tensor ids, {_TARGET}, {_DRAFT}, Tensor? lengths, {_STREAM}) -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "hotloop::decode_tree",
    f"(Tensor ids, Tensor parents, {_TARGET}, {_DRAFT}, bool replacement, Tensor? lengths, SymInt depth, {_STREAM}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "hotloop::decode_sample", f"({_LAW.format('law', 'Tensor')}, {_STREAM}) -> (Tensor, Tensor)"
)


@torch.library.impl("hotloop::decode_chain", ["CPU", "CUDA"])
def _run_chain(op: str, ids: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    p, q = _put_together(*rest[:4]), _put_together(*rest[4:8])
    lengths, *stream, impl = rest[8:]
    return tuple(_loops.chain(op, (ids, p, q, lengths, *_seed(*stream)), impl))


def _verified_fake(ids: Tensor, width: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch = ids.shape[0]
    return (
        ids.new_empty((batch, width)),
        ids.new_empty((batch,), dtype=torch.int64),
        ids.new_empty((batch, width), dtype=torch.float32),
        ids.new_empty((batch,), dtype=torch.int64),
    )


@torch.library.register_fake("hotloop::decode_chain")
def _fake_chain(op: str, ids: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _verified_fake(ids, ids.shape[1] + 1)


@torch.library.impl("hotloop::decode_tree", ["CPU", "CUDA"])
def _run_tree(ids: Tensor, parents: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    p, q = _put_together(*rest[:4]), _put_together(*rest[4:8])
    replacement, lengths, depth, *stream, impl = rest[8:]
    drafted = (ids, p, q, lengths, *_seed(*stream))
    return tuple(_loops.tree(drafted, parents, replacement, depth, impl))


@torch.library.register_fake("hotloop::decode_tree")
def _fake_tree(*args: Any) -> tuple[Tensor, ...]:
    ids, depth = args[0], args[12]
    output, accepted, logps, read = _verified_fake(ids, depth + 1)
    nodes = ids.new_empty((ids.shape[0], depth), dtype=torch.int64)
    return output, nodes, accepted, logps, read


@torch.library.impl("hotloop::decode_sample", ["CPU", "CUDA"])
def _run_sample(*arguments: Any) -> tuple[Tensor, ...]:
    *stream, impl = arguments[4:]
    return tuple(_loops.sample(_put_together(*arguments[:4]), *_seed(*stream), impl))


@torch.library.register_fake("hotloop::decode_sample")
def _fake_sample(law: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    shape = law.shape[:-1]
    return law.new_empty(shape, dtype=torch.int64), law.new_empty(shape, dtype=torch.float32)


def chain(op: str, drafted: Drafted, impl: str) -> Verified:
    ids, target, draft, lengths, seed, offset = drafted
    laws = (*_take_apart(target), *_take_apart(draft))
    stream = _stream(op, seed, offset, ids)
    return Verified(*torch.ops.hotloop.decode_chain(op, ids, *laws, lengths, *stream, impl))


def tree(drafted: Drafted, parents: Any, replacement: bool, depth: Any, impl: str) -> VerifiedTree:
    ids, target, draft, lengths, seed, offset = drafted
    laws = (*_take_apart(target), *_take_apart(draft))
    depth = ids.shape[1] if depth is None else depth
    stream = _stream("tree_speculative_verify", seed, offset, ids)
    return VerifiedTree(
        *torch.ops.hotloop.decode_tree(
            ids, parents, *laws, replacement, lengths, depth, *stream, impl
        )
    )


def sample(law: Any, seed: Any, offset: Any, impl: str) -> Sampled:
    apart = _take_apart(law)
    stream = _stream("sample", seed, offset, apart[0])
    return Sampled(*torch.ops.hotloop.decode_sample(*apart, *stream, impl))
