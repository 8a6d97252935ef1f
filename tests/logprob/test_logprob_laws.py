# SPDX-License-Identifier: Apache-2.0
"""Laws that need no reference, extreme numbers, and ties."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hotloop.logprob import LogprobStatistics, linear_logprob, token_logprob
from hypothesis import given, settings
from hypothesis import strategies as st
from logprob_cases import OPTIONAL, by_impl, make_head, ours
from torch import Tensor

INF, NAN = math.inf, math.nan


def of_logits(
    z: Tensor, labels: Tensor | None = None, impl: str = "cpu", **options: object
) -> LogprobStatistics:
    y = torch.zeros(z.shape[0], dtype=torch.int64) if labels is None else labels
    return token_logprob(z, y, statistics=OPTIONAL, impl=impl, **options)


@by_impl
@pytest.mark.usefixtures("small_tiles")
def test_a_constant_added_to_every_logit_changes_only_lse_and_mean(impl: str) -> None:
    head = make_head(30, 8, 1031, ignore=False)
    assert head.bias is not None
    rows, grads, hit = ours(head, impl=impl)
    head.bias += 5.0
    shifted_rows, shifted_grads, shifted_hit = ours(head, impl=impl)
    for k, shift in enumerate((0.0, 0.0, 5.0, 0.0, 5.0)):
        torch.testing.assert_close(shifted_rows[k], rows[k] + shift, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shifted_grads, grads, rtol=1e-4, atol=1e-4)
    assert torch.equal(hit, shifted_hit)


@by_impl
def test_bounds(impl: str) -> None:
    head = make_head(64, 8, 300, ignore=False, size=4.0)
    out = linear_logprob(head.hidden, head.weight, head.labels, statistics=OPTIONAL, impl=impl)
    z = head.hidden @ head.weight.t()
    entropy, lse, p2 = out.entropy, out.lse, out.sum_p2
    assert entropy is not None
    assert lse is not None
    assert p2 is not None
    assert bool((out.logps <= 0).all())
    assert bool((entropy >= -1e-6).all())
    assert bool((entropy <= math.log(300) + 1e-6).all())
    assert bool((lse >= z.amax(1)).all())
    assert bool((lse <= z.amax(1) + math.log(300)).all())
    assert bool((p2 >= 1 / 300).all())
    assert bool((p2 <= 1).all())
    # Jensen: the collision entropy -log sum p^2 is at most the Shannon entropy.
    assert bool((-p2.log() <= entropy + 1e-5).all())


@by_impl
def test_uniform_and_one_hot(impl: str) -> None:
    uniform = of_logits(torch.full((1, 513), 2.5), impl=impl)
    torch.testing.assert_close(uniform.logps, torch.tensor([-math.log(513)]))
    torch.testing.assert_close(uniform.entropy, torch.tensor([math.log(513)]))
    torch.testing.assert_close(uniform.sum_p2, torch.tensor([1 / 513]))
    z = torch.zeros(1, 513)
    z[0, 500] = 200.0
    sharp = of_logits(z, torch.tensor([500]), impl=impl)
    assert sharp.logps.tolist() == [0.0]
    assert sharp.lse.tolist() == [200.0]
    assert sharp.sum_p2.tolist() == [1.0]
    assert abs(float(sharp.entropy)) < 2e-5
    assert sharp.argmax_hit.tolist() == [True]


@by_impl
def test_one_class_is_certain(impl: str) -> None:
    out = of_logits(torch.tensor([[3.0], [-7.0]]), impl=impl)
    assert [x.tolist() for x in out] == [[0, 0], [0, 0], [3, -7], [1, 1], [3, -7], [True, True]]


@by_impl
def test_entropy_grows_and_certainty_falls_with_the_temperature(impl: str) -> None:
    head = make_head(30, 8, 200, ignore=False)
    found = [
        linear_logprob(
            head.hidden,
            head.weight,
            head.labels,
            temperature=t,
            statistics=("entropy", "sum_p2"),
            impl=impl,
        )
        for t in (0.25, 0.5, 1.0, 2.0, 4.0)
    ]
    for cold, hot in pairwise(found):
        assert bool((hot.entropy > cold.entropy - 1e-5).all())
        assert bool((hot.sum_p2 < cold.sum_p2 + 1e-6).all())


@by_impl
def test_temperature_is_a_scale_of_the_logits(impl: str) -> None:
    head = make_head(30, 8, 200)
    a = linear_logprob(
        head.hidden, head.weight, head.labels, temperature=2.0, statistics=OPTIONAL, impl=impl
    )
    b = linear_logprob(
        head.hidden, head.weight, head.labels, logit_scale=0.5, statistics=OPTIONAL, impl=impl
    )
    c = linear_logprob(head.hidden / 2, head.weight, head.labels, statistics=OPTIONAL, impl=impl)
    for x, y, z in zip(a, b, c):
        torch.testing.assert_close(x, y)
        torch.testing.assert_close(x, z)


@by_impl
def test_a_wide_softcap_is_none_and_a_narrow_one_bounds_the_logits(impl: str) -> None:
    head = make_head(30, 8, 200)
    a = linear_logprob(
        head.hidden, head.weight, head.labels, softcap=1e6, statistics=("lse",), impl=impl
    )
    b = linear_logprob(head.hidden, head.weight, head.labels, statistics=("lse",), impl=impl)
    torch.testing.assert_close(a.lse, b.lse, rtol=1e-5, atol=1e-5)
    capped = linear_logprob(
        head.hidden, head.weight, head.labels, softcap=0.5, statistics=("lse",), impl=impl
    )
    valid = head.labels != -100
    assert bool(((capped.lse[valid] - math.log(200)).abs() <= 0.5).all())
    assert bool((capped.logps >= -math.log(200) - 1.0).all())


@by_impl
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_logits(size: float, impl: str) -> None:
    """Nothing overflows. float32 spaces numbers of 1e4 by 1e-3, so differences are good to a few of these."""
    z = torch.linspace(-3, 3, 700).repeat(3, 1) + size
    z[1] = torch.linspace(-1, 1, 700) * size
    labels = torch.tensor([699, 0, 350])
    exact = z.double().log_softmax(1)
    leaf = z.clone().requires_grad_()
    out = of_logits(leaf, labels, impl)
    assert all(bool(x.isfinite().all()) for x in out)
    torch.testing.assert_close(
        out.logps.double(), exact[torch.arange(3), labels], rtol=1e-6, atol=3e-3
    )
    torch.testing.assert_close(
        out.entropy.double(), -(exact.exp() * exact).sum(1), rtol=1e-6, atol=5e-3
    )
    (g,) = torch.autograd.grad(out.logps.sum(), leaf)
    expected = -exact.exp()
    expected[torch.arange(3), labels] += 1
    torch.testing.assert_close(g.double(), expected, rtol=3e-3, atol=1e-5)


@by_impl
@pytest.mark.usefixtures("small_tiles")
def test_a_logit_of_minus_infinity_is_a_token_that_cannot_be(impl: str) -> None:
    """Through a bias of -inf, as constrained decoding masks tokens; the second tile is masked whole."""
    head = make_head(20, 8, 1300, torch.float64, ignore=False)
    assert head.bias is not None
    head.bias[512:1024] = -INF
    head.bias[3] = -INF
    keep = torch.isfinite(head.bias)
    head.labels = torch.randint(512, (20,), generator=torch.Generator().manual_seed(3)).clamp(min=4)
    h = head.leaves()
    out = h.run(statistics=OPTIONAL, impl=impl)
    inside = torch.cumsum(keep, 0)[h.labels] - 1
    other = linear_logprob(
        h.hidden,
        h.weight[keep],
        inside,
        bias=h.bias[keep],
        statistics=OPTIONAL,
        impl="reference",
    )
    for name in ("logps", "entropy", "lse", "sum_p2", "argmax_hit"):
        torch.testing.assert_close(getattr(out, name), getattr(other, name))
    assert bool((out.mean_logit == -INF).all())
    for name in ("logps", "entropy", "sum_p2", "lse"):
        weights = torch.linspace(0.5, 1.5, 20, dtype=torch.float64)
        found, expected = (
            torch.autograd.grad(getattr(o, name), h.tensors(), weights, retain_graph=True)
            for o in (out, other)
        )
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@by_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_given_logits_of_minus_infinity(dtype: torch.dtype, impl: str) -> None:
    z = torch.randn(4, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    z[:, ::3] = -INF
    z[3] = -INF  # nothing is possible
    labels = torch.tensor([1, 0, 2, 1])  # the second label is impossible
    leaf = z.clone().requires_grad_()
    out = of_logits(leaf, labels, impl)
    other = z.float().log_softmax(1)
    torch.testing.assert_close(out.logps, other[torch.arange(4), labels], equal_nan=True)
    torch.testing.assert_close(out.lse, z.float().logsumexp(1))
    (g,) = torch.autograd.grad(out.logps[:3].sum() + out.entropy[:3].sum(), leaf)
    assert bool(g[:3].isfinite().all())
    assert not g[0][z[0] == -INF].any()


@by_impl
@pytest.mark.parametrize("bad", [NAN, INF])
def test_nan_and_infinity_stay_in_their_row(bad: float, impl: str) -> None:
    z = torch.randn(3, 700)
    clean = of_logits(z, impl=impl)
    z[1, 600] = bad
    leaf = z.clone().requires_grad_()
    out = of_logits(leaf, impl=impl)
    assert torch.equal(out.logps.isnan(), z.log_softmax(1)[:, 0].isnan())
    for name in ("entropy", "sum_p2"):
        assert getattr(out, name).isnan().tolist() == [False, True, False]
    assert not bool(out.lse[1].isfinite())
    for a, b in zip(out, clean):
        assert torch.equal(a[::2], b[::2])
    (g,) = torch.autograd.grad(out.logps.sum(), leaf)
    assert bool(g[::2].isfinite().all())
    assert bool(g[1].isnan().all())


@by_impl
@pytest.mark.usefixtures("small_tiles")
def test_the_first_of_equal_maxima_is_the_argmax(impl: str) -> None:
    """Ties inside a chunk, across tiles, and of everything; as torch.argmax."""
    weight = torch.zeros(1400, 4)
    places = [[700], [5, 6], [3, 1300], [511, 512], [512, 1024], list(range(1400))]
    for at in places:
        weight.zero_()
        weight[at] = 1.0
        for label in (at[0], at[-1]):
            out = linear_logprob(
                torch.ones(1, 4),
                weight,
                torch.tensor([label]),
                statistics=("argmax_hit",),
                impl=impl,
            )
            assert out.argmax_hit.tolist() == [label == at[0]], at


@by_impl
def test_permuting_the_vocabulary_permutes_nothing_else(impl: str) -> None:
    head = make_head(20, 8, 300, torch.float64, ignore=False)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    place = torch.argsort(order)
    a = head.run(statistics=OPTIONAL, impl=impl)
    b = linear_logprob(
        head.hidden,
        head.weight[order],
        place[head.labels],
        bias=head.bias[order],
        statistics=OPTIONAL,
        impl=impl,
    )
    torch.testing.assert_close(a, b)


@by_impl
def test_probabilities_of_all_labels_sum_to_one(impl: str) -> None:
    head = make_head(1, 8, 301, torch.float64, ignore=False)
    hidden = head.hidden.expand(301, 8)
    out = linear_logprob(
        hidden, head.weight, torch.arange(301), bias=head.bias, statistics=OPTIONAL, impl=impl
    )
    assert float(out.logps.exp().sum()) == pytest.approx(1, rel=1e-12)
    assert float((2 * out.logps).exp().sum()) == pytest.approx(float(out.sum_p2[0]), rel=1e-12)
    assert float(-(out.logps.exp() * out.logps).sum()) == pytest.approx(
        float(out.entropy[0]), rel=1e-10
    )
    assert int(out.argmax_hit.sum()) == 1


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(0, 9), width=st.integers(1, 9), vocabulary=st.integers(1, 70), tile=st.integers(1, 40),
    seed=st.integers(0, 1000), temperature=st.floats(0.2, 5), softcap=st.sampled_from([None, 2.0]),
)  # fmt: skip
def test_any_shape_and_any_tile_width(
    n: int,
    width: int,
    vocabulary: int,
    tile: int,
    seed: int,
    temperature: float,
    softcap: float | None,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hotloop.logprob._cpu._TILE_BYTES", 1)
        patch.setattr("hotloop.logprob._cpu._LEAST_TILE_COLUMNS", tile)
        patch.setenv("HOTLOOP_WORKSPACE_MB", str((seed % 3) * 1e-3 + 1e-6))
        head = make_head(n, width, vocabulary, torch.float64, seed=seed)
        options = {"temperature": temperature, "softcap": softcap}
        (rows, grads, hit), (r, g, h) = (
            ours(head, impl=impl, **options) for impl in ("cpu", "reference")
        )
        torch.testing.assert_close([*rows, *grads, hit], [*r, *g, h], rtol=1e-9, atol=1e-10)
