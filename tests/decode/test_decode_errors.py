# SPDX-License-Identifier: Apache-2.0
"""Every front door refuses what it cannot take, and says what, where and what to do: the checks all ops share."""

from __future__ import annotations

import re

import hotloop.decode as d
import numpy as np
import pytest
import torch
from decode_calls import CALLS, B, P, arrays, named, refused
from hotloop.front import impl as _impl

by_op = pytest.mark.parametrize("op", CALLS)


@by_op
def test_the_valid_arguments_are_valid(op: str) -> None:
    call, base = CALLS[op]
    call(**base)
    call(**{k: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for k, x in base.items()})


@by_op
def test_a_list_in_place_of_each_array(op: str) -> None:
    for name in arrays(op):
        text = r"a NumPy, torch or CuPy array, got list\. Use numpy\.asarray\(\.\.\.\)\."
        refused(op, TypeError, named(op, name) + text, {name: CALLS[op][1][name].tolist()})


@by_op
def test_another_dtype_for_each_array(op: str) -> None:
    for name in arrays(op):
        x = CALLS[op][1][name]
        wrong = x.astype(np.int64) if x.dtype.kind == "f" else x.astype(np.float32)
        text = rf"dtype .*, got {wrong.dtype}\. Convert it first\."
        refused(op, TypeError, named(op, name) + text, {name: wrong})
        small = x.astype(np.int16)
        refused(op, TypeError, named(op, name) + "dtype .*, got int16", {name: small})


@by_op
def test_another_number_of_dimensions_for_each_array(op: str) -> None:
    for name in arrays(op):
        if (op, name) == ("geometric_mixture_logits", "ref_logits"):
            continue
        x = CALLS[op][1][name]
        wrong = x[None, None, None]
        text = rf"(.*dimension\(s\), got shape|shape .*, got) {re.escape(str(wrong.shape))}\."
        refused(op, ValueError, named(op, name) + text, {name: wrong})


@by_op
def test_one_request_too_few_in_each_array_but_the_first(op: str) -> None:
    call, base = CALLS[op]
    for name in arrays(op)[1:]:
        with pytest.raises(ValueError, match=rf"^\[{op[:15]}.*: expected .*, got .*\([124],.*\."):
            call(**{**base, name: base[name][:-1]})


@by_op
def test_another_library_for_each_array_but_the_first(op: str) -> None:
    for name in arrays(op)[1:]:
        call, base = CALLS[op]
        for like, other in ((lambda x: x, torch.from_numpy), (torch.from_numpy, lambda x: x)):
            wrong = {k: like(x) if isinstance(x, np.ndarray) else x for k, x in base.items()}
            wrong[name] = other(base[name])
            with pytest.raises(TypeError, match=r": expected a (numpy|torch) array like .*, got "):
                call(**wrong)


@by_op
def test_another_device_for_each_array(op: str) -> None:
    call, base = CALLS[op]
    names = arrays(op)
    for name in names:
        wrong = {k: torch.from_numpy(x) if k in names else x for k, x in base.items()}
        wrong[name] = wrong[name].to("meta")
        with pytest.raises(
            (ValueError, NotImplementedError),
            match=r"expected device (cpu|meta) like .*, got (cpu|meta)\. Move it first|refused: device meta",
        ):
            call(**wrong)
    everything = {k: torch.from_numpy(x).to("meta") if k in names else x for k, x in base.items()}
    with pytest.raises(NotImplementedError) as caught:
        call(**everything)
    text = str(caught.value)
    assert text.startswith(f"[{op}] no implementation fits ")
    assert " on meta:" in text
    assert "cpu        refused: device meta" in text
    assert "reference  refused: device meta" in text
    assert text.endswith("details: python -m hotloop info")


@by_op
def test_impl(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(
        op, ValueError, rf"^\[{op}\] impl: expected one of auto, .*, got 'gpu'", {"impl": "gpu"}
    )
    for impl in ("cuda", "triton"):
        text = rf"^\[{op}\] no implementation fits .* on cpu with impl='{impl}':"
        refused(op, NotImplementedError, text, {"impl": impl})
    call, base = CALLS[op]
    for impl in ("cpu", "reference"):
        call(**base, impl=impl)
        assert _impl.last_impl(op) == impl
        monkeypatch.setenv("HOTLOOP_IMPL", impl)
        call(**base)
        assert _impl.last_impl(op) == impl
    monkeypatch.setenv("HOTLOOP_IMPL", "triton")
    refused(op, NotImplementedError, "with impl='triton'")


SEEDED = (
    "chain_speculative_sampling",
    "block_speculative_sampling",
    "speculative_streaming_verify",
    "tree_speculative_verify",
    "lantern_relaxed_accept",
    "typical_accept",
    "sample",
)


@pytest.mark.parametrize("op", SEEDED)
def test_seed_and_offset(op: str) -> None:
    for name, most in (("seed", 2**64 - 1), ("offset", 2**63 - 1)):
        start = rf"^\[{op}\] {name}: expected "
        for value in (-1, most + 1):
            refused(op, ValueError, start + rf"an integer .*, got {value}\.", {name: value})
        for value in (1.5, "3", [1, 2], *([None] if name == "offset" else [])):
            refused(op, TypeError, start, {name: value})
        wrong = np.zeros(B, np.int32)
        refused(op, TypeError, start + "dtype int64, got int32", {name: wrong})
        wrong = np.zeros(B + 1, np.int64)
        refused(
            op, ValueError, start + r"an integer or shape \(2,\), got shape \(3,\)", {name: wrong}
        )
        refused(op, ValueError, start + r"1 dimension", {name: np.zeros((B, 1), np.int64)})
        refused(op, TypeError, start + "a numpy array", {name: torch.zeros(B, dtype=torch.int64)})
        call, base = CALLS[op]
        call(**base, **{name: most})


@pytest.mark.parametrize("op", SEEDED[:6])
def test_lengths(op: str) -> None:
    name = "num_nodes" if op == "tree_speculative_verify" else "num_draft_tokens"
    start = rf"^\[{op}\] {name}: expected "
    refused(op, TypeError, start + "dtype int64, int32, got float64", {name: np.ones(B)})
    wrong = np.ones(B + 1, np.int64)
    refused(op, ValueError, start + r"shape \(2,\), got \(3,\)", {name: wrong})
    refused(op, TypeError, start + "a NumPy, torch or CuPy array, got int", {name: 2})
    refused(op, TypeError, start + "a numpy array like", {name: torch.ones(B, dtype=torch.int64)})


def test_an_implementation_that_has_no_cuda_says_so() -> None:
    with pytest.raises(NotImplementedError) as caught:
        d.sample(P, impl="cuda")
    text = str(caught.value)
    assert "[sample] no implementation fits law (2, 4, 5) float32 on cpu with impl='cuda':" in text
    assert "cuda       refused: device cpu" in text
    assert 'cpu        available; pass impl="cpu" to use it' in text
    with pytest.raises(NotImplementedError, match="cuda       refused: this op has none"):
        d.law_probs(P, impl="cuda")
