"""What torch.compile sees of the room: registered operators with the same tokens as the eager call."""

import pytest
import torch
from hotloop.decode import (
    Logits,
    Probs,
    block_speculative_sampling,
    chain_speculative_sampling,
    greedy_speculative_accept,
    operators,
    sample,
    speculative_streaming_verify,
    tree_speculative_verify,
)


def inputs(batch: int, drafts: int = 3, vocabulary: int = 50):
    g = torch.Generator().manual_seed(batch)
    target = torch.randn(batch, drafts + 1, vocabulary, generator=g)
    draft = target[:, :drafts] + 0.5 * torch.randn(batch, drafts, vocabulary, generator=g)
    ids = torch.randint(0, vocabulary, (batch, drafts), generator=g)
    return target, draft, ids


def steps(target, draft, ids, lengths, seed, temperature):
    """Every operator once."""
    parents = torch.arange(ids.shape[1]).expand_as(ids) - 1
    law = Logits(target, temperature=temperature, top_k=20, top_p=0.9)
    wide = torch.cat([draft, draft[:, -1:]], 1)
    return (
        sample(Logits(target[:, 0], temperature=0.7, min_p=0.05), seed=seed),
        sample(Probs(target.softmax(-1), top_p=0.8), seed=seed, offset=7),
        chain_speculative_sampling(
            Logits(draft, temperature=temperature), ids, law, num_draft_tokens=lengths, seed=seed
        ),
        block_speculative_sampling(None, ids, law, seed=seed),
        speculative_streaming_verify(Logits(draft[:, None]), ids, law, seed=seed),
        greedy_speculative_accept(ids, target),
        tree_speculative_verify(ids, parents, law, Logits(wide), max_depth=2, seed=seed),
    )


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_whole_equals_eager(backend, dynamic):
    torch.compiler.reset()
    compiled = torch.compile(steps, fullgraph=True, backend=backend, dynamic=dynamic)
    for batch in (2, 3, 5):
        target, draft, ids = inputs(batch)
        lengths = torch.arange(batch) % 4
        for seed in (1, 9, 2**63 + 5, torch.arange(batch)):
            arguments = (target, draft, ids, lengths, seed, torch.full((batch,), 0.8))
            for ours, theirs in zip(compiled(*arguments), steps(*arguments)):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(0, 3), (1, 0), (4, 3)])
@pytest.mark.parametrize("seeded", ["number", "array"])
def test_opcheck(shape, seeded):
    batch, drafts = shape
    target, draft, ids = inputs(batch, drafts)
    seed = 3 if seeded == "number" else torch.arange(batch)
    stream = (*operators._stream("sample", seed, 0, target), "cpu")
    law = operators._take_apart(Logits(target, temperature=0.5, top_k=5))
    drafts_law = operators._take_apart(Logits(draft))
    torch.library.opcheck(torch.ops.hotloop.decode_sample.default, (*law, *stream))
    for mode in ("chain", "block", "greedy"):
        torch.library.opcheck(
            torch.ops.hotloop.decode_chain.default, (mode, ids, *law, *drafts_law, None, *stream)
        )
    parents = torch.arange(drafts).expand(batch, drafts) - 1
    nothing = (None, [], [], "")
    torch.library.opcheck(
        torch.ops.hotloop.decode_tree.default,
        (ids, parents, *law, *nothing, False, None, drafts, *stream),
    )


def test_a_law_survives_being_taken_apart():
    law = Logits(
        torch.randn(2, 5),
        temperature=torch.tensor([0.5, 2.0]),
        top_k=3,
        top_p=0.9,
        min_p=torch.tensor([0.1, 0.0]),
        filter_order="joint",
        reference=torch.randn(2, 5),
        mixture=0.25,
        bias_ids=torch.tensor([[1], [2]]),
        bias=torch.tensor([[1.0], [2.0]]),
    )
    assert operators._put_together(*operators._take_apart(law)) == law
    plain = Probs(torch.rand(2, 5), top_k=torch.tensor([1, 2]))
    assert operators._put_together(*operators._take_apart(plain)) == plain


DEFAULTS = {
    "sample": lambda z, ids: sample(Logits(z[:, 0])),
    "chain": lambda z, ids: chain_speculative_sampling(None, ids, Logits(z)),
    "block": lambda z, ids: block_speculative_sampling(z[:, :3].softmax(-1), ids, z.softmax(-1)),
    "streams": lambda z, ids: speculative_streaming_verify(
        z[:, :3, None].softmax(-1), ids, z.softmax(-1)
    ),
    "greedy": lambda z, ids: greedy_speculative_accept(ids, z),
    "tree": lambda z, ids: tree_speculative_verify(ids, torch.zeros_like(ids) - 1, Logits(z)),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("op", DEFAULTS)
def test_defaults_compile(op, dynamic):
    torch.compiler.reset()
    call = DEFAULTS[op]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (2, 3):
        target, _, ids = inputs(batch)
        torch.manual_seed(1)
        found = compiled(target, ids)
        torch.manual_seed(1)
        torch.testing.assert_close(found, call(target, ids), rtol=0, atol=0)


@pytest.mark.parametrize("dynamic", [False, True])
def test_numbers_of_a_law_may_be_inputs_of_the_graph(dynamic):
    """Floats and integers become symbols there: the graph does not keep those of its first run."""
    torch.compiler.reset()

    def call(z, temperature, top_k, top_p, seed, offset):
        law = Logits(z, temperature=temperature, top_k=top_k, top_p=top_p)
        return sample(law, seed=seed, offset=offset).token_ids

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    target = inputs(5)[0]
    for numbers in ((0.7, 5, 0.9, 7, 3), (0.8, 6, 0.95, 8, 4), (1e-40, 40, 1.0, 8, 5)):
        assert torch.equal(compiled(target, *numbers), call(target, *numbers))
