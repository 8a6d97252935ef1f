# SPDX-License-Identifier: Apache-2.0
"""The fused head over impl x dtype x shape: every statistic and every gradient, against two references."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from helpers import misaligned, strided
from hotloop.front import impl as _impl
from hotloop.logprob import _cpu, linear_logprob
from logprob_cases import (
    OPTIONAL,
    LmHead,
    backward,
    by_dtype,
    by_impl,
    check,
    differentiable,
    make_head,
    ours,
    plain,
    upstream,
)

# Rows: none; one; a few with ignored ones between; a block. Width: a product of one term; a small one; one that
# is no multiple of a vector. Vocabulary: one class; less than a vector; a tile of 512; a tile and one column; two
# tiles and a rest that is prime to everything.
ROWS = (0, 1, 7, 64)
WIDTHS = (1, 8, 40)
VOCABULARIES = (1, 7, 512, 513, 1031)


@by_dtype
@by_impl
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.usefixtures("small_tiles")
def test_no_worse_than_torch(vocabulary: int, impl: str, dtype: torch.dtype) -> None:
    for n, width in product(ROWS, WIDTHS):
        head = make_head(n, width, vocabulary, dtype, bias=n != 7)
        check(head, impl=impl)
        check(head, impl=impl, with_entropy=False)
        assert _impl.last_impl("linear_logprob") == impl


@by_dtype
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(("temperature", "logit_scale"), [(1.0, 1.0), (0.5, 1.0), (1.7, -0.3)])
@pytest.mark.usefixtures("small_tiles")
def test_logit_maps(
    temperature: float, logit_scale: float, softcap: float | None, bias: bool, dtype: torch.dtype
) -> None:
    head = make_head(33, 8, 513, dtype, bias=bias)
    for impl in ("cpu", "reference"):
        options = {"temperature": temperature, "logit_scale": logit_scale, "softcap": softcap}
        check(head, impl=impl, **options)
        check(head, impl=impl, with_entropy=False, **options)


@by_dtype
def test_one_tile_of_default_width(dtype: torch.dtype) -> None:
    check(make_head(33, 8, 1031, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["hidden", "weight", "transposed weight", "misaligned", "sliced"])
@pytest.mark.usefixtures("small_tiles")
def test_layouts(case: str, dtype: torch.dtype) -> None:
    """Strides in the last dimension, a tied weight stored as [D, V], odd addresses, rows of a wider matrix."""
    head = make_head(20, 8, 700, dtype)
    rows, grads, _ = ours(head)
    change = {
        "hidden": lambda h: LmHead(strided(h.hidden), h.weight, strided(h.bias), strided(h.labels)),
        "weight": lambda h: LmHead(h.hidden, strided(h.weight), h.bias, h.labels),
        "transposed weight": lambda h: LmHead(h.hidden, h.weight.t().contiguous().t(), h.bias, h.labels),
        "misaligned": lambda h: LmHead(
            misaligned(h.hidden), misaligned(h.weight), misaligned(h.bias), misaligned(h.labels)
        ),
        "sliced": lambda h: LmHead(
            torch.nn.functional.pad(h.hidden, (2, 3))[:, 2:-3], torch.nn.functional.pad(h.weight, (1, 4))[:, 1:-4],
            h.bias, h.labels,
        ),
    }[case]  # fmt: skip
    changed = change(head)
    for x in changed.tensors():
        x.requires_grad_()
    out = changed.run(statistics=OPTIONAL)
    again = differentiable(out)
    found = backward(again, upstream(20), changed.tensors())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close([*again, *found], [*rows, *grads], rtol=tolerance, atol=tolerance)


@by_impl
def test_batches_of_sequences(impl: str) -> None:
    head = make_head(24, 8, 37)
    flat = linear_logprob(head.hidden, head.weight, head.labels, statistics=OPTIONAL, impl=impl)
    for shape in ((4, 6), (2, 3, 4), (1, 24), (24, 1)):
        out = linear_logprob(
            head.hidden.reshape(*shape, 8),
            head.weight,
            head.labels.reshape(shape),
            statistics=OPTIONAL,
            impl=impl,
        )
        for a, b in zip(out, flat):
            assert a is not None
            assert b is not None
            assert a.shape == shape
            assert torch.equal(a.reshape(-1), b)
    one = linear_logprob(head.hidden[1], head.weight, head.labels[1], impl=impl)
    assert one.logps.shape == ()
    torch.testing.assert_close(one.logps, flat.logps[1])


@by_impl
def test_int32_labels(impl: str) -> None:
    head = make_head(24, 8, 37)
    for a, b in zip(ours(head, impl=impl), ours(head.with_labels(head.labels.int()), impl=impl)):
        for x, y in zip(a, b):
            assert torch.equal(x, y)


@by_impl
@pytest.mark.parametrize("wanted", range(32))
def test_what_is_asked_for_and_nothing_else(wanted: int, impl: str) -> None:
    names = tuple(name for k, name in enumerate(OPTIONAL) if wanted >> k & 1)
    head = make_head(5, 4, 9)
    whole = head.run(statistics=OPTIONAL, impl=impl)
    out = head.run(statistics=names, impl=impl)
    for name in OPTIONAL:
        value = getattr(out, name)
        assert (value is not None) == (name in names)
        assert value is None or torch.equal(value, getattr(whole, name))
    assert torch.equal(out.logps, whole.logps)


@by_impl
@pytest.mark.parametrize("subset", range(8))
def test_any_subset_of_inputs_may_require_grad(subset: int, impl: str) -> None:
    head = make_head(20, 8, 37)
    _, whole, _ = ours(head, impl=impl)
    h = head.leaves()
    for k, x in enumerate(h.tensors()):
        x.requires_grad_(bool(subset >> k & 1))
    out = h.run(statistics=OPTIONAL, impl=impl)
    assert out.logps.requires_grad == (subset != 0)
    assert out.argmax_hit is not None
    assert not out.argmax_hit.requires_grad
    needed = [x for x in h.tensors() if x.requires_grad]
    if needed:
        expected = [g for g, x in zip(whole, h.tensors()) if x.requires_grad]
        for a, b in zip(backward(differentiable(out), upstream(20), needed), expected):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["logps", *OPTIONAL[:4]])
def test_the_gradient_of_one_statistic_alone(name: str) -> None:
    head = make_head(20, 8, 37, torch.float64)
    grads = []
    for call in (linear_logprob, None):
        h = head.leaves()
        if call is not None:
            row = getattr(
                call(h.hidden, h.weight, h.labels, bias=h.bias, statistics=OPTIONAL), name
            )
        else:
            z = h.hidden @ h.weight.t() + h.bias
            logp = z.log_softmax(1)
            valid = h.labels >= 0
            row = (
                valid
                * {
                    "logps": logp[torch.arange(20), h.labels.clamp(min=0)],
                    "entropy": -(logp.exp() * logp).sum(1),
                    "lse": z.logsumexp(1),
                    "sum_p2": (2 * logp).exp().sum(1),
                    "mean_logit": z.mean(1),
                }[name]
            )
        grads.append(backward([row], upstream(20), h.tensors()))
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


def test_gradcheck_of_both_implementations() -> None:
    head = make_head(5, 3, 7, torch.float64)
    for impl in ("cpu", "reference"):
        h = head.leaves()

        def call(
            hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, impl: str = impl
        ) -> tuple:
            out = linear_logprob(
                hidden, weight, head.labels, bias=bias, softcap=4.0, statistics=OPTIONAL[:4],
                impl=impl,
            )  # fmt: skip
            return tuple(differentiable(out))

        assert torch.autograd.gradcheck(call, h.tensors())


def test_bfloat16_weight_gradient_is_rounded_once() -> None:
    """4096 tokens per row of the head: sums in bfloat16 would lose everything below a 256th of the whole."""
    head = make_head(4096, 8, 7, torch.bfloat16, bias=False, ignore=False)
    _, (_, exact), _ = plain(head.to(torch.float64))
    _, (_, other), _ = plain(head)
    _, (_, found), _ = ours(head)
    spacing = torch.finfo(torch.bfloat16).eps
    rounding = (exact.abs() * spacing).max()
    error, torchs = ((x.double() - exact).abs().max() for x in (found, other))
    assert error <= rounding + torchs


@pytest.mark.usefixtures("small_tiles")
def test_bfloat16_hidden_gradient_is_summed_in_float32_over_tiles() -> None:
    """Sixteen tiles: rounding the sum after each would add an error of sixteen roundings."""
    head = make_head(8, 16, 8192, torch.bfloat16, bias=False, ignore=False)
    _, (exact, _), _ = plain(head.to(torch.float64))
    _, (other, _), _ = plain(head)
    _, (found, _), _ = ours(head)
    rounding = (exact.abs() * torch.finfo(torch.bfloat16).eps).max()
    error, torchs = ((x.double() - exact).abs().max() for x in (found, other))
    assert error <= rounding + torchs


def test_a_bias_of_another_dtype() -> None:
    head = make_head(20, 8, 37, torch.bfloat16)
    assert head.bias is not None
    wide = LmHead(head.hidden, head.weight, head.bias.float(), head.labels).leaves()
    out = wide.run()
    assert out.logps.dtype == torch.float32
    found = torch.autograd.grad(out.logps.sum(), wide.tensors())
    assert [g.dtype for g in found] == [torch.bfloat16, torch.bfloat16, torch.float32]
    _, (_, _, exact), _ = _logp_only(head.to(torch.float64))
    assert (found[2].double() - exact).abs().max() <= 20 * torch.finfo(torch.bfloat16).eps


def _logp_only(head: LmHead) -> tuple[None, list[torch.Tensor], None]:
    h = head.leaves()
    out = h.run(impl="reference")
    return None, list(torch.autograd.grad(out.logps.sum(), h.tensors())), None


def test_a_tile_fits_what_it_is_meant_to_fit() -> None:
    products = _cpu.Products(torch.zeros(512, 8), torch.zeros(128_000, 8), 0)
    assert products.tile_columns * 512 * 4 == _cpu._TILE_BYTES
    assert products.kept_columns == 0
