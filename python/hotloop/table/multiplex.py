# SPDX-License-Identifier: Apache-2.0
"""Many features in a few shared tables: hashing, gathering, pooling and concatenation in one pass.

In eager mode a call goes straight to an ``autograd.Function``; under ``torch.compile`` it goes through the registered
operator ``torch.ops.hotloop.multiplexed_lookup``, whose gradients are dense. Both are tested to agree.
"""

from __future__ import annotations

from ..front.needs import torch_for

torch_for("table.multiplex")

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..front import arrays, buffers, check, native
from ..front.check import choice, integer
from ..front.impl import Impl, choose, everywhere, on_cpu
from ..reference.table import multiplex as _reference
from . import _keys, _words

Combiner = Literal["sum", "mean", "sqrtn"]
COMBINERS = ("sum", "mean", "sqrtn")
Values = Tensor | tuple[Tensor, Tensor]
"""One feature of a batch: one value per sample (B,), L of them (B, L), or ragged (values (nnz,), offsets (B + 1,))."""

_CANDIDATES = {"cpu": on_cpu, "reference": everywhere}
_INTEGERS = (torch.int64, torch.int32)


@_words.documented
def multiplexed_embedding_lookup(
    tables: Tensor | Sequence[Tensor],
    values: Sequence[Values],
    *,
    chunks: Sequence[int],
    combiner: Combiner = "mean",
    padding_id: int | None = None,
    seed: int = 0,
    sparse: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """Look up all features of a batch in tables that they share, and concatenate what is found.

    Feature f has n_f chunks. Chunk k of it is column c = k + (chunks of the features before), is looked up in table
    c mod T, at row r = ``salted_hash_bucket(value, M, feature=f, chunk=k, seed=seed)``, and fills
    out[:, c d : (c + 1) d]. Chunks stand in the order of their numbers. (TensorFlow Recommenders sorts them by name,
    chunk 10 before chunk 2, and hashes with SipHash64: its outputs have the same law, not the same values.)
    A feature with several values per sample pools their rows: sum; mean: / n; sqrtn: / sqrt(n), n the values that are
    no padding. Padding, and a sample without values, gives zeros and has no gradient.

    The gradient of a row is the sum over all its hits, in the order of the samples and in float64, rounded once: the
    same for any number of threads.

    Args:
        tables: T tensors (M, d) or one of them, float32, float64, float16 or bfloat16; the rows may be apart, not what
            is in them.
        values: one item per feature: (B,), (B, L), or (values (nnz,), offsets (B + 1,)) with offsets[0] = 0 and
            offsets[B] = nnz, as ``nn.EmbeddingBag`` takes with ``include_last_offset``. int64 of any value, or int32.
        chunks: n_f >= 1 of each feature.
        combiner: "sum", "mean" or "sqrtn". Default "mean".
        padding_id: value that stands for nothing. Default None: every value is a key.
        seed: of all hashes, 0 to 2^64 - 1. Default 0.
        sparse: whether gradients are sparse COO tensors, rows ascending and distinct,
            for ``torch.optim.SparseAdam`` and the like; not under ``torch.compile``. Default False.

    Returns:
        (B, d sum_f n_f), dtype of the tables.

    Raises:
        ValueError: shapes that do not fit, offsets that do not rise from 0 to nnz, or numbers out of range.

    Examples:
        >>> table = torch.arange(10.0).reshape(5, 2)
        >>> user, tags = torch.tensor([7, 8]), (torch.tensor([1, 2, 3]), torch.tensor([0, 3, 3]))
        >>> multiplexed_embedding_lookup(table, [user, tags], chunks=[2, 1])
        tensor([[4.0000, 5.0000, 6.0000, 7.0000, 4.6667, 5.6667],
                [2.0000, 3.0000, 6.0000, 7.0000, 0.0000, 0.0000]])

    Reference:
        Coleman et al. 2023, arXiv:2305.12102 (Unified Embedding), section 4.
    """
    op = "multiplexed_embedding_lookup"
    all_tables = _check_tables(op, tables)
    first = all_tables[0]
    taken, offsets = _check_values(op, values, first)
    if isinstance(chunks, int) or len(chunks) != len(taken):
        raise ValueError(
            f"[{op}] chunks: expected one number for each of {len(taken)} features, got {chunks!r}."
        )
    parts = [integer(op, "chunks", n, at_least=1) for n in chunks]
    choice(op, "combiner", combiner, COMBINERS)
    compiling = torch.compiler.is_compiling()
    seed = integer(op, "seed", seed, at_least=0, at_most=2**64 - 1)
    if padding_id is not None:
        most = 2**63 - 1
        padding_id = integer(op, "padding_id", padding_id, at_least=-most - 1, at_most=most)
    chosen = choose(
        op, impl, "tables", first, _CANDIDATES, batch=_batch_of(taken[0], offsets[0]), features=len(taken)
    )  # fmt: skip
    if compiling and sparse:
        raise ValueError(
            f"[{op}] sparse: expected False under torch.compile, got True. Call it outside of the compiled part."
        )
    if chosen == "reference":
        return _reference.multiplexed_embedding_lookup(
            all_tables,
            [v if o is None else (v, o) for v, o in zip(taken, offsets)],
            chunks=parts,
            combiner=combiner,
            padding_id=padding_id,
            seed=seed,
            sparse=sparse,
        )
    if compiling:
        found: Tensor = torch.ops.hotloop.multiplexed_lookup(
            all_tables, taken, offsets, parts, combiner, padding_id, _keys.signed(seed)
        )
        return found
    spec = _Spec(taken, offsets, parts, combiner, padding_id, seed, sparse)
    if torch.is_grad_enabled() and any(t.requires_grad for t in all_tables):
        found = _Lookup.apply(spec, *all_tables)
        return found
    return spec.forward(all_tables)


@dataclass
class _Spec:
    """A batch as the loop reads it: all but the tables."""

    values: list[Tensor]
    offsets: list[Tensor | None]
    chunks: list[int]
    combiner: str
    padding_id: int | None
    seed: int
    sparse: bool

    def __post_init__(self) -> None:
        # int32 is widened, and the loop walks values one after the other: copies only where that is not so already.
        self.values = [v.long().contiguous() for v in self.values]
        self.offsets = [None if o is None else o.long().contiguous() for o in self.offsets]
        self.batch = _batch_of(self.values[0], self.offsets[0])

    def layout(self, rows: int, tables: int) -> tuple[Any, ...]:
        features = []
        for v, o, n in zip(self.values, self.offsets, self.chunks):
            bag = 1 if v.ndim == 1 else v.shape[1]
            features.append((v.view(-1), o, v.numel(), bag, n))
        return (self.batch, rows, tables, features, self.combiner, self.padding_id, self.seed)

    def forward(self, tables: Sequence[Tensor]) -> Tensor:
        rows, dim = tables[0].shape
        tables = [t if dim == 1 or t.stride(1) == 1 else t.contiguous() for t in tables]
        out = buffers.empty(self.batch, sum(self.chunks) * dim, dtype=tables[0].dtype)
        native.core.table.multiplexed(self.layout(rows, len(tables)), list(tables), out)
        return out

    def backward(
        self, grad: Tensor, rows: int, tables: int, needed: Sequence[bool]
    ) -> list[Tensor | None]:
        grad = grad.contiguous()
        dim = grad.shape[1] // sum(self.chunks)
        hits = native.core.table.MultiplexHits(self.layout(rows, tables))
        if not self.sparse:
            dense = [buffers.empty(rows, dim, dtype=grad.dtype).zero_() for _ in range(tables)]
            hits.dense(list(dense), grad)
            return [d if need else None for d, need in zip(dense, needed)]
        found: list[Tensor | None] = []
        for t, need in enumerate(needed):
            if not need:
                found.append(None)
                continue
            n = hits.rows(t)
            indices = torch.empty(1, n, dtype=torch.int64, device="cpu")
            values = buffers.empty(n, dim, dtype=grad.dtype)
            hits.sparse(t, indices, values, grad)
            trusted: dict[str, Any] = {"check_invariants": False, "is_coalesced": True}
            shape = (rows, dim)
            found.append(torch.sparse_coo_tensor(indices, values, shape, device="cpu", **trusted))
        return found


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spec: _Spec, *tables: Tensor) -> Tensor:
        # Saved, so that a change in place between forward and backward is noticed.
        ctx.save_for_backward(*spec.values, *(o for o in spec.offsets if o is not None))
        ctx.spec, ctx.rows = spec, tables[0].shape[0]
        return spec.forward(tables)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "[multiplexed_embedding_lookup] create_graph: expected False, got True. Use impl='reference' for "
                "second derivatives."
            )
        _ = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        return (None, *ctx.spec.backward(grad, ctx.rows, len(needed), needed))


@torch.library.custom_op(
    "hotloop::multiplexed_lookup",
    mutates_args=(),
    schema="(Tensor[] tables, Tensor[] values, Tensor?[] offsets, SymInt[] chunks, str combiner, SymInt? padding_id, "
    "SymInt seed) -> Tensor",
)
def _multiplexed_lookup(tables: list[Tensor], *batch: Any) -> Tensor:
    return _registered(*batch).forward(tables)


def _registered(*batch: Any) -> _Spec:
    """The integers of a schema have a sign, and its gradients are dense."""
    arguments: list[Any] = [*batch[:-1], batch[-1] % 2**64, False]
    return _Spec(*arguments)


@_multiplexed_lookup.register_fake
def _(tables: list[Tensor], values: Any, offsets: Any, chunks: Any, *rest: Any) -> Tensor:
    return tables[0].new_empty((_batch_of(values[0], offsets[0]), sum(chunks) * tables[0].shape[1]))


@torch.library.custom_op(
    "hotloop::multiplexed_lookup_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor[] values, Tensor?[] offsets, SymInt[] chunks, str combiner, SymInt? padding_id, "
    "SymInt seed, int tables, SymInt rows) -> Tensor",
)
def _multiplexed_backward(grad: Tensor, *args: Any) -> Tensor:
    *batch, tables, rows = args
    spec = _registered(*batch)
    out = buffers.empty(tables, rows, grad.shape[1] // sum(spec.chunks), dtype=grad.dtype).zero_()
    hits = native.core.table.MultiplexHits(spec.layout(rows, tables))
    hits.dense(list(out.unbind(0)), grad.contiguous())
    return out


@_multiplexed_backward.register_fake
def _(grad: Tensor, values: Any, offsets: Any, chunks: Any, *rest: Any) -> Tensor:
    *_, tables, rows = rest
    return grad.new_empty((tables, rows, grad.shape[1] // sum(chunks)))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tables, values, offsets, *ctx.rest = inputs
    ctx.save_for_backward(*values, *(o for o in offsets if o is not None))
    ctx.ragged = [o is not None for o in offsets]
    ctx.tables, ctx.rows = len(tables), tables[0].shape[0]


def _gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    features = len(ctx.ragged)
    saved = ctx.saved_tensors
    values, rest = list(saved[:features]), iter(saved[features:])
    offsets = [next(rest) if ragged else None for ragged in ctx.ragged]
    stacked = torch.ops.hotloop.multiplexed_lookup_backward(
        grad, values, offsets, *ctx.rest, ctx.tables, ctx.rows
    )
    # Lists of tensors have gradients of their own shape; a list of optional ones counts as one argument.
    return list(stacked.unbind(0)), [None] * features, None, None, None, None, None


_multiplexed_lookup.register_autograd(_gradient, setup_context=_setup)


def _batch_of(values: Tensor, offsets: Tensor | None) -> int:
    return values.shape[0] if offsets is None else offsets.shape[0] - 1


def _check_tables(op: str, tables: Any) -> list[Tensor]:
    given = [tables] if isinstance(tables, Tensor) else list(tables)
    if not given:
        raise ValueError(f"[{op}] tables: expected one tensor (M, d) or several, got none.")
    first = check.float_tensor(op, "tables", given[0], ndim=2)
    if first.shape[0] < 1 or first.shape[1] < 1:
        raise ValueError(
            f"[{op}] tables: expected at least one row and one column, got shape {tuple(first.shape)}."
        )
    for t in given[1:]:
        check.float_tensor(op, "tables", t, ndim=2)
        check.same_place(op, "tables", t, "tables[0]", first)
        if t.shape != first.shape or t.dtype != first.dtype:
            raise ValueError(
                f"[{op}] tables: expected {tuple(first.shape)} {arrays.dtype(first)} like tables[0], got "
                f"{tuple(t.shape)} {arrays.dtype(t)}. Tables share their shape."
            )
    return given


def _check_values(op: str, values: Any, table: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
    if isinstance(values, Tensor) or not len(values):
        raise ValueError(
            f"[{op}] values: expected a sequence with one item per feature, got "
            f"{'a tensor' if isinstance(values, Tensor) else 'none'}. Pass a list."
        )
    taken: list[Tensor] = []
    offsets: list[Tensor | None] = []
    batch = None
    for f, item in enumerate(values):
        name = f"values[{f}]"
        ragged = isinstance(item, tuple)
        if ragged and len(item) != 2:
            raise ValueError(
                f"[{op}] {name}: expected (values, offsets), got a tuple of {len(item)}."
            )
        v = _integers(op, name, item[0] if ragged else item, table)
        o = _integers(op, f"{name} offsets", item[1], table) if ragged else None
        if v.ndim not in ((1,) if ragged else (1, 2)) or (
            o is not None and (o.ndim != 1 or o.shape[0] < 1)
        ):
            got = tuple(v.shape) if o is None else f"{tuple(v.shape)} and {tuple(o.shape)}"
            raise ValueError(
                f"[{op}] {name}: expected shape (B,), (B, L), or (nnz,) with offsets (B + 1,), got {got}."
            )
        n = _batch_of(v, o)
        batch = n if batch is None else batch
        if n != batch:
            raise ValueError(
                f"[{op}] {name}: expected {batch} samples like values[0], got {n}. Offsets are one more than samples."
            )
        taken.append(v)
        offsets.append(o)
    return taken, offsets


def _integers(op: str, name: str, value: Any, table: Tensor) -> Tensor:
    t = check.tensor(op, name, value)
    if t.dtype not in _INTEGERS:
        raise TypeError(
            f"[{op}] {name}: expected dtype int64, int32, got {arrays.dtype(t)}. Hash strings with "
            "hash_strings."
        )
    check.same_place(op, name, t, "tables", table)
    return t


class UnifiedEmbedding(nn.Module):
    """Embeddings of many categorical features in a few shared tables: ``multiplexed_embedding_lookup`` as a module.

    Args:
        features: chunks of each feature by name, in an order that is part of the checkpoint: the n-th feature is hashed
            with the salt n. New features go to the end.
        num_buckets: M, rows of a table.
        dim: d, width of a chunk; feature f is d * chunks wide.
        num_tables: T. Default 1.
        combiner: "sum", "mean" or "sqrtn" for features with several values. Default "mean".
        padding_id: value that stands for nothing. Default None.
        seed: of all hashes. Default 0.
        sparse: whether gradients are sparse. Default False.
        device: of the tables.
        dtype: of the tables.

    Attributes:
        tables: T parameters (M, d), drawn from a normal law of standard deviation 1 / sqrt(d), cut at two of them.

    Examples:
        >>> import torch
        >>> embedding = UnifiedEmbedding({"user": 2, "tags": 1}, num_buckets=1000, dim=16)
        >>> batch = {"user": torch.tensor([7, 8]), "tags": (torch.tensor([1, 2, 3]), torch.tensor([0, 3, 3]))}
        >>> {name: tuple(x.shape) for name, x in embedding.split(embedding(batch)).items()}
        {'user': (2, 32), 'tags': (2, 16)}

    Reference:
        Coleman et al. 2023, arXiv:2305.12102 (Unified Embedding).
    """

    def __init__(
        self,
        features: Mapping[str, int],
        num_buckets: int,
        dim: int,
        *,
        num_tables: int = 1,
        combiner: Combiner = "mean",
        padding_id: int | None = None,
        seed: int = 0,
        sparse: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        op = "UnifiedEmbedding"
        if not features:
            raise ValueError(f"[{op}] features: expected a chunk count by name, got none.")
        self.features = {
            name: integer(op, f"features[{name!r}]", n, at_least=1) for name, n in features.items()
        }
        self.num_buckets = integer(op, "num_buckets", num_buckets, at_least=1)
        self.dim = integer(op, "dim", dim, at_least=1)
        self.num_tables = integer(op, "num_tables", num_tables, at_least=1)
        choice(op, "combiner", combiner, COMBINERS)
        self.combiner = combiner
        self.padding_id = padding_id
        self.seed = integer(op, "seed", seed, at_least=0, at_most=2**64 - 1)
        self.sparse = sparse
        shape = (self.num_buckets, self.dim)
        self.tables = nn.ParameterList(
            nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            for _ in range(self.num_tables)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        std = self.dim**-0.5
        for table in self.tables:
            nn.init.trunc_normal_(table, std=std, a=-2 * std, b=2 * std)

    @property
    def output_dim(self) -> int:
        """Width of what ``forward`` returns."""
        return self.dim * sum(self.features.values())

    def forward(self, batch: Mapping[str, Values]) -> Tensor:
        """Look up one item per feature; see ``multiplexed_embedding_lookup`` for their forms.

        Returns:
            (B, output_dim): the features side by side, in their order.
        """
        if batch.keys() != self.features.keys():
            raise ValueError(
                f"[UnifiedEmbedding] batch: expected features {', '.join(self.features)}, got {', '.join(batch)}. "
                "Pass every feature once."
            )
        return multiplexed_embedding_lookup(
            list(self.tables),
            [batch[name] for name in self.features],
            chunks=list(self.features.values()),
            combiner=self.combiner,
            padding_id=self.padding_id,
            seed=self.seed,
            sparse=self.sparse,
        )

    def split(self, found: Tensor) -> dict[str, Tensor]:
        """Return what ``forward`` returned as one view (B, d * chunks) per feature."""
        widths = [n * self.dim for n in self.features.values()]
        return dict(zip(self.features, found.split(widths, dim=-1)))

    def extra_repr(self) -> str:
        return (
            f"{self.features}, num_buckets={self.num_buckets}, dim={self.dim}, num_tables={self.num_tables}, "
            f"combiner={self.combiner!r}, padding_id={self.padding_id}, seed={self.seed}, sparse={self.sparse}"
        )
