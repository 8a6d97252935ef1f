# SPDX-License-Identifier: Apache-2.0
"""Draws without a seed: other ones in every call, ruled by the generator of the arrays' library."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import hotloop.decode as d
import hotloop.reference.decode as reference
import numpy as np
import pytest
import torch
from decode_calls import CALLS, refused
from decode_cases import assert_law, assert_rejected, histogram, softmax
from hotloop.decode import Logits, sample

WIDE = 4096
FLAT = np.zeros((4, WIDE), np.float32)
# What tells two calls apart, for each op that draws: 4 requests over a flat law of 4096 tokens.
FLAT_ROWS = np.zeros((4, 3, WIDE), np.float32)
IDS = np.zeros((4, 2), np.int64)


def by_op(like: Callable[[Any], Any]) -> dict[str, Callable[..., Any]]:
    """Every op that draws, as a function of (seed, impl)."""
    z, ids, rows = like(FLAT), like(IDS), like(FLAT_ROWS)
    near = like(np.arange(1, WIDE + 1, dtype=np.int32)[:, None] % WIDE)
    paths = like(np.zeros((4, 1, 3), np.int64))
    return {
        "sample": lambda **how: d.sample(Logits(z), **how).token_ids,
        "chain_speculative_sampling": lambda **how: (
            d.chain_speculative_sampling(None, ids, Logits(rows), **how).output_token_ids
        ),
        "block_speculative_sampling": lambda **how: (
            d.block_speculative_sampling(None, ids, Logits(rows), **how).output_token_ids
        ),
        "speculative_streaming_verify": lambda **how: (
            d.speculative_streaming_verify(
                Logits(like(FLAT_ROWS[:, :2, None] + np.eye(WIDE, dtype=np.float32)[0] * 20)),
                ids,
                Logits(rows),
                **how,
            ).output_token_ids
        ),
        "tree_speculative_verify": lambda **how: (
            d.tree_speculative_verify(
                ids, like(np.array([[-1, -1]] * 4)), Logits(rows), **how
            ).output_token_ids
        ),
        "lantern_relaxed_accept": lambda **how: (
            d.lantern_relaxed_accept(
                None, ids, Logits(rows), near, delta=0.0, **how
            ).output_token_ids
        ),
        "typical_accept": lambda **how: (
            d.typical_accept(
                paths, Logits(like(FLAT_ROWS[:, None])), epsilon=1.0, alpha=1e9, **how
            ).output_token_ids
        ),
    }


OPS = tuple(by_op(lambda x: x))
LIBRARIES: dict[str, tuple[Callable[[Any], Any], Callable[[int], Any], Callable[[int], Any]]] = {
    # The arrays, how the library's generator is seeded, and a generator of its own.
    "numpy": (lambda x: x, np.random.seed, np.random.default_rng),
    "torch": (
        lambda x: torch.from_numpy(np.ascontiguousarray(x)),
        torch.manual_seed,
        lambda seed: torch.Generator().manual_seed(seed),
    ),
}


def tokens(call: Callable[..., Any], **how: Any) -> list[Any]:
    return call(**how).tolist()  # type: ignore[no-any-return]


def test_every_op_that_draws_is_here_and_none_has_a_seed_of_its_own() -> None:
    drawing = {
        name
        for name, f in vars(d).items()
        if inspect.isfunction(f) and "seed" in inspect.signature(f).parameters
    }
    assert drawing == set(OPS) | {"mcts_star_step", "puct_select_backup"} & drawing
    for name in drawing:
        for place in (d, reference):
            assert inspect.signature(getattr(place, name)).parameters["seed"].default is None


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("op", OPS)
def test_calls_differ_and_the_library_rules_them(op: str, impl: str, library: str) -> None:
    like, seeded, own = LIBRARIES[library]
    call = by_op(like)[op]
    seeded(1)
    first, second = tokens(call, impl=impl), tokens(call, impl=impl)
    assert first != second
    assert len({str(row) for row in first}) > 1, "requests of one call draw apart"
    seeded(1)
    assert [tokens(call, impl=impl), tokens(call, impl=impl)] == [first, second]
    seeded(2)
    assert tokens(call, impl=impl) != first
    # Both implementations take the same seeds, and a generator is asked in each call.
    other = {"cpu": "reference", "reference": "cpu"}[impl]
    seeded(1)
    assert tokens(call, impl=other) == first
    g = own(7)
    third, fourth = tokens(call, impl=impl, seed=g), tokens(call, impl=impl, seed=g)
    assert third != fourth
    assert tokens(call, impl=impl, seed=own(7)) == third
    # A seed makes the call a function of its arguments, and leaves the library's generator alone.
    seeded(1)
    assert tokens(call, impl=impl, seed=5) == tokens(call, impl=impl, seed=5)
    assert tokens(call, impl=impl) == first


def test_numpy_takes_the_old_generators_too() -> None:
    one, two = (sample(Logits(FLAT), seed=np.random.RandomState(3)).token_ids for _ in range(2))
    assert one.tolist() == two.tolist()


def test_a_refused_call_takes_nothing_from_the_generator() -> None:
    np.random.seed(1)
    first = sample(Logits(FLAT)).token_ids.tolist()
    np.random.seed(1)
    with pytest.raises(NotImplementedError):
        sample(Logits(FLAT), impl="triton")
    with pytest.raises(ValueError, match="offset"):
        sample(Logits(FLAT), offset=-1)
    assert sample(Logits(FLAT)).token_ids.tolist() == first


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_loop_without_a_seed_follows_the_law(library: str) -> None:
    """Two successive calls of two requests each: four tokens that know nothing of each other."""
    like, seeded, _ = LIBRARIES[library]
    z = np.array([[0.0, 1.0, -1.0]], np.float32)
    law = Logits(like(np.repeat(z, 2, 0)))
    p = softmax(z)[0]
    joint = np.einsum("a,b,c,d->abcd", p, p, p, p)
    seeded(11)
    calls = [np.asarray(sample(law).token_ids) for _ in range(40000)]
    pairs = np.array(calls).reshape(-1, 4)
    assert_law(histogram(pairs, 3), joint, least=20000)
    # The control: one seed throughout, as the default once was.
    same = np.array([np.asarray(sample(law, seed=0).token_ids) for _ in range(2000)]).reshape(-1, 4)
    assert_rejected(histogram(same, 3), joint)


@pytest.mark.parametrize("op", OPS)
def test_generators_of_another_library_are_refused(op: str) -> None:
    refused(
        op,
        TypeError,
        rf"^\[{op}\] seed: expected a numpy.random.Generator for NumPy arrays, got torch.*Generator. Use",
        {"seed": torch.Generator()},
    )
    base = {k: torch.from_numpy(v) for k, v in CALLS[op][1].items()}
    with pytest.raises(
        TypeError,
        match=rf"^\[{op}\] seed: expected a torch.Generator for torch tensors, got numpy.*Generator. Use",
    ):
        CALLS[op][0](**base, seed=np.random.default_rng(0))


def test_a_generator_of_another_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere(torch.Generator):
        device = torch.device("cuda", 0)  # type: ignore[assignment]

    match = r"^\[sample\] seed: expected a generator on cpu like the other arrays, got one on cuda:0. Use"
    with pytest.raises(ValueError, match=match):
        sample(Logits(torch.zeros(2, 5)), seed=Elsewhere())


def compiled_draws(z: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor) -> Any:
    law = Logits(rows)
    parents = torch.arange(ids.shape[1]).expand_as(ids) - 1
    return (
        sample(Logits(z)).token_ids,
        sample(Logits(z)).token_ids,
        d.chain_speculative_sampling(None, ids, law).output_token_ids,
        d.block_speculative_sampling(None, ids, law).output_token_ids,
        d.tree_speculative_verify(ids, parents, law).output_token_ids,
    )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_graph_draws_anew_in_every_run(backend: str, dynamic: bool) -> None:
    torch.compiler.reset()
    compiled = torch.compile(compiled_draws, fullgraph=True, backend=backend, dynamic=dynamic)
    arguments = [torch.from_numpy(x) for x in (FLAT, IDS, FLAT_ROWS)]
    torch.manual_seed(1)
    first = [x.tolist() for x in compiled(*arguments)]
    second = [x.tolist() for x in compiled(*arguments)]
    assert all(a != b for a, b in zip(first, second))
    assert first[0] != first[1], "two calls in one graph"
    torch.manual_seed(1)
    assert [x.tolist() for x in compiled(*arguments)] == first
    if backend != "inductor":  # which has random numbers of its own
        torch.manual_seed(1)
        assert [x.tolist() for x in compiled_draws(*arguments)] == first


def test_a_generator_is_refused_under_compile() -> None:
    torch.compiler.reset()
    g = torch.Generator()
    compiled = torch.compile(
        lambda z: sample(Logits(z), seed=g).token_ids, backend="eager", fullgraph=True
    )
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match=r"\[sample\] seed: expected None, an int"
    ):
        compiled(torch.zeros(2, 5))
