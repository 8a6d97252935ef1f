# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/decode.md: "Coming from FlashInfer and vLLM", against the rivals' documented rules in NumPy.

Neither rival installs without a GPU, so what their columns say is written out here and compared with ours.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import hotloop.decode
import numpy as np
import pytest
import test_decode_vllm_flashinfer as known
from decode_cases import assert_law, renormalised, softmax
from hotloop.decode import Logits, Probs, chain_speculative_sampling, law_probs, sample

pytestmark = pytest.mark.source
PAGE = Path(__file__).resolve().parents[2] / "docs" / "decode.md"
B, K, V = 3, 4, 7
CHECKS: dict[str, Callable[[], None]] = {}


def row(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def add(check: Callable[[], None]) -> Callable[[], None]:
        CHECKS[name] = check
        return check

    return add


def laws(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draft law (B, K, V), draft tokens (B, K), target law (B, K + 1, V)."""
    rng = np.random.default_rng(seed)
    q, p = softmax(rng.normal(size=(B, K, V))), softmax(rng.normal(size=(B, K + 1, V)))
    return q, rng.integers(0, V, (B, K)), p


@row("arguments")
def _() -> None:
    for op in known.CHAINS:
        parameters = inspect.signature(op).parameters
        assert list(parameters)[:3] == ["draft_probs", "draft_token_ids", "target_probs"]
        assert all(p.kind is p.KEYWORD_ONLY for p in list(parameters.values())[3:])
    q, x, p = laws()
    given = chain_speculative_sampling(q, x, p, seed=3)
    logits = chain_speculative_sampling(Logits(np.log(q)), x, Logits(np.log(p)), seed=3)
    assert np.array_equal(given.output_token_ids, logits.output_token_ids)


for name in ("shapes", "output", "emitted"):
    row(name)(partial(known.test_counts_and_padding, chain_speculative_sampling, True, "cpu"))


@row("the one more")
def _() -> None:
    """FlashInfer: the token after n accepted ones comes from max(p_n - q_n, 0), after all K of them from p_K."""
    n, q, p = 200_000, softmax(np.array([[0.0, 1, 2]])), softmax(np.array([[2.0, 1, 0], [0, 0, 1]]))
    x = np.full((n, 1), 2)
    done = chain_speculative_sampling(
        np.broadcast_to(q, (n, 1, 3)), x, np.broadcast_to(p, (n, 2, 3)), seed=5
    )
    refused = done.num_accepted == 0
    residual = renormalised(np.maximum(p[0] - q[0], 0))
    share = refused.mean()
    assert abs(share - (1 - p[0, 2] / q[0, 2])) < 5 / np.sqrt(n)
    tokens = done.output_token_ids
    assert_law(np.bincount(tokens[refused, 0], minlength=3), residual, int(refused.sum()))
    assert_law(np.bincount(tokens[~refused, 1], minlength=3), p[1], int((~refused).sum()))


@row("counts")
def _() -> None:
    """FlashInfer's accepted count goes on past the first rejection, its emitted count stops there, as ours."""
    one_hot = np.eye(V)
    x = np.array([[1, 2, 3, 4]])
    target = one_hot[[[1, 5, 3, 4, 6]]]
    done = chain_speculative_sampling(one_hot[x], x, target, seed=1)
    same = x[0] == [1, 5, 3, 4]
    accepted, emitted = same.sum(), np.argmin(same)
    assert (accepted, emitted) == (3, 1)
    assert done.num_accepted.tolist() == [emitted]


@row("drafts without a law")
def _() -> None:
    _, x, p = laws()
    one_hot = np.eye(V)[x]
    a, b = (chain_speculative_sampling(q, x, p, seed=9) for q in (one_hot, None))
    assert np.array_equal(a.output_token_ids, b.output_token_ids)


@row("temperature 0")
def _() -> None:
    z = np.array([[1.0, 3, 3, 2], [0, -1, -5, -2]])
    assert sample(Logits(z, temperature=0), seed=1).token_ids.tolist() == [1, 0]
    assert sample(Logits(z, temperature=0), seed=2).token_ids.tolist() == [1, 0]
    one_hot = np.eye(4)[z.argmax(-1)]
    assert np.array_equal(law_probs(Logits(z, temperature=0)), one_hot)


def kept_by_top_p(p: np.ndarray, top_p: float) -> np.ndarray:
    """The fewest likeliest tokens whose mass is at least top_p."""
    order = np.argsort(-p)
    count = int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1
    keep = np.zeros(len(p), bool)
    keep[order[:count]] = True
    return keep


def kept_by_top_k(p: np.ndarray, k: int) -> np.ndarray:
    return p >= np.sort(p)[-k]


@row("top-k and top-p together")
def _() -> None:
    for seed in range(20):
        p = softmax(2 * np.random.default_rng(seed).normal(size=30))
        k_first = np.where(kept_by_top_k(p, 8), p, 0)
        wanted = {
            "top_k_first": kept_by_top_p(renormalised(k_first), 0.7) & (k_first > 0),
            "joint": kept_by_top_p(p, 0.7) & kept_by_top_k(p, 8),
        }
        for order, keep in wanted.items():
            law = law_probs(Probs(p[None], top_k=8, top_p=0.7, filter_order=order))[0]
            np.testing.assert_allclose(law, renormalised(np.where(keep, p, 0)), atol=1e-6)
        default = law_probs(Probs(p[None], top_k=8, top_p=0.7))[0]
        first = law_probs(Probs(p[None], top_k=8, top_p=0.7, filter_order="top_k_first"))[0]
        assert np.array_equal(default, first)


@row("ties at the threshold")
def _() -> None:
    p = np.array([[0.3, 0.2, 0.2, 0.2, 0.1]])
    for cut in ({"top_k": 2}, {"top_p": 0.45}):
        kept = law_probs(Probs(p, **cut))[0] > 0
        assert kept.tolist() == [True, True, True, True, False]


@row("min-p")
def _() -> None:
    """vLLM: min-p, then softmax over what it keeps, then top-p of that. Ours: both on the law as it was."""
    p = np.array([0.5, 0.2, 0.12, 0.1, 0.08])
    by_min_p = p >= 0.25 * p.max()
    assert by_min_p.tolist() == [True, True, False, False, False]
    vllm = kept_by_top_p(renormalised(np.where(by_min_p, p, 0)), 0.65)
    ours = kept_by_top_p(p, 0.65) & by_min_p
    assert (vllm.tolist(), ours.tolist()) == ([True] + [False] * 4, [True, True] + [False] * 3)
    law = law_probs(Probs(p[None], top_p=0.65, min_p=0.25))[0]
    np.testing.assert_allclose(law, renormalised(np.where(ours, p, 0)), atol=1e-6)


@row("seeds")
def _() -> None:
    q, x, p = laws()
    together = chain_speculative_sampling(q, x, p, seed=np.array([7, 8, 9]), offset=np.arange(B))
    for b in range(B):
        alone = chain_speculative_sampling(
            q[b : b + 1], x[b : b + 1], p[b : b + 1], seed=np.array([7 + b]), offset=np.array([b])
        )
        assert np.array_equal(alone.output_token_ids[0], together.output_token_ids[b])
    one = chain_speculative_sampling(q, x, p, seed=7, offset=3)
    assert np.array_equal(
        one.output_token_ids, chain_speculative_sampling(q, x, p, seed=7, offset=3).output_token_ids
    )


@row("log-probabilities")
def _() -> None:
    """Of each emitted token under the law it was drawn from or judged by, after truncation."""
    rng = np.random.default_rng(4)
    z = rng.normal(size=(5, 9))
    done = sample(Logits(z, temperature=0.7, top_k=4), seed=1)
    p = softmax(z / 0.7)
    law = np.stack([renormalised(np.where(kept_by_top_k(x, 4), x, 0)) for x in p])
    wanted = np.log(np.take_along_axis(law, done.token_ids[:, None], 1)[:, 0])
    np.testing.assert_allclose(done.logprobs, wanted, atol=1e-5)


def titles() -> list[str]:
    text = PAGE.read_text(encoding="utf-8")
    table = text.split("## Coming from FlashInfer and vLLM")[1].split("\n\n")[1]
    return [cells for cells in re.findall(r"^\| ([^|]*?) +?\|", table, re.M) if cells.strip("- ")]


def test_every_row_of_the_page_has_its_check() -> None:
    assert set(titles()) == set(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_row(name: str) -> None:
    CHECKS[name]()


def test_every_function_named_exists() -> None:
    for name in re.findall(r"^\| `(\w+)` \|", PAGE.read_text(encoding="utf-8"), re.M):
        assert callable(getattr(hotloop.decode, name)), name
