"""What torch.compile sees of the room: registered operators with the same tokens as the eager call."""

import pytest
import torch
from hotloop.decode import (
    Logits,
    Probs,
    block_speculative_sampling,
    chain_speculative_sampling,
    greedy_speculative_accept,
    sample,
    speculative_streaming_verify,
    tree_speculative_verify,
)
from hotloop.decode import _operators as operators


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
                for a, b in zip(ours, theirs):
                    assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(0, 3), (1, 0), (4, 3)])
@pytest.mark.parametrize("seeded", ["number", "array"])
def test_opcheck(shape, seeded):
    batch, drafts = shape
    target, draft, ids = inputs(batch, drafts)
    seed = 3 if seeded == "number" else torch.arange(batch)
    stream = (*operators._stream(seed, 0), "cpu")
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
