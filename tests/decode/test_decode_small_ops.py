# SPDX-License-Identifier: Apache-2.0
"""Laws, log-probabilities, steered logits, temperatures and branches, against float64 NumPy and their own laws."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from decode_cases import Mode, renormalised, softmax
from helpers import assert_no_worse_than_torch
from hotloop.decode import (
    Logits,
    Probs,
    Verified,
    block_speculative_sampling,
    chain_speculative_sampling,
    entropy_adaptive_temperature,
    geometric_mixture_logits,
    greedy_speculative_accept,
    law_probs,
    mirror_sd_branch_reuse,
    sample,
    top_logprobs,
    typical_accept,
    value_augmented_law,
    value_augmented_logits,
)
from hypothesis import given, settings
from hypothesis import strategies as st

IMPLS = ("cpu", "reference")
GRID = [(1, 1), (3, 7), (4, 511), (2, 513), (2, 1500)]
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
by_impl = pytest.mark.parametrize("impl", IMPLS)
few = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return 2 * np.random.default_rng([seed, *shape]).normal(size=shape)


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = np.asarray(z, np.float64)
    top = z.max(-1, keepdims=True)
    return z - top - np.log(np.exp(z - top).sum(-1, keepdims=True))


MODES = [
    Mode(),
    Mode(temperature=0.6),
    Mode(temperature=1.7, top_k=4),
    Mode(top_p=0.77),
    Mode(min_p=0.07),
    Mode(top_k=5, top_p=0.66, min_p=0.02),
    Mode(top_k=5, top_p=0.66, filter_order="joint"),
    Mode(temperature=0),
]


@by_impl
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_law_probs(mode: Mode, dtype: torch.dtype, impl: str) -> None:
    """Every token within 2^-22 of the largest weight: float32 exponentials, whole multiples of 2^-42, sums exact."""
    for b, v in GRID[:3]:
        z = torch.from_numpy(normal(b, v)).to(dtype)
        wanted = mode.law(z.double().numpy())
        found = law_probs(Logits(z, **mode.arguments()), impl=impl)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        p = found.double().numpy()
        assert np.array_equal(p > 0, wanted > 2.0**-43 * wanted.max(-1, keepdims=True))
        np.testing.assert_allclose(p, wanted, rtol=3e-6, atol=2.0**-40)
        np.testing.assert_allclose(p.sum(-1), 1, rtol=0, atol=1e-6)


@by_impl
@pytest.mark.parametrize(("b", "v"), GRID)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_law_probs_is_no_worse_than_torch(b: int, v: int, dtype: torch.dtype, impl: str) -> None:
    z = torch.from_numpy(normal(b, v)).to(dtype)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    # The exponentials are float32 for float64 logits too; the weights are multiples of 2^-42.
    eps = 3e-7
    assert_no_worse_than_torch(
        law_probs(Logits(z), impl=impl), z.to(compute).softmax(-1), z.double().softmax(-1), eps=eps
    )


@by_impl
@pytest.mark.parametrize("v", [7, 1500, 100_000])
def test_the_law_is_within_its_distance_of_the_softmax(v: int, impl: str) -> None:
    """Total variation from the exact law: 2^-23 for exponentials in float32, V 2^-43 for weights on a grid."""
    for sharp in (0.1, 1.0, 6.0):
        z = sharp * np.random.default_rng(v).normal(size=(2, v))
        found = law_probs(Logits(z), impl=impl)
        distance = 0.5 * np.abs(found - softmax(z)).sum(-1)
        assert (distance <= 2.0**-23 + v * 2.0**-43).all(), distance


@by_impl
def test_law_probs_of_probabilities(impl: str) -> None:
    p = np.random.default_rng(1).dirichlet(np.full(9, 0.4), size=(2, 3))
    assert np.array_equal(law_probs(p, impl=impl), p)
    assert np.array_equal(law_probs(p.astype(np.float32), impl=impl), p.astype(np.float32))
    kept = np.where(p >= np.sort(p, -1)[..., -3:-2], p, 0)
    cut = law_probs(Probs(p, top_k=3), impl=impl)
    np.testing.assert_allclose(cut, renormalised(kept), rtol=0, atol=1e-11)
    ties = law_probs(Probs(np.array([[0.3, 0.2, 0.2, 0.2, 0.1]]), top_k=2), impl=impl)
    np.testing.assert_allclose(ties, [[1 / 3, 2 / 9, 2 / 9, 2 / 9, 0]], rtol=0, atol=1e-11)
    assert not law_probs(Logits(np.full((1, 4), -np.inf)), impl=impl).any()


@few
@given(seed=seeds, v=st.integers(1, 40), shift=st.floats(-50, 50))
def test_laws_do_not_move_with_the_logits(seed: int, v: int, shift: float) -> None:
    """Adding a number to all logits changes no law; truncation keeps a set that does not grow."""
    z = np.random.default_rng(seed).normal(size=(2, v))
    z = np.round(z, 3)
    same = law_probs(Logits(z + round(shift)))
    np.testing.assert_allclose(law_probs(Logits(z)), same, rtol=1e-5, atol=1e-11)
    support = law_probs(Logits(z)) > 0
    for k in range(v, 0, -1):
        kept = law_probs(Logits(z, top_k=k)) > 0
        assert (kept <= support).all()
        assert (kept.sum(-1) >= 1).all()
        support = kept
    for top_p in (0.9, 0.5, 0.1, 1e-9):
        kept = law_probs(Logits(z, top_p=top_p)) > 0
        assert (kept.sum(-1) >= 1).all()
        mass = np.where(kept, softmax(z), 0).sum(-1)
        assert (mass >= top_p - 1e-6).all()
    assert np.array_equal(law_probs(Logits(z, min_p=1.0)) > 0, z == z.max(-1, keepdims=True))


@by_impl
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_top_logprobs(dtype: torch.dtype, impl: str) -> None:
    for b, v in GRID:
        z = torch.from_numpy(normal(b, v)).to(dtype)
        exact = log_softmax(z.double().numpy())
        for k in (0, 1, 3, v, v + 2):
            done = top_logprobs(Logits(z), k, impl=impl)
            order = np.argsort(-exact, axis=-1, kind="stable")[:, :k]
            wanted = np.take_along_axis(exact, order, -1)
            ids, found = done.token_ids.numpy(), done.logprobs.numpy()
            assert ids.shape == found.shape == (b, k)
            assert found.dtype == np.float32
            n = order.shape[1]
            assert np.array_equal(ids[:, :n], order)
            np.testing.assert_allclose(found[:, :n], wanted, rtol=1e-6, atol=1e-6)
            assert (ids[:, n:] == -1).all()
            assert (found[:, n:] == -np.inf).all()


@by_impl
def test_top_logprobs_of_a_truncated_law(impl: str) -> None:
    z = normal(3, 20)
    for mode in MODES[1:]:
        p = mode.law(z)
        done = top_logprobs(Logits(z, **mode.arguments()), 8, impl=impl)
        for row in range(3):
            size = min(8, int((p[row] > 0).sum()))
            order = np.argsort(-p[row], kind="stable")[:size]
            assert done.token_ids[row].tolist() == [*order, *[-1] * (8 - size)]
            np.testing.assert_allclose(done.logprobs[row, :size], np.log(p[row][order]), atol=2e-6)
    ties = top_logprobs(np.array([[0.2, 0.3, 0.2, 0.3]]), 3, impl=impl)
    assert ties.token_ids.tolist() == [[1, 3, 0]]


@by_impl
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("m", [0.0, 0.125, 0.5, 1.0])
def test_geometric_mixture(m: float, dtype: torch.dtype, impl: str) -> None:
    for b, v in GRID:
        x, y = (torch.from_numpy(normal(b, v, seed=s)).to(dtype) for s in (1, 2))
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        found = geometric_mixture_logits(x, y, mixture=m, impl=impl)
        plain = ((1 - m) * x.to(compute) + m * y.to(compute)).log_softmax(-1)
        truth = ((1 - m) * x.double() + m * y.double()).log_softmax(-1)
        # The log of a sum of weights of 2^-22 relative error each.
        assert_no_worse_than_torch(found, plain, truth, eps=3e-7)
        a, c = np.exp(log_softmax(x.double().numpy())), np.exp(log_softmax(y.double().numpy()))
        np.testing.assert_allclose(
            np.exp(found.double().numpy()), renormalised(a ** (1 - m) * c**m), rtol=1e-4, atol=1e-9
        )


@by_impl
def test_a_model_without_weight_has_no_say(impl: str) -> None:
    """Mixtures of 0 and 1 are the one model or the other, also where the other rules a token out."""
    x, y = normal(2, 5, seed=3), normal(2, 5, seed=4)
    x[0, 1] = y[1, 2] = -np.inf
    for m, own in ((0.0, x), (1.0, y)):
        for law in (Logits(x, reference=y, mixture=m), Logits(own)):
            np.testing.assert_allclose(law_probs(law, impl=impl), softmax(own), rtol=1e-6)
    half = law_probs(Logits(x, reference=y, mixture=0.5), impl=impl)
    assert half[0, 1] == half[1, 2] == 0


@by_impl
def test_the_mixture_as_a_law_is_the_mixture_written_out(impl: str) -> None:
    x, y = normal(500, 12, seed=5), normal(500, 12, seed=6)
    whole = geometric_mixture_logits(x, y, mixture=0.3, impl=impl)
    law = Logits(x, reference=y, mixture=0.3)
    np.testing.assert_allclose(law_probs(law, impl=impl), np.exp(whole), rtol=1e-6)
    a, b = sample(law, seed=1, impl=impl), sample(Logits(whole), seed=1, impl=impl)
    assert (a.token_ids == b.token_ids).mean() > 0.99


@by_impl
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_value_augmented_logits(dtype: torch.dtype, impl: str) -> None:
    rng = np.random.default_rng(7)
    for b, v in GRID:
        k = min(v, 6)
        z = torch.from_numpy(normal(b, v)).to(dtype)
        ids = torch.from_numpy(np.stack([rng.permutation(v)[:k] for _ in range(b)]))
        values = torch.from_numpy(rng.normal(size=(b, k))).float()
        ids[0, 0] = -1
        found = value_augmented_logits(z, ids, values, beta=3.0, impl=impl)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        wanted = z.double().numpy().copy()
        for row in range(b):
            valued = ids[row] >= 0
            x = values[row, valued].double().numpy()
            if len(x):
                wanted[row, ids[row, valued].numpy()] += 3.0 * (x - x.mean())
        # One multiplication, one mean and one sum in float32.
        np.testing.assert_allclose(found.double().numpy(), wanted, rtol=1e-6, atol=4e-6)
        for beta, same in ((0.0, values), (3.0, torch.full_like(values, 0.7))):
            plain = value_augmented_logits(z, ids, same, beta=beta, impl=impl)
            np.testing.assert_allclose(plain.double(), z.double(), rtol=0, atol=1e-6)


@by_impl
def test_values_of_all_tokens_give_the_optimal_policy(impl: str) -> None:
    """k = V and exact values: softmax(z + beta Q); the mean makes no difference."""
    z, q = normal(3, 9), normal(3, 9, seed=8).astype(np.float32)
    ids = np.tile(np.arange(9), (3, 1))
    law = value_augmented_law(z, ids, q, beta=1.5)
    np.testing.assert_allclose(law_probs(law, impl=impl), softmax(z + 1.5 * q), rtol=1e-5)
    written = value_augmented_logits(z, ids, q, beta=1.5, impl=impl)
    np.testing.assert_allclose(softmax(written), softmax(z + 1.5 * q), rtol=1e-5)
    cooler = law_probs(replace(law, temperature=0.5, top_k=2), impl=impl)
    assert ((cooler > 0).sum(-1) == 2).all()
    np.testing.assert_allclose(
        cooler,
        Mode(temperature=0.5, top_k=2).law(z + 1.5 * (q - q.mean(-1, keepdims=True))),
        rtol=1e-5,
    )
    none = value_augmented_law(z, ids[:, :0], q[:, :0])
    assert np.array_equal(law_probs(none, impl=impl), law_probs(Logits(z), impl=impl))


STATISTICS = {"median": -0.4, "std": 0.8, "maximum": 1.1, "minimum": -2.5}


def adaptive(z: np.ndarray, t0: float, tau: float) -> np.ndarray:
    p = softmax(z)
    entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(-1)
    with np.errstate(divide="ignore"):
        h = (np.log(np.maximum(entropy, 0)) - STATISTICS["median"]) / STATISTICS["std"]
    scaled = np.where(h > 0, h / STATISTICS["maximum"], h / -STATISTICS["minimum"])
    return t0 * (1 + tau * np.clip(scaled, -1, 1))


@by_impl
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_entropy_adaptive_temperature(dtype: torch.dtype, impl: str) -> None:
    for b, v in GRID:
        for sharp in (0.1, 1.0, 3.0):
            z = torch.from_numpy(sharp * normal(b, 2, v)).to(dtype)
            found = entropy_adaptive_temperature(
                z, **STATISTICS, temperature=0.9, tau=0.3, impl=impl
            )
            assert found.shape == (b, 2)
            assert found.dtype == torch.float32
            wanted = adaptive(z.double().numpy(), 0.9, 0.3)
            # Entropies are a logarithm and a mean of float32 exponentials; tau / std / maximum is below 0.4.
            np.testing.assert_allclose(found.numpy(), wanted, rtol=3e-6)
            plain = entropy_adaptive_temperature(
                z, **STATISTICS, temperature=0.9, tau=0.0, impl=impl
            )
            assert (plain == np.float32(0.9)).all()


@by_impl
def test_temperatures_at_the_ends(impl: str) -> None:
    """Certain rows are the coolest, uniform ones the warmest of their size, rows without a law at T0."""
    z = np.array([[0.0, -np.inf, -np.inf], [0.0, 0.0, 0.0], [-np.inf] * 3, [np.nan] * 3])
    more: dict[str, Any] = {"median": 0.0, "std": 1.0, "maximum": 0.05, "minimum": -0.5}
    t = entropy_adaptive_temperature(z, **more, temperature=2.0, tau=0.25, impl=impl)
    assert t.tolist() == [1.5, 2.5, 2.0, 2.0]


# kappa candidates at each of gamma + 1 positions, each with a window that the draft rolled out.
def branches(
    rng: np.random.Generator, b: int, gamma: int, kappa: int, v: int, dtype: Any
) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(rng.random((b, gamma + 1, v)), axis=-1)[..., :kappa]
    return order.astype(dtype), rng.integers(0, v, (b, gamma + 1, kappa, gamma)).astype(dtype)


@by_impl
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("op", [chain_speculative_sampling, block_speculative_sampling])
def test_branch_reuse(op: Any, dtype: Any, impl: str) -> None:
    rng = np.random.default_rng(9)
    b, gamma, v = 200, 3, 6
    z = rng.normal(size=(b, gamma + 1, v))
    w = z[:, :gamma] + 0.5 * rng.normal(size=(b, gamma, v))
    x = sample(Logits(w), seed=2).token_ids.astype(dtype)
    done: Verified = op(Logits(w), x, Logits(z), seed=2)
    emitted = done.output_token_ids.copy()
    for kappa in (0, 1, 3, v):
        roots, windows = branches(rng, b, gamma, kappa, v, dtype)
        found = mirror_sd_branch_reuse(emitted, done.num_accepted, roots, windows, impl=impl)
        # Lossless: the tokens are those of the verification, whatever the branches are.
        assert np.array_equal(emitted, op(Logits(w), x, Logits(z), seed=2).output_token_ids)
        assert found.reused.dtype == bool
        assert found.next_token_ids.dtype == dtype
        assert found.next_token_ids.shape == (b, gamma)
        for i in range(b):
            tau = int(done.num_accepted[i])
            hits = [j for j in range(kappa) if roots[i, tau, j] == emitted[i, tau]]
            assert bool(found.reused[i]) == bool(hits)
            assert found.branch[i] == (hits[0] if hits else -1)
            wanted = windows[i, tau, hits[0]] if hits else np.full(gamma, -1)
            assert np.array_equal(found.next_token_ids[i], wanted)
        assert found.reused.all() == (kappa == v)
        assert found.reused.any() == (kappa > 0)


def test_early_exit_candidates_are_reused_as_often_as_they_hold_the_token() -> None:
    """With kappa candidates of the target's own law at the exit the share reused is that law's top-kappa mass."""
    rng = np.random.default_rng(10)
    n, v, kappa = 40_000, 8, 3
    z = rng.normal(size=(n, 1, v))
    done = chain_speculative_sampling(None, np.empty((n, 0), np.int64), Logits(z), seed=3)
    roots = top_logprobs(Logits(z), kappa).token_ids
    windows = np.zeros((n, 1, kappa, 2), np.int64)
    found = mirror_sd_branch_reuse(done.output_token_ids, done.num_accepted, roots, windows)
    mass = np.sort(softmax(z[:, 0]), -1)[:, -kappa:].sum(-1)
    spread = np.sqrt((mass * (1 - mass)).sum()) / n
    assert abs(found.reused.mean() - mass.mean()) < 5 * spread


def medusa_greedy(candidates: np.ndarray, logits: np.ndarray) -> tuple[int, int, int]:
    """best candidate, accept length and next token of P paths, as published for temperature 0."""
    hits = candidates[:, 1:] == logits[:, :-1].argmax(-1)
    lengths = np.cumprod(hits, axis=1).sum(1)
    best = 0 if lengths.max() == 0 else int(lengths.argmax())
    return best, int(lengths.max()), int(logits[best, lengths.max()].argmax())


@by_impl
def test_greedy_paths_are_medusas(impl: str) -> None:
    rng = np.random.default_rng(11)
    n, paths, k, v = 150, 4, 3, 3
    z = rng.normal(size=(n, paths, k + 1, v))
    ids = rng.integers(0, v, (n, paths, k + 1))
    ids[:, :, 1:] = np.where(rng.random((n, paths, k)) < 0.5, z[:, :, :k].argmax(-1), ids[:, :, 1:])
    done = greedy_speculative_accept(ids, z, impl=impl)
    lengths = set()
    for b in range(n):
        best, length, token = medusa_greedy(ids[b], z[b])
        assert (done.best_path[b], done.num_accepted[b]) == (best, length)
        wanted = [*ids[b, best, 1 : length + 1], token, *[-1] * (k - length)]
        assert done.output_token_ids[b].tolist() == wanted
        lengths.add(length)
    assert lengths == {0, 1, 2, 3}


@by_impl
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_greedy_chains_are_greedy_decoding(dtype: torch.dtype, impl: str) -> None:
    """Whatever the draft is, the output is a prefix of what argmax alone would write; ties go to the lowest id."""
    for b, v in GRID:
        z = torch.from_numpy(np.round(normal(b, 5, v))).to(dtype)
        best = z.double().numpy().argmax(-1)
        x = best[:, :4].copy()
        x[:, 2] = (x[:, 2] + 1) % v
        for ids, accepted in ((best[:, :4], 4), (x, 2 if v > 1 else 4)):
            done = greedy_speculative_accept(torch.from_numpy(ids), z, impl=impl)
            assert (done.num_accepted == accepted).all()
            assert np.array_equal(done.output_token_ids[:, : accepted + 1], best[:, : accepted + 1])
            assert (done.output_token_ids[:, accepted + 1 :] == -1).all()


def medusa_typical(
    candidates: np.ndarray, logits: np.ndarray, temperature: float, epsilon: float, alpha: float
) -> tuple[int, int]:
    """best candidate and accept length of P paths, as published: threshold min(eps, alpha exp(-H)), log(pi + 1e-5)."""
    pi = softmax(logits[:, :-1] / temperature)
    chosen = np.take_along_axis(pi, candidates[:, 1:, None], -1)[..., 0]
    entropy = -(pi * np.log(pi + 1e-5)).sum(-1)
    typical = chosen > np.minimum(epsilon, np.exp(-entropy) * alpha)
    lengths = np.cumprod(typical, axis=1).sum(1)
    longest = int(lengths.max())
    if longest == 0:
        return 0, 0
    at = np.flatnonzero(lengths == longest)
    likelihood = np.log(chosen[at, :longest]).sum(1)
    return int(at[likelihood.argmax()]), longest


@by_impl
@pytest.mark.parametrize(("epsilon", "alpha"), [(0.3, 0.09), (0.09, 0.3), (0.2, 10.0)])
def test_typical_acceptance_is_medusas(epsilon: float, alpha: float, impl: str) -> None:
    rng = np.random.default_rng(12)
    n, paths, k, v = 150, 5, 3, 7
    z = 2 * rng.normal(size=(n, paths, k + 1, v))
    ids = rng.integers(0, v, (n, paths, k + 1))
    done = typical_accept(
        ids, Logits(z, temperature=0.7), epsilon=epsilon, alpha=alpha, entropy_eps=1e-5, impl=impl
    )
    lengths = set()
    for b in range(n):
        best, length = medusa_typical(ids[b], z[b], 0.7, epsilon, alpha)
        assert (done.best_path[b], done.num_accepted[b]) == (best, length)
        assert np.array_equal(done.output_token_ids[b, :length], ids[b, best, 1 : length + 1])
        lengths.add(length)
    assert len(lengths) >= 3


@by_impl
def test_laws_of_typical_acceptance(impl: str) -> None:
    rng = np.random.default_rng(13)
    n, v = 100, 6
    z = rng.normal(size=(n, 2, 3, v))
    ids = rng.integers(0, v, (n, 2, 3))
    everything = typical_accept(ids, Logits(z), alpha=0.0, impl=impl)
    assert (everything.num_accepted == 2).all()
    # A one-hot target has H = 0: the threshold is min(epsilon, alpha), and only its token passes.
    one = np.full((1, 1, 2, v), -np.inf)
    one[..., 4] = 0.0
    for token, accepted in ((4, 1), (3, 0)):
        done = typical_accept(np.array([[[0, token]]]), Logits(one), alpha=0.9, impl=impl)
        assert done.num_accepted.tolist() == [accepted]
    # Uniform over V: accepted if 1/V > alpha/V.
    flat = Logits(np.zeros((1, 1, 2, v)))
    for alpha, accepted in ((0.99, 1), (1.01, 0)):
        done = typical_accept(np.array([[[0, 2]]]), flat, epsilon=1.0, alpha=alpha, impl=impl)
        assert done.num_accepted.tolist() == [accepted]
    # Equal length: the likelier path, then the first.
    p = np.array([[[[0.5, 0.3, 0.2], [1, 0, 0]]] * 3])
    for tokens, best in (([1, 0, 2], 1), ([2, 1, 1], 1), ([2, 2, 2], 0)):
        paths = np.array([[[0, token] for token in tokens]])
        done = typical_accept(paths, p, alpha=0.0, impl=impl)
        assert done.best_path.tolist() == [best]
        assert done.output_token_ids.tolist() == [[tokens[best], 0]]


def test_the_token_after_typical_acceptance_is_the_targets_own() -> None:
    n, v = 100_000, 5
    z = np.random.default_rng(14).normal(size=v)
    rows = Logits(np.broadcast_to(z, (n, 1, 1, v)), temperature=0.8, top_k=3)
    ids = typical_accept(np.zeros((n, 1, 1), np.int64), rows, seed=4).output_token_ids[:, 0]
    p = Mode(temperature=0.8, top_k=3).law(z)
    shares = np.bincount(ids, minlength=v) / n
    assert (shares[p == 0] == 0).all()
    assert np.abs(shares - p).max() < 5 * np.sqrt(0.25 / n)
