# SPDX-License-Identifier: Apache-2.0
"""Numbers at the ends of their ranges: every positive temperature has a law, and so has every truncation."""

from __future__ import annotations

import re
from typing import Any

import hotloop.decode as d
import mpmath
import numpy as np
import pytest
import torch
from decode_calls import refused
from decode_cases import assert_law

TINY = float(np.finfo(np.float32).tiny)
IMPLS = ("cpu", "reference")
TEMPERATURES = (
    5e-324,  # the least double: its inverse is infinite
    float(np.finfo(np.float64).tiny),
    1e-45,  # the least float32
    1e-40,  # subnormal in float32
    TINY,
    1e-30,
    1e-6,
    1e6,
    1e37,
    float(np.finfo(np.float32).max),
    1e300,
    float(np.finfo(np.float64).max),
)
ROWS = {
    "plain": [1.0, 5.0, 4.0],
    "ties": [5.0, 5.0, 4.0, -np.inf],
    "one ulp apart": [5.0, float(np.nextafter(np.float32(5), np.float32(6))), 4.0],
    "negative": [-7.0, -5.0, -5.0, -6.0],
    "zero": [0.0, -1.0, 0.0],
    "removed": [-np.inf, 3.0, -np.inf, 1.0],
    "large": [3e38, 2e38, -3e38],
    "small": [1e-38, 2e-38, 0.0],
}


def exact(row: np.ndarray, temperature: float) -> np.ndarray:
    """softmax(row / temperature) in 60 digits."""
    with mpmath.workdps(60):
        z = [mpmath.mpf(float(x)) / mpmath.mpf(temperature) if x > -np.inf else None for x in row]
        top = max(x for x in z if x is not None)
        e = [mpmath.mpf(0) if x is None else mpmath.exp(x - top) for x in z]
        return np.array([float(x / mpmath.fsum(e)) for x in e])


def test_the_smallest_float_is_a_temperature() -> None:
    z = torch.tensor([[1.0, 5.0, 4.0]])
    for dtype in (torch.float32, torch.float64):
        for impl in IMPLS:
            law = d.Logits(z.to(dtype), temperature=torch.finfo(torch.float32).tiny)
            assert d.sample(law, seed=0, impl=impl).token_ids.tolist() == [1]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("name", ROWS)
def test_every_temperature_has_its_law(name: str, dtype: Any, impl: str) -> None:
    with np.errstate(over="ignore"):
        row = np.array(ROWS[name]).astype(dtype)
    if np.isposinf(row).any():
        return  # no law in this type
    for temperature in TEMPERATURES:
        real = np.float64 if dtype is np.float64 else np.float32
        if name == "small" and temperature < 1 / float(np.finfo(real).max):
            continue  # the stated limit: the inverse is no number of the type
        wanted = exact(row, temperature)
        law = d.Logits(np.tile(row, (64, 1)), temperature=temperature)
        found = d.law_probs(law, impl=impl)
        # The quotient of logit and temperature is rounded to the type of the logits, as in plain torch.
        with np.errstate(all="ignore"):
            plain = torch.softmax(torch.from_numpy(row.astype(real)) / real(temperature), -1)
        rounding = np.nan_to_num(np.abs(plain.numpy() - wanted)).max()
        assert name == "one ulp apart" or temperature < 1e-30 or rounding < 1e-6
        if temperature < 1e-30:
            rounding = 0.0  # all mass on the largest
        np.testing.assert_allclose(found, np.tile(wanted, (64, 1)), atol=3e-7 + 2 * rounding)
        drawn = d.sample(law, seed=3, impl=impl)
        assert (wanted[drawn.token_ids] > 0).all()
        np.testing.assert_allclose(
            drawn.logprobs,
            np.log(wanted[drawn.token_ids]),
            rtol=1e-6,
            atol=1e-6 + 4 * rounding,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1e-45, TINY, 1e38])
def test_rows_of_many_chunks_and_second_models(dtype: torch.dtype, temperature: float) -> None:
    """The other paths of the passes: chunks, a bias, a mixture, truncation; all implementations draw the same."""
    g = torch.Generator().manual_seed(5)
    z = torch.randn(6, 1300, generator=g).to(dtype)
    top = z.double().argmax(-1)
    ids = torch.stack([top, (top + 1) % 1300], 1)
    bias = torch.zeros(6, 2)
    laws = (
        d.Logits(z, temperature=temperature),
        d.Logits(z, temperature=torch.full((6,), temperature, dtype=torch.float64)),
        d.Logits(z, temperature=temperature, reference=z),
        d.Logits(z, temperature=temperature, bias_ids=ids, bias=bias),
        d.Logits(z, temperature=temperature, top_k=7),
        d.Logits(z, temperature=temperature, top_k=700, top_p=0.9, min_p=0.5),
        d.Logits(z, temperature=temperature, top_p=0.9, filter_order="joint"),
    )
    for law in laws:
        ours, theirs = (d.sample(law, seed=9, impl=impl) for impl in IMPLS)
        assert torch.equal(ours.token_ids, theirs.token_ids)
        if temperature < 1:
            largest = z.double().gather(1, ours.token_ids[:, None])[:, 0]
            assert torch.equal(largest, z.double().amax(-1))
    flat = d.sample(d.Logits(z, temperature=1e38), seed=9).token_ids
    if temperature > 1:
        assert torch.equal(flat, d.sample(laws[0], seed=9).token_ids)


def test_a_chain_at_the_smallest_temperature_is_greedy() -> None:
    g = torch.Generator().manual_seed(1)
    target = torch.randn(8, 4, 50, generator=g)
    ids = target[:, :3].argmax(-1)
    ids[4:, 1] = (ids[4:, 1] + 1) % 50
    wanted = d.greedy_speculative_accept(ids, target)
    for impl in IMPLS:
        for draft in (None, d.Logits(target[:, :3], temperature=TINY)):
            law = d.Logits(target, temperature=TINY)
            found = d.chain_speculative_sampling(draft, ids, law, seed=2, impl=impl)
            assert torch.equal(found.output_token_ids, wanted.output_token_ids)
            assert torch.equal(found.num_accepted, wanted.num_accepted)


def test_rows_without_a_law_have_none_at_any_temperature() -> None:
    for value in (np.nan, np.inf, -np.inf):
        for temperature in TEMPERATURES:
            for impl in IMPLS:
                z = np.array([[value, value], [0.0, np.inf]], np.float32)[
                    : 1 if value != np.inf else 2
                ]
                law = d.Logits(z, temperature=temperature)
                assert (d.sample(law, seed=1, impl=impl).token_ids == -1).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_truncations_at_their_ends(impl: str) -> None:
    z = np.tile(np.array([0.0, 2.0, 1.0, 2.0, -1.0], np.float32), (20000, 1))[
        : 64 if impl != "cpu" else None
    ]
    whole = exact(z[0], 1.0)
    ties = np.array([0.0, 0.5, 0.0, 0.5, 0.0])
    cases: list[tuple[dict[str, Any], np.ndarray]] = [
        ({"top_p": 5e-324}, ties),
        ({"top_p": 1e-300}, ties),
        ({"top_p": 1 - 2**-53}, whole),
        ({"top_p": 1}, whole),
        ({"min_p": 1}, ties),
        ({"min_p": 1.0}, ties),
        ({"min_p": 1 - 2**-53}, ties),
        ({"min_p": 5e-324}, whole),
        ({"top_k": 1}, ties),
        ({"top_k": 2**31}, whole),
        ({"top_k": 2**63}, whole),
        ({"top_k": 2**64 + 1}, whole),
        ({"top_k": 10**400}, whole),
        ({"top_k": 5e300}, whole),
        ({"top_k": 2.0}, ties),
        ({"top_k": np.float64(2)}, ties),
        ({"top_k": np.int64(2**62)}, whole),
        ({"top_k": 2**63, "top_p": 5e-324, "min_p": 1.0}, ties),
    ]
    for how, law in cases:
        for kind in (d.Logits(z, **how), d.Probs(np.tile(whole, (len(z), 1)), **how)):
            np.testing.assert_allclose(d.law_probs(kind, impl=impl)[0], law, atol=2e-7)
            tokens = d.sample(kind, seed=4, impl=impl).token_ids
            if impl == "cpu":
                assert_law(np.bincount(tokens, minlength=5), law, least=20000)


def test_what_is_beyond_the_range_is_refused() -> None:
    z = np.zeros((2, 5), np.float32)
    for name, value, text in (
        ("temperature", 10**400, "a finite number, got inf"),
        ("temperature", -(10**400), "a finite number, got -inf"),
        ("temperature", -5e-324, "a number >= 0, got -5e-324"),
        ("top_p", -5e-324, "a number > 0 and <= 1, got -5e-324"),
        ("top_p", 1 + 2**-52, "a number > 0 and <= 1, got 1.0000000000000002"),
        ("min_p", 1 + 2**-52, "a number >= 0 and <= 1, got 1.0000000000000002"),
        ("top_k", -(10**400), "an integer, got -inf"),
        ("top_k", np.inf, "an integer, got inf"),
    ):
        match = rf"^\[sample\] law\.{name}: expected {re.escape(text)}\."
        refused("sample", ValueError, match, {"law": d.Logits(z, **{name: value})})
    refused("top_logprobs", ValueError, r"k: expected an integer >= 0 and <= 2097152", {"k": 2**70})
    near = np.array([[1], [0]], np.int32)
    p = np.full((1, 2, 2), 0.5)
    for impl in IMPLS:  # more neighbours than there are tokens is all of them
        d.lantern_relaxed_accept(None, np.array([[0]]), p, near, k=2**70, impl=impl, seed=0)


INFINITE = {
    "entropy_adaptive_temperature": ("median", "std", "maximum", "temperature"),
    "value_augmented_logits": ("beta",),
    "lantern_relaxed_accept": ("delta",),
    "typical_accept": ("alpha",),
}


@pytest.mark.parametrize("op", INFINITE)
def test_infinite_numbers_are_refused(op: str) -> None:
    """Infinity times 0 is NaN, and a NaN takes a token out of a law without a word."""
    said = "value_augmented_law" if op == "value_augmented_logits" else op
    for name in INFINITE[op]:
        match = rf"^\[{said}\] {name}: expected a finite number.*, got inf\. Leave it out or pass a finite number"
        refused(op, ValueError, match, {name: np.inf})


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("temperature", [1e300, 10**39, np.array([1e300])])
def test_a_temperature_beyond_float32_has_a_law_beside_a_truncation(
    temperature: Any, impl: Any
) -> None:
    law = d.Logits(np.array([[1.0, 5.0, 4.0]]), temperature=temperature, top_k=2)
    np.testing.assert_allclose(d.law_probs(law, impl=impl), [[0.0, 0.5, 0.5]])


def test_every_top_k_above_the_vocabulary_keeps_all() -> None:
    law = d.Logits(np.array([[1.0, 5.0, 4.0]]), top_k=10**400)
    np.testing.assert_allclose(d.law_probs(law), [exact(np.array([1.0, 5.0, 4.0]), 1.0)], rtol=1e-6)
