# SPDX-License-Identifier: Apache-2.0
"""Multiplexed lookup: bags on rows hashed beforehand, gradients, order, padding, compiled, errors."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_gradient_close, assert_no_worse_than_torch
from hotloop import table
from hotloop.front import impl as _impl
from hotloop.reference import table as reference
from hotloop.table import UnifiedEmbedding, multiplexed_embedding_lookup, salted_hash_bucket
from table_checks import grouped, refused

PAD = -7


def ragged(g, batch, longest):
    lengths = torch.randint(0, longest + 1, (batch,), generator=g)
    offsets = torch.zeros(batch + 1, dtype=torch.int64)
    offsets[1:] = lengths.cumsum(0)
    return torch.randint(-5, 30, (int(offsets[-1]),), generator=g), offsets


def batch_of(batch, seed=0):
    """Every form of a feature, repeated values, padding, values of any bits, int32 and strided ones."""
    g = torch.Generator().manual_seed(seed)
    wide = torch.randint(-(2**63), 2**63 - 1, (batch,), generator=g)
    few = torch.randint(-8, 4, (batch,), generator=g)
    strided = torch.randint(0, 100, (batch, 2), generator=g)[:, 0]
    dense = torch.randint(-8, 20, (batch, 3), generator=g)
    return [wide, few, ragged(g, batch, 6), strided, few.int(), dense, ragged(g, batch, 70)]


CHUNKS = [1, 3, 2, 2, 1, 2, 1]


def tables_of(number, rows, dim, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(rows, dim, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
        for _ in range(number)
    ]


def by_embedding_bag(tables, values, *, chunks, combiner, padding_id, seed=0):
    """torch's own bags, on row numbers hashed beforehand; padding is taken out by hand, as it has no row of its own."""
    out = []
    for f, (item, n) in enumerate(zip(values, chunks)):
        if isinstance(item, tuple):
            ids, offsets = item
        else:
            bag = 1 if item.ndim == 1 else item.shape[1]
            ids, offsets = item.reshape(-1), torch.arange(len(item) + 1) * bag
        kept = torch.ones(len(ids), dtype=torch.bool) if padding_id is None else ids != padding_id
        before = torch.cat([torch.zeros(1, dtype=torch.int64), kept.cumsum(0)])
        ids, offsets = ids[kept], before[offsets]
        for k in range(n):
            t = tables[len(out) % len(tables)]
            rows = salted_hash_bucket(ids, t.shape[0], feature=f, chunk=k, seed=seed)
            mode = "mean" if combiner == "mean" else "sum"
            bags = F.embedding_bag(rows, t, offsets, mode=mode, include_last_offset=True)
            if combiner == "sqrtn":
                bags = bags / offsets.diff().clamp(min=1).sqrt()[:, None]
            out.append(bags)
    return torch.cat(out, 1)


# none, one, a prime, a block of 32 samples and its neighbours, several blocks in two threads
BATCHES = [0, 1, 7, 31, 32, 33, 1000]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("combiner", table.multiplex.COMBINERS)
@pytest.mark.parametrize("padding_id", [None, PAD])
@pytest.mark.parametrize(("number", "dim"), [(1, 4), (3, 16), (2, 5)])
def test_equals_embedding_bag_on_rows_hashed_beforehand(batch, combiner, padding_id, number, dim):
    values = batch_of(batch, batch)
    call = {"chunks": CHUNKS, "combiner": combiner, "padding_id": padding_id}
    ours, plain = tables_of(number, 50, dim), tables_of(number, 50, dim)
    truth = tables_of(number, 50, dim, torch.float64)
    for t, x in zip(truth, plain):
        t.data.copy_(x.data)
    out = multiplexed_embedding_lookup(ours, values, seed=3, **call)
    assert _impl.last_impl("multiplexed_embedding_lookup") == "cpu"
    expected = by_embedding_bag(plain, values, seed=3, **call)
    exact = reference.multiplexed_embedding_lookup(truth, values, seed=3, **call)
    assert_no_worse_than_torch(out, expected, exact)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    for y in (out, expected, exact):
        y.backward(grad.to(y.dtype))
    for a, b, c in zip(ours, plain, truth):
        assert_no_worse_than_torch(a.grad, b.grad, c.grad)
        # Below 0.01 of sums of thousands, roundings of the terms are what is left.
        assert_gradient_close(a.grad, c.grad, 1e-5, floor=0.01)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes(dtype):
    values = batch_of(200)
    ours = tables_of(2, 40, 8, dtype)
    truth = [t.detach().double().requires_grad_() for t in ours]
    out = multiplexed_embedding_lookup(ours, values, chunks=CHUNKS, padding_id=PAD)
    assert out.dtype == dtype
    exact = reference.multiplexed_embedding_lookup(truth, values, chunks=CHUNKS, padding_id=PAD)
    grad = torch.randn(out.shape, dtype=torch.float64).to(dtype)
    out.backward(grad)
    exact.backward(grad.double())
    # One rounding to the storage type; float64 sums in another order than torch's.
    eps = 1e-13 if dtype == torch.float64 else 1e-4 * torch.finfo(dtype).eps
    for a, b in ((out, exact), *zip([t.grad for t in ours], [t.grad for t in truth])):
        assert a.dtype == dtype
        assert_no_worse_than_torch(a, b.to(dtype), b, k=1.0, eps=eps)


def test_single_values_are_copied_bit_by_bit():
    odd = torch.tensor([[float("nan"), -0.0, float("inf")]] * 9).requires_grad_()
    out = multiplexed_embedding_lookup(odd, [torch.arange(100)], chunks=[2])
    assert torch.equal(
        out.view(torch.int32), odd.detach()[:1].expand(100, 3).repeat(1, 2).view(torch.int32)
    )


def test_chunks_stand_in_the_order_of_their_numbers():
    # More than ten: sorted by name, chunk 10 would stand before chunk 2.
    t = torch.randn(97, 3)
    v = torch.arange(20)
    out = multiplexed_embedding_lookup(t, [v, v], chunks=[12, 1], seed=9)
    for k in range(12):
        rows = salted_hash_bucket(v, 97, chunk=k, seed=9)
        assert torch.equal(out[:, 3 * k : 3 * k + 3], t[rows])
    assert torch.equal(out[:, 36:], t[salted_hash_bucket(v, 97, feature=1, seed=9)])


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_padding_gives_zeros_and_no_gradient(impl):
    t = torch.randn(11, 4, requires_grad=True)
    values = [torch.tensor([PAD, 3]), (torch.tensor([PAD, PAD, 5]), torch.tensor([0, 2, 3]))]
    out = multiplexed_embedding_lookup(t, values, chunks=[2, 1], padding_id=PAD, impl=impl)
    assert not out[0].any()
    out[0].sum().backward()
    assert not t.grad.any()
    # Not counted in the mean either.
    both = (torch.tensor([5, PAD, PAD]), torch.tensor([0, 3, 3]))
    out = multiplexed_embedding_lookup(t, [both, both], chunks=[1, 1], padding_id=PAD, impl=impl)
    assert torch.equal(out[0, :4], t[salted_hash_bucket(torch.tensor(5), 11)])


@pytest.mark.parametrize("combiner", table.multiplex.COMBINERS)
def test_sparse_gradients(combiner):
    values = batch_of(300)
    dense, sparse = tables_of(3, 400, 8), tables_of(3, 400, 8)
    grad = torch.randn(300, 8 * sum(CHUNKS))
    call = {"chunks": CHUNKS, "combiner": combiner, "padding_id": PAD}
    multiplexed_embedding_lookup(dense, values, **call).backward(grad)
    multiplexed_embedding_lookup(sparse, values, sparse=True, **call).backward(grad)
    for a, b in zip(dense, sparse):
        assert b.grad.is_sparse
        assert (b.grad._indices()[0].diff() > 0).all()  # though .grad forgets that it is coalesced
        assert torch.equal(b.grad.to_dense(), a.grad)
    optimizers = torch.optim.SparseAdam(sparse), torch.optim.SGD(sparse, lr=0.1)
    for optimizer in optimizers:
        optimizer.step()
    # A second step adds up, as for nn.Embedding(sparse=True).
    before = sparse[0].grad.to_dense().clone()
    multiplexed_embedding_lookup(sparse, values, sparse=True, **call).backward(grad)
    torch.testing.assert_close(sparse[0].grad.to_dense(), 2 * before)
    none = tables_of(1, 5, 2)[0]
    multiplexed_embedding_lookup(
        none, [torch.full((3,), PAD)], chunks=[1], padding_id=PAD, sparse=True
    ).sum().backward()
    assert none.grad._nnz() == 0


@pytest.mark.parametrize("sparse", [False, True])
def test_the_same_bits_for_any_number_of_threads(sparse):
    values = batch_of(6000)
    values[1] = torch.zeros(6000, dtype=torch.int64)  # one row is hit by everybody
    grad = torch.randn(6000, 4 * sum(CHUNKS))
    found = []
    for n in (1, 2, 5):
        torch.set_num_threads(n)
        tables = tables_of(2, 3000, 4)
        out = multiplexed_embedding_lookup(tables, values, chunks=CHUNKS, sparse=sparse)
        out.backward(grad)
        found.append([out, *(t.grad.to_dense() for t in tables)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


def test_law_permuting_the_samples_permutes_the_output():
    g = torch.Generator().manual_seed(4)
    v = torch.randint(0, 50, (200,), generator=g)
    order = torch.randperm(200, generator=g)
    t = torch.randn(31, 6)
    out = multiplexed_embedding_lookup(t, [v], chunks=[3])
    assert torch.equal(multiplexed_embedding_lookup(t, [v[order]], chunks=[3]), out[order])


def test_gradient_only_where_it_is_wanted():
    tables = tables_of(3, 20, 4)
    tables[1].requires_grad_(False)
    out = multiplexed_embedding_lookup(tables, [torch.arange(9)], chunks=[3])
    out.sum().backward()
    assert tables[1].grad is None
    assert tables[0].grad.sum() == tables[2].grad.sum() == 36
    with torch.no_grad():
        assert not multiplexed_embedding_lookup(tables, [torch.arange(9)], chunks=[3]).requires_grad


def test_gradcheck():
    tables = tables_of(2, 7, 3, torch.float64)
    values = batch_of(4)

    def lookup(*t):
        return multiplexed_embedding_lookup(
            t, values, chunks=CHUNKS, combiner="sqrtn", padding_id=PAD
        )

    assert torch.autograd.gradcheck(lookup, tables)
    found = lookup(*tables)
    with pytest.raises(RuntimeError, match="create_graph: expected False"):
        torch.autograd.grad(found.sum(), tables, create_graph=True)


def test_changes_between_forward_and_backward_are_noticed():
    t = tables_of(1, 7, 3)[0]
    v = torch.arange(5)
    out = multiplexed_embedding_lookup(t, [v], chunks=[1])
    v += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_rows_that_lie_apart():
    wide = torch.randn(30, 12)
    v = [torch.arange(10), torch.arange(20).reshape(10, 2)]
    for view in (wide[:, 2:6], wide[:, ::3], wide[:4].t()[:, 1:]):
        ours = multiplexed_embedding_lookup(view, v, chunks=[2, 1])
        assert torch.equal(ours, multiplexed_embedding_lookup(view.clone(), v, chunks=[2, 1]))


# -- the module


def test_module():
    embedding = UnifiedEmbedding({"user": 2, "tags": 1}, 100, 8, num_tables=2, seed=5, padding_id=0)
    assert [tuple(t.shape) for t in embedding.tables] == [(100, 8)] * 2
    assert embedding.tables[0].abs().max() <= 2 / 8**0.5
    assert embedding.output_dim == 24
    user, tags = torch.arange(6), torch.arange(12).reshape(6, 2)
    out = embedding({"tags": tags, "user": user})  # by name, not by order
    wanted = multiplexed_embedding_lookup(
        list(embedding.tables), [user, tags], chunks=[2, 1], seed=5, padding_id=0
    )
    assert torch.equal(out, wanted)
    parts = embedding.split(out)
    assert torch.equal(parts["user"], out[:, :16])
    assert torch.equal(parts["tags"], out[:, 16:])
    other = UnifiedEmbedding({"user": 2, "tags": 1}, 100, 8, num_tables=2, seed=5, padding_id=0)
    other.load_state_dict(embedding.state_dict())
    assert torch.equal(other({"user": user, "tags": tags}), out)
    assert "num_buckets=100, dim=8" in repr(embedding)
    out.sum().backward()
    assert all(t.grad is not None for t in embedding.tables)


# -- torch.compile


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_whole_equals_eager(backend, dynamic):
    def step(a, b, values, ragged_values, offsets, seed):
        return multiplexed_embedding_lookup(
            [a, b],
            [values, (ragged_values, offsets), values[:, None].expand(-1, 2)],
            chunks=[2, 1, 1],
            padding_id=PAD,
            seed=seed,
        )

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend, dynamic=dynamic)
    for batch in (4, 9, 1, 0):
        values = torch.arange(batch) - 8
        g = torch.Generator().manual_seed(batch)
        inputs = (values, *ragged(g, batch, 4), 2**64 - 1)
        eager, other = tables_of(2, 13, 4), tables_of(2, 13, 4)
        a, b = step(*eager, *inputs), compiled(*other, *inputs)
        assert torch.equal(a, b)
        grad = torch.randn(a.shape, generator=g)
        a.backward(grad)
        b.backward(grad)
        for x, y in zip(eager, other):
            assert torch.equal(x.grad, y.grad)


def test_module_compiles():
    embedding = UnifiedEmbedding({"a": 2, "b": 1}, 50, 4)
    batch = {"a": torch.arange(5), "b": torch.arange(10).reshape(5, 2)}
    torch.compiler.reset()
    assert torch.equal(
        torch.compile(embedding, fullgraph=True, backend="aot_eager")(batch), embedding(batch)
    )


@pytest.mark.parametrize("batch", [0, 1, 6])
@pytest.mark.parametrize("combiner", table.multiplex.COMBINERS)
def test_opcheck(batch, combiner):
    items = batch_of(batch)
    values = [v[0] if isinstance(v, tuple) else v for v in items]
    offsets = [v[1] if isinstance(v, tuple) else None for v in items]
    rest = (values, offsets, CHUNKS, combiner, PAD, -1)
    torch.library.opcheck(torch.ops.hotloop.multiplexed_lookup.default, (tables_of(2, 9, 4), *rest))
    grad = torch.randn(batch, 4 * sum(CHUNKS))
    torch.library.opcheck(
        torch.ops.hotloop.multiplexed_lookup_backward.default, (grad, *rest, 2, 9)
    )


# -- errors

T = torch.zeros(5, 2)
V = torch.arange(3)


def lookup(tables=T, values=(V,), **kw):
    return lambda: multiplexed_embedding_lookup(tables, values, **({"chunks": [1]} | kw))


ERRORS = {
    ValueError: [
        (lookup([]), "tables: expected one tensor (M, d) or several, got none"),
        (lookup(T[0]), "tables: expected 2 dimension(s), got shape (2,)"),
        (lookup(T[:0]), "tables: expected at least one row …, got shape (0, 2)"),
        (lookup([T, T[:4]]), "tables: expected (5, 2) float32 like …, got (4, 2)"),
        (lookup([T, T.double()]), "tables: expected …, got (5, 2) float64"),
        (lookup([T, T.to("meta")]), "tables: expected device cpu like tables[0]"),
        (lookup(values=V), "values: expected a sequence …, got a tensor"),
        (lookup(values=[]), "values: expected a sequence …, got none"),
        (lookup(values=[V[None, None]]), "values[0]: expected shape (B,)"),
        (lookup(values=[(V[None], V)]), "values[0]: expected …got (1, 3) and (3,)"),
        (lookup(values=[(V, V, V)]), "values[0]: expected (values, offsets), got a"),
        (lookup(values=[V.to("meta")]), "values[0]: expected device cpu like tables"),
        (
            lookup(values=[V, V[:2]], chunks=[1, 1]),
            "values[1]: expected 3 samples like values[0], got 2. Offsets are one more",
        ),
        (
            lookup(values=[(V, torch.tensor([0, 2, 1, 3]))]),
            "offsets: expected offsets that rise from 0 to the number of values, 3, got 1 at [2]",
        ),
        (lookup(values=[(V, torch.tensor([1, 3]))]), "offsets: …got 1 at [0]"),
        (lookup(values=[(V, torch.tensor([0, 2]))]), "offsets: …got 2 at [1]"),
        (lookup(values=[(V, torch.tensor([0, 9]))]), "offsets: …got 9 at [1]"),
        (lookup(chunks=[1, 2]), "chunks: expected one number for each of 1 features"),
        (lookup(chunks=1), "chunks: expected one number for each of 1 features, got 1"),
        (lookup(chunks=[0]), "chunks: expected an integer >= 1, got 0"),
        (lookup(combiner="max"), "combiner: expected one of sum, mean, sqrtn, got 'max'"),
        (lookup(seed=-1), "seed: expected an integer >= 0"),
        (lookup(impl="fast"), "impl: expected one of auto, reference"),
    ],
    TypeError: [
        (lookup(T.long()), "tables: expected dtype float32, …, got int64"),
        (lookup(values=[[1]]), "values[0]: expected a torch.Tensor, got list"),
        (lookup(values=[V.float()]), "values[0]: expected dtype int64, int32, got fl"),
        (lookup(values=[(V, V.float())]), "values[0] offsets: expected dtype int64"),
        (lookup(padding_id=1.5), "padding_id: expected an integer, got float"),
    ],
    NotImplementedError: [(lookup(impl="cuda"), "no implementation fits tables (5, 2) float32")],
}


@pytest.mark.parametrize(("error", "call", "text"), grouped(ERRORS))
def test_errors(error, call, text):
    with refused(f"[multiplexed_embedding_lookup] {text}", error):
        call()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: UnifiedEmbedding({}, 5, 2), r"features: expected a chunk count by name, got none"),
        (lambda: UnifiedEmbedding({"a": 0}, 5, 2), r"features\['a'\]: expected an integer >= 1"),
        (lambda: UnifiedEmbedding({"a": 1}, 0, 2), r"num_buckets: expected an integer >= 1, got 0"),
        (lambda: UnifiedEmbedding({"a": 1}, 5, 0), r"dim: expected an integer >= 1, got 0"),
        (lambda: UnifiedEmbedding({"a": 1}, 5, 2, num_tables=0), r"num_tables: expected an int"),
        (
            lambda: UnifiedEmbedding({"a": 1}, 5, 2, combiner="max"),
            r"combiner: expected one of sum",
        ),
        (lambda: UnifiedEmbedding({"a": 1}, 5, 2, seed=-1), r"seed: expected an integer >= 0"),
        (
            lambda: UnifiedEmbedding({"a": 1, "b": 1}, 5, 2)({"a": V, "c": V}),
            r"batch: expected features a, b, got a, c\. Pass every feature once",
        ),
    ],
)
def test_module_errors(call, text):
    with pytest.raises(ValueError, match=rf"^\[UnifiedEmbedding\] {text}"):
        call()


def test_sparse_is_refused_under_compile():
    torch.compiler.reset()
    compiled = torch.compile(lookup(sparse=True), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"sparse: expected False under torch\.compile"):
        compiled()
