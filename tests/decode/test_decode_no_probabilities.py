# SPDX-License-Identifier: Apache-2.0
"""Raw logits where probabilities belong: whoever reads a number that is none refuses it, and no pass is made for it."""

from __future__ import annotations

import re
from typing import Any

import hotloop.decode as d
import hotloop.reference.decode as reference
import numpy as np
import pytest
import torch
from decode_calls import CALLS, LAW_ARGUMENTS, V
from hotloop.decode.law import refuse_probabilities

CASES = [(op, name) for op, names in LAW_ARGUMENTS.items() for name in names]
LIKE = {
    "float32": lambda x: x.astype(np.float32),
    "float64": lambda x: x.astype(np.float64),
    "float16": lambda x: x.astype(np.float16),
    "torch": lambda x: torch.from_numpy(x.astype(np.float32)),
    "bfloat16": lambda x: torch.from_numpy(x).bfloat16(),
}


def call(op: str, impl: str, how: str, **changes: Any) -> Any:
    function, base = CALLS[op]
    seed = {"seed": 3} if op not in ("law_probs", "top_logprobs") else {}
    arguments = {
        k: (
            LIKE[how](v)
            if v.dtype.kind == "f"
            else v
            if how.startswith("float")
            else torch.from_numpy(v)
        )
        if isinstance(v, np.ndarray)
        else v
        for k, v in {**base, **changes}.items()
    }
    return function(**arguments, **seed, impl=impl)


@pytest.mark.parametrize("how", LIKE)
@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize(("op", "name"), CASES)
def test_raw_logits_are_refused(op: str, name: str, impl: str, how: str) -> None:
    logits = np.random.default_rng(0).normal(scale=4.0, size=CALLS[op][1][name].shape)
    text = rf"^\[{op}\] {name}: expected probabilities from 0 to 1, got -?[\d.]+ at \[0, .*0.*\] \(\d+ of \d+\)\. "
    with pytest.raises(ValueError, match=text + r"Wrap logits in Logits\(\.\.\.\)\."):
        call(op, impl, how, **{name: logits})


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("value", [-1e-6, 1.002, 2.0, np.nan, np.inf, -np.inf])
def test_one_number_is_enough_where_the_row_is_drawn_from(value: float, impl: str) -> None:
    p = np.full((3, 1, 2000), 1 / 2000)
    p[1, 0, 1700] = value
    text = rf"expected probabilities from 0 to 1, got {re.escape(str(value))} at "
    for op, match, run in (
        ("sample", r"\[1, 1700\]", lambda: d.sample(p[:, 0], seed=1, impl=impl)),
        ("sample", r"\[1, 1700\]", lambda: d.sample(d.Probs(p[:, 0], top_k=3), seed=1, impl=impl)),
        (
            "sample",
            r"\[1, 1700\]",
            lambda: d.sample(d.Probs(p[:, 0], min_p=0.5), seed=1, impl=impl),
        ),
        ("law_probs", r"\[1, 1700\]", lambda: d.law_probs(p[:, 0], impl=impl)),
        ("top_logprobs", r"\[1, 1700\]", lambda: d.top_logprobs(p[:, 0], 2, impl=impl)),
        (
            "chain_speculative_sampling",
            r"\[1, 0, 1700\]",
            lambda: d.chain_speculative_sampling(
                None, np.zeros((3, 0), np.int64), p, seed=1, impl=impl
            ),
        ),
    ):
        with pytest.raises(ValueError, match=rf"^\[{op}\] .*{text}{match}"):
            run()


def test_the_draft_of_a_rejected_token_is_read() -> None:
    q = np.full((1, 1, V), 1 / V)
    q[0, 0, 4] = -0.2
    p = np.zeros((1, 2, V))
    p[..., 2] = 1.0
    with pytest.raises(
        ValueError, match=r"draft_probs: expected probabilities .*, got -0.2 at \[0, 0, 4\]"
    ):
        d.chain_speculative_sampling(q, np.array([[1]]), p, seed=1)


def test_what_is_not_read_is_not_looked_at() -> None:
    """A token that is only looked up: the rest of its row is never read."""
    p = np.full((1, 3, V), 1 / V)
    p[0, :2, 4] = 77.0
    q = np.full((1, 2, V), 1 / V)
    q[0, :, 3] = -5.0
    done = d.chain_speculative_sampling(q, np.array([[1, 2]]), p, seed=1)
    assert done.num_accepted.tolist() == [2]


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_rounding_above_one_and_odd_sums_are_accepted(impl: str) -> None:
    above = np.nextafter(np.float32(1), np.float32(2))
    p = np.array([[above, 0.0, -0.0], [0.0, 0.0, 1.0]], np.float32)
    assert d.sample(p, seed=1, impl=impl).token_ids.tolist() == [0, 2]
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.rand(4, 300, generator=torch.Generator().manual_seed(1)).to(dtype)
        d.sample(x / x.sum(-1, keepdim=True), seed=1, impl=impl)


def test_outputs_of_wrong_probabilities_do_not_depend_on_threads() -> None:
    p = np.full((64, 40000), 1 / 40000, np.float32)
    p[63, 39999] = -1.0
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with pytest.raises(ValueError, match=r"got -1.0 at \[63, 39999\]"):
                d.sample(p, seed=1)
    finally:
        torch.set_num_threads(before)


def test_texts_where_no_op_is_at_hand() -> None:
    bad = np.array([[0.5, -0.5]])
    with pytest.raises(
        ValueError, match=r"^\[reference\] values: expected probabilities .*, got -0\.5\. Wrap"
    ):
        reference.sample(bad, seed=1)
    with pytest.raises(
        ValueError, match=r"^\[sample\] law: expected .*, got another number\. Do not write"
    ):
        refuse_probabilities("sample", law=d.Probs(np.array([[0.5, 0.5]])))
