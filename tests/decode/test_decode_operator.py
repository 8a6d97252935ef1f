# SPDX-License-Identifier: Apache-2.0
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
from test_catalog_compiles import operators as operators_of


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
            found, wanted = compiled(*arguments), steps(*arguments)
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("batch", [0, 1, 4])
@pytest.mark.parametrize("seed", ["number", "array"])
def test_opcheck(seed, batch):
    """Of laws from logits with numbers for each request; tests/test_catalog_compiles.py has probabilities."""
    names = ("target", "draft", "ids", "lengths", "seed", "temperature")
    values = (
        *inputs(batch),
        torch.arange(batch) % 4,
        torch.arange(batch),
        torch.full((batch,), 0.8),
    )
    found = operators_of(
        steps, dict(zip(names, values)) | ({"seed": 3} if seed == "number" else {})
    )
    assert len(found) == 7
    for operator, args, kwargs in found:
        torch.library.opcheck(operator, args, kwargs)


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
