# SPDX-License-Identifier: Apache-2.0
"""The CUDA loops: the tokens of the CPU, without a wait, in graphs and on streams, and by the law."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from decode_cases import assert_law, assert_rejected, softmax
from gpu_cases import captured, no_waiting
from helpers import misaligned
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
from hotloop.front import impl, native
from test_decode_same_tokens import FLOATS, SHAPES, Inputs, calls, relaid, same, strided_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(native.cuda is None, reason="hotloop._cuda is not compiled"),
]

VERIFIERS = (chain_speculative_sampling, block_speculative_sampling, speculative_streaming_verify)
OPS = (*VERIFIERS, tree_speculative_verify, greedy_speculative_accept, sample)

# As in SHAPES; and of real size: more requests than multiprocessors, and few, for which a team is many blocks.
# 128257: no row but the first starts at a multiple of 16 bytes.
LARGE = [(1, 4, 128_257), (8, 4, 32_000), (70, 3, 32_003), (300, 2, 5_000)]


def moved(x: Any) -> Any:
    return relaid(x, lambda t: t.cuda())


def there(op: Callable[..., Any], arguments: Any, keywords: Any, **more: Any) -> Any:
    """Call ``op`` with its arrays on the GPU; results there, too."""
    found = op(
        *map(moved, arguments),
        **{name: moved(x) for name, x in keywords.items()},
        impl="cuda",
        **more,
    )
    assert impl.last_impl(op.__name__) == "cuda"
    return found


def back(outputs: Any) -> Any:
    return type(outputs)(*(x.cpu() for x in outputs))


def drawing(x: Inputs, ids: str) -> list[tuple[Any, ...]]:
    """The calls that have CUDA loops; candidate paths have none."""
    made = [call for call in calls(x, ids) if call[0] in OPS]
    return [c for c in made if c[0] is not greedy_speculative_accept or c[1][0].ndim == 2]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("b", "k", "v"), SHAPES)
def test_as_on_the_cpu(b: int, k: int, v: int, dtype: str) -> None:
    for op, arguments, keywords in drawing(Inputs(b, k, v, dtype), "int32" if b == 1 else "int64"):
        wanted = op(*arguments, **keywords, impl="cpu")
        same(back(there(op, arguments, keywords)), wanted, op.__name__)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("b", "k", "v"), LARGE)
def test_as_on_the_cpu_at_full_size(b: int, k: int, v: int, dtype: str) -> None:
    rng = np.random.default_rng([b, k, v])
    z = torch.from_numpy(3 * rng.normal(size=(b, k + 1, v))).to(getattr(torch, dtype))
    q = (z[:, :k].float() + 0.5 * torch.from_numpy(rng.normal(size=(b, k, v)))).to(z.dtype)
    # Tokens of the draft's own: about half of them are accepted.
    x = sample(Logits(q), seed=3, impl="cpu").token_ids
    made: list[tuple[Any, ...]] = []
    for how in (
        {},
        {"temperature": 0.7, "top_k": 50},
        {"top_p": 0.9},
        {"top_k": 400, "top_p": 0.8, "min_p": 0.01},
    ):
        law, draft = Logits(z, **how), Logits(q, **how)
        made += [
            (sample, (law,), {"seed": 1}),
            (chain_speculative_sampling, (draft, x, law), {"seed": 2}),
            (block_speculative_sampling, (draft, x, law), {"seed": 3}),
            (chain_speculative_sampling, (None, x, law), {"seed": 4}),
        ]
    made.append((greedy_speculative_accept, (z[:, :k].float().argmax(-1), z), {}))
    accepted = 0
    for op, arguments, keywords in made:
        wanted = op(*arguments, **keywords, impl="cpu")
        same(back(there(op, arguments, keywords)), wanted, op.__name__)
        accepted += int(wanted.num_accepted.sum()) if hasattr(wanted, "num_accepted") else 0
    assert accepted > 0


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("how", [strided_rows, misaligned])
def test_layouts(how: Callable[[torch.Tensor], torch.Tensor], dtype: str) -> None:
    """Rows any distance apart, and arrays off by one element."""

    def lay(x: Any) -> Any:
        return relaid(moved(x), how, 2 if how is strided_rows else 1)

    for op, arguments, keywords in drawing(Inputs(3, 4, 513, dtype), "int64"):
        wanted = op(*arguments, **keywords)
        found = op(*map(lay, arguments), **{name: lay(x) for name, x in keywords.items()})
        same(back(found), wanted, op.__name__)


def test_nothing_waits_for_the_device() -> None:
    for op, arguments, keywords in drawing(Inputs(3, 4, 513, "bfloat16"), "int64"):
        ready, more = [moved(x) for x in arguments], {n: moved(x) for n, x in keywords.items()}
        wanted = op(*ready, **more)
        torch.cuda.synchronize()
        with no_waiting():
            found = op(*ready, **more)
        same(back(found), back(wanted), op.__name__)


def test_no_memory_stays_after_a_call() -> None:
    z = torch.randn(4, 32_000, device="cuda")
    sample(Logits(z), seed=1)  # allocates the workspace
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for seed in range(20):
        sample(Logits(z, top_k=50), seed=seed)
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("b", [1, 4, 300])
def test_graphs(b: int) -> None:
    """A captured step draws anew when its seeds change, and as the eager call does."""
    x = Inputs(b, 4, 2048, "bfloat16")
    law, draft, tokens = moved(Logits(x.logits(5))), moved(Logits(x.logits(4))), moved(x.ids(4))
    seed = torch.zeros(b, dtype=torch.int64, device="cuda")

    def step() -> tuple[Any, ...]:
        rows = Logits(law.values[:, 0], top_k=20, top_p=0.9)
        return (
            *chain_speculative_sampling(draft, tokens, law, seed=seed),
            *block_speculative_sampling(draft, tokens, law, seed=seed),
            *sample(rows, seed=seed),
        )

    graph, filled = captured(step)
    seen = set()
    for value in (5, 6, 7, 5):
        seed.fill_(value).add_(torch.arange(b, device="cuda"))
        graph.replay()
        replayed = [t.clone() for t in filled]
        torch.testing.assert_close(replayed, step(), rtol=0, atol=0)
        seen.add(tuple(replayed[0].flatten().tolist()))
    assert len(seen) > 1


def test_streams_side_by_side() -> None:
    z = torch.randn(2, 128_256, device="cuda")
    wanted = [sample(Logits(z, top_p=0.9), seed=seed).token_ids for seed in range(40)]
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    found: list[Any] = []
    for seed in range(40):
        with torch.cuda.stream(streams[seed % 4]):
            found.append(sample(Logits(z, top_p=0.9), seed=seed).token_ids)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_sizes_in_turn_share_a_workspace() -> None:
    """Teams of other sizes, other widths and biases, over and over: what one leaves the next one finds."""
    made = [
        (op, [moved(a) for a in arguments], {n: moved(a) for n, a in keywords.items()})
        for b, k, v in ((1, 4, 5000), (3, 1, 700), (40, 2, 5000), (300, 2, 64), (1, 0, 40_000))
        for op, arguments, keywords in drawing(Inputs(b, k, v, "float32"), "int64")
    ]
    wanted = [back(op(*arguments, **keywords)) for op, arguments, keywords in made]
    for _ in range(5):
        for (op, arguments, keywords), before in zip(made, wanted, strict=True):
            same(back(op(*arguments, **keywords)), before, op.__name__)


def test_calls_without_a_seed_draw_anew_without_a_sync() -> None:
    """From torch's generator of the device: ruled by manual_seed, and anew at every replay of a graph."""
    z = torch.zeros(8, 50_000, device="cuda")
    sample(Logits(z))  # the workspace and the kernel are there
    torch.cuda.synchronize()
    with no_waiting():
        torch.manual_seed(1)
        first, second = (sample(Logits(z)).token_ids for _ in range(2))
        torch.manual_seed(1)
        again = sample(Logits(z)).token_ids
        g, same_again = (torch.Generator("cuda").manual_seed(2) for _ in range(2))
        own, own_again = (sample(Logits(z), seed=x).token_ids for x in (g, same_again))
    assert not torch.equal(first, second)
    assert torch.equal(first, again)
    assert torch.equal(own, own_again)
    assert len(set(first.tolist())) > 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = sample(Logits(z)).token_ids
    replays = []
    for _ in range(2):
        graph.replay()
        replays.append(drawn.tolist())
    assert replays[0] != replays[1]


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_every_temperature_has_a_law(dtype: str) -> None:
    z = torch.tensor([[1.0, 5.0, 4.0, 5.0]] * 512, dtype=getattr(torch, dtype))
    for temperature in (5e-324, 1e-45, 1e-40, float(np.finfo(np.float32).tiny), 1e38, 1e300):
        law = Logits(z, temperature=temperature)
        here = sample(law, seed=1)
        there = sample(Logits(z.cuda(), temperature=temperature), seed=1, impl="cuda")
        assert torch.equal(here.token_ids, there.token_ids.cpu())


def test_draws_follow_the_law() -> None:
    """Chi-square over 2^20 draws; a law that is a little off must be found out."""
    n, v = 2**20, 50
    z = 2 * np.random.default_rng(0).normal(size=v).astype(np.float32)
    rows = torch.from_numpy(z).cuda().expand(n, v)
    law = softmax(z)
    counts = np.bincount(sample(Logits(rows), seed=1, impl="cuda").token_ids.cpu(), minlength=v)
    assert_law(counts, law)
    assert_rejected(counts, softmax(1.01 * z))


def test_verified_tokens_follow_the_targets_law() -> None:
    n, v = 2**20, 12
    rng = np.random.default_rng(1)
    z, w = rng.normal(size=(2, v)).astype(np.float32)
    target = torch.from_numpy(z).cuda().expand(n, 2, v)
    draft = torch.from_numpy(w).cuda().expand(n, 1, v)
    x = sample(Logits(draft), seed=2, impl="cuda").token_ids
    for op in (chain_speculative_sampling, block_speculative_sampling):
        first = (
            op(Logits(draft), x, Logits(target), seed=3, impl="cuda").output_token_ids[:, 0].cpu()
        )
        assert_law(np.bincount(first, minlength=v), softmax(z))
    # As if the draft had been certain: then its own law shows through.
    wrong = chain_speculative_sampling(
        Logits(draft, temperature=0.5), x, Logits(target), seed=3, impl="cuda"
    ).output_token_ids[:, 0]
    assert_rejected(np.bincount(wrong.cpu(), minlength=v), softmax(z))


def test_a_token_of_probability_0_is_never_emitted() -> None:
    n, v = 2**20, 8
    p = torch.tensor([0.0, 0.3, 0.0, 0.2, 0.5, 0.0, 0.0, 0.0], device="cuda")
    q = torch.full((v,), 1 / v, device="cuda")
    x = torch.arange(n, device="cuda").remainder(v)[:, None]
    done = chain_speculative_sampling(
        Probs(q.expand(n, 1, v)), x, Probs(p.expand(n, 2, v)), seed=5, impl="cuda"
    )
    emitted = done.output_token_ids[done.output_token_ids >= 0]
    assert set(emitted.unique().tolist()) == {1, 3, 4}


def test_an_array_on_another_device_is_refused() -> None:
    z = torch.randn(2, 10, device="cuda")
    with pytest.raises((ValueError, TypeError), match="cuda"):
        sample(Logits(z, temperature=torch.ones(2)), impl="cuda")


@pytest.mark.big
def test_rows_beyond_2_to_the_31_elements() -> None:
    n, v = 16_800, 128_256
    assert n * v > 2**31
    z = torch.zeros(n, v, dtype=torch.bfloat16, device="cuda")
    at = torch.arange(n, device="cuda") * 7 % v
    z[torch.arange(n, device="cuda"), at] = 50.0
    assert torch.equal(sample(Logits(z), seed=1, impl="cuda").token_ids, at)
    found = greedy_speculative_accept(
        at[:-1, None].reshape(-1, 1), z[:-1].unsqueeze(1).expand(-1, 2, -1)
    )
    assert torch.equal(found.num_accepted, torch.ones_like(found.num_accepted))
