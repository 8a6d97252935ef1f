# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of the room, run on the CPU by Triton's interpreter.

Whether a kernel is interpreted is decided when it is decorated, once per process. So the file has
two faces: in an ordinary run the kernels are compiled (not run), and one test starts pytest on this
same file with TRITON_INTERPRET=1; in that process the tests of values exist.
"""

from __future__ import annotations

import os
import re
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("triton", reason="triton is not installed")

import torch
import triton
from processes import python
from torch import Tensor

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

# The interpreter is numpy: inf - inf in a branch that a select discards warns there, not on a GPU.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def assert_no_worse_than_torch(ours: Tensor, same_dtype: Tensor, truth: Tensor) -> None:
    """max |ours - truth| <= 2 max |torch - truth| + 1e-6 scale, scale = max(1, max |truth|).

    torch's error counts as at least half a unit in the last place of the largest value: where the
    result is one number or a few, rounding may have been kind to it.
    """
    assert ours.shape == truth.shape
    if truth.numel() == 0:
        return
    error = (ours.double() - truth).abs().max()
    allowed = 2 * (same_dtype.double() - truth).abs().max()
    allowed = max(allowed, torch.finfo(ours.dtype).eps * truth.abs().max())
    scale = max(1.0, float(truth.abs().max()))
    assert error <= allowed + 1e-6 * scale, f"{float(error):.3e} > {float(allowed):.3e}"


if not INTERPRETING:
    # Types of kernel arguments by name; whatever is not here is a 32 bit integer. `None` stands for
    # an absent tensor, as at run time.
    FLOATS = ("scale", "cap", "inverse_temperature", "beta", "scale_s", "cap_s", "inverse_s")
    FLOATS += ("scale_t", "cap_t", "inverse_t")
    POINTERS = {
        "*i64": ("label_ptr", "index_ptr", "count_ptr", "before_ptr", "best_ptr", "argmax_ptr"),
        "*fp32": ("bias_ptr", "bs_ptr", "bt_ptr", "coefficient_ptr", "partial_ptr", "dbias_ptr"),
        "*u8": ("valid_ptr",),
    }
    OPTIONAL = {
        "HAS_BIAS": ("bias_ptr",),
        "BIAS_S": ("bs_ptr",),
        "BIAS_T": ("bt_ptr",),
        "HAS_INDEX": ("index_ptr", "count_ptr"),
        "HAS_VALID": ("valid_ptr",),
        "NEED_BIAS": ("dbias_ptr",),
        "ARGMAX": ("best_ptr", "argmax_ptr"),
        "MIXTURE": ("coefficient_ptr",),
    }

    def compile_for_hopper(
        kernel: Any, flag: bool, sizes: dict[str, int], *, even: bool = False, **options: int
    ) -> Any:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature: dict[str, str] = {}
        constants: dict[str, object] = {}
        for name in kernel.arg_names:
            if name.isupper():
                constants[name] = sizes.get(name, False if name == "UPCAST" else flag)
            elif name.endswith("_ptr"):
                types = [t for t, names in POINTERS.items() if name in names]
                signature[name] = types[0] if types else "*bf16"
            else:
                signature[name] = "fp32" if name in FLOATS else "i32"
        for constant, names in OPTIONAL.items():
            if constants.get(constant) is False:
                constants.update({name: None for name in names if name in kernel.arg_names})
        signature.update(dict.fromkeys(constants, "constexpr"))
        order = {name: signature[name] for name in kernel.arg_names}
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(kernel.arg_names)
            if order[name].startswith("*")
            or name.startswith(("stride", "inner"))
            # Sizes that 16 divides, where the kernel is specialised on them.
            or (even and order[name] == "i32" and not kernel.params[i].do_not_specialize)
        }
        source = ASTSource(fn=kernel, signature=order, constexprs=places, attrs=aligned)
        return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)

    def kernels() -> list[Any]:
        import hotloop.kernels.logprob.linear_divergence as two
        import hotloop.kernels.logprob.linear_logprob as one
        from hotloop.kernels.logprob import tiles

        return [
            pytest.param(module, name, id=name)
            for module in (tiles, one, two)
            for name in vars(module)
            if name.endswith("_kernel")
        ]

    @pytest.mark.parametrize(("module", "name"), kernels())
    @pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")
    def test_compiles_for_hopper_within_its_shared_memory(module: Any, name: str) -> None:
        """The interpreter accepts what the compiler does not, and that one needs no GPU."""
        config = getattr(module, "HALF", None)
        sizes, options = {"BLOCK": 128, "BLOCK_COLUMNS": 2048}, {}
        if config is not None and "_linear_" in name:
            sizes["BLOCK_ROWS"], sizes["BLOCK_COLUMNS"] = config.block_rows, config.block_columns
            sizes["BLOCK_INNER"] = config.block_inner
            options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        for flag in (False, True):
            compiled = compile_for_hopper(getattr(module, name), flag, sizes, **options)
            assert compiled.metadata.shared <= 227 * 1024
            if "_linear_" in name:
                assert "wgmma" in compiled.asm["ptx"]

    @pytest.mark.parametrize("pair", [False, True])
    @pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")
    def test_gradient_tiles_leave_in_128_bit_stores(pair: bool) -> None:
        import hotloop.kernels.logprob.linear_divergence as two
        import hotloop.kernels.logprob.linear_logprob as one

        module = two if pair else one
        kernel = two._linear_divergence_bwd_kernel if pair else one._linear_logprob_bwd_kernel
        config = module.HALF
        sizes = {
            "BLOCK_ROWS": config.block_rows,
            "BLOCK_COLUMNS": config.block_columns,
            "BLOCK_INNER": config.block_inner,
        }
        compiled = compile_for_hopper(
            kernel,
            False,
            sizes,
            even=True,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        # Whatever the kernel writes to global memory; with 16 bit stores each element would be one of its own.
        stores = re.findall(r"st\.global\.[\w.]+", compiled.asm["ptx"])
        elements = config.block_rows * config.block_columns // (32 * config.num_warps)
        assert set(stores) == {"st.global.v4.b32"}
        assert len(stores) >= elements // 8

    def test_kernels_in_the_interpreter() -> None:
        words = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__)
        result = python(*words, timeout=280, TRITON_INTERPRET="1")
        assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]

else:
    import hotloop.kernels.logprob.linear_divergence as two
    import hotloop.kernels.logprob.linear_logprob as one
    from hotloop.kernels.logprob import tiles
    from hotloop.kernels.logprob.tiles import Config, RowConfig, Transform

    # Several tiles, splits and steps of D at these sizes; `None` is what a GPU would run.
    SMALL = Config(16, 16, 16, num_warps=1, num_stages=1, l2_bytes=16 * 40 * 4, workspace_rows=32)
    SMALL_ROWS = RowConfig(block_columns=128, num_warps=1)
    # (n, D, V): nothing; one of everything; less than a block, one class; blocks and a rest.
    SHAPES = ((0, 8, 7), (1, 8, 1), (5, 8, 7), (33, 40, 1), (33, 40, 130))
    TRANSFORMS = (Transform(), Transform(0.5, 0.0, 2.0), Transform(1.5, 4.0, 0.7))
    IGNORE = -100

    def to_z(u: Tensor, t: Transform) -> Tensor:
        y = u * t.scale
        if t.softcap > 0:
            y = t.softcap * torch.tanh(y / t.softcap)
        return y / t.temperature

    def make(n: int, inner: int, vocabulary: int, dtype: torch.dtype, *, strided: bool = False):
        g = torch.Generator().manual_seed(1000 * n + inner + vocabulary)
        width = inner + 3 if strided else inner
        hidden = torch.randn(n, width, generator=g).to(dtype)[:, :inner]
        weight = (torch.randn(vocabulary, width, generator=g) * 0.4).to(dtype)[:, :inner]
        bias = torch.randn(vocabulary, generator=g)
        labels = torch.randint(0, vocabulary, (n,), generator=g)
        return hidden, weight, bias, labels

    def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, wide: torch.dtype) -> Tensor:
        """float64: the truth. float32: plain torch, its product in the storage dtype."""
        if wide == torch.float64:
            u = hidden.double() @ weight.double().t()
        else:
            u = (hidden @ weight.t()).float()
        return u if bias is None else u + bias.to(u.dtype)

    def derived(z: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """logp, lse, entropy, sum p^2, sum z: what the statistics are for."""
        lse = z.logsumexp(1)
        logp = z - lse[:, None]
        p = logp.exp()
        return (
            z.gather(1, labels[:, None])[:, 0] - lse,
            lse,
            -(p * logp).sum(1),
            (p * p).sum(1),
            z.sum(1),
        )

    def from_statistics(s: Tensor) -> tuple[Tensor, ...]:
        lse = s[0] + s[1].log()
        return s[5] - lse, lse, lse - s[2] / s[1], s[3] / (s[1] * s[1]), s[4]

    def coefficients_of(s: Tensor, upstream: Tensor) -> Tensor:
        """RowGradient of the five derived values, weighted by `upstream` [5, n]."""
        _, lse, entropy, square, _ = from_statistics(s)
        logp, up_lse, up_entropy, up_square, up_sum = upstream
        a = -logp + up_lse + up_entropy * (lse - entropy) - 2 * up_square * square
        return torch.stack([lse, a, -up_entropy, 2 * up_square, up_sum, logp])

    @pytest.mark.parametrize("config", [SMALL, None], ids=["small", "default"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_one_head(shape, dtype, config) -> None:
        n, inner, vocabulary = shape
        t = TRANSFORMS[(n + vocabulary) % 3]
        with_bias = n != 5
        hidden, weight, bias, labels = make(n, inner, vocabulary, dtype, strided=True)
        bias = bias if with_bias else None
        # Row 0 stands in for the rows a block lacks, so it must be one that must not be seen.
        ignored = (torch.arange(n) % 3 == 0) & (n > 1)
        labels = labels.masked_fill(ignored, IGNORE)
        keep = ~ignored
        # Whatever an ignored row holds must not be seen.
        hidden[ignored] = float("nan")
        numbers = {"scale": t.scale, "softcap": t.softcap, "temperature": t.temperature}
        statistics, argmax = one.forward(
            hidden, weight, bias, labels, **numbers, argmax=True, ignore_index=IGNORE, config=config
        )
        assert statistics.shape == (6, n)
        neutral = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 0.0])
        assert (statistics[:, ignored] == neutral[:, None]).all()
        x, y = hidden[keep], labels[keep]
        truth_z = to_z(logits_of(x, weight, bias, torch.float64), t)
        torch_z = to_z(logits_of(x, weight, bias, torch.float32), t)
        for ours, same, truth in zip(
            from_statistics(statistics[:, keep]), derived(torch_z, y), derived(truth_z, y)
        ):
            assert_no_worse_than_torch(ours, same, truth)
        assert torch.equal(argmax[keep], truth_z.argmax(1))

        upstream = torch.randn(5, n, generator=torch.Generator().manual_seed(n))
        coefficients = coefficients_of(statistics, upstream)
        coefficients[:, ignored] = float("nan")
        dhidden, dweight, dbias = one.backward(
            hidden, weight, bias, labels, coefficients, **numbers, ignore_index=IGNORE,
            need_bias=with_bias, workspace_bytes=8000, config=config,
        )  # fmt: skip
        assert dhidden.dtype == dtype
        assert dweight.dtype == dtype
        assert not dhidden[ignored].any()

        def gradients(wide: torch.dtype, store: torch.dtype) -> list[Tensor]:
            leaves = [x.to(store).requires_grad_(), weight.to(store).requires_grad_()]
            if bias is not None:
                leaves.append(bias.to(wide).requires_grad_())
            z = to_z(logits_of(leaves[0], leaves[1], leaves[2] if with_bias else None, wide), t)
            total = sum((u * v).sum() for u, v in zip(upstream[:, keep].to(wide), derived(z, y)))
            return list(torch.autograd.grad(total, leaves))

        truth = gradients(torch.float64, torch.float64)
        same = gradients(torch.float32, dtype)
        ours = [dhidden[keep], dweight] + ([dbias] if with_bias else [])
        for a, b, c in zip(ours, same, truth):
            assert_no_worse_than_torch(a, b, c)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_logits_of_one_head(dtype) -> None:
        t = TRANSFORMS[2]
        numbers = {"scale": t.scale, "softcap": t.softcap, "temperature": t.temperature}
        for n, vocabulary in ((0, 7), (1, 1), (5, 300)):
            g = torch.Generator().manual_seed(n)
            logits = (torch.randn(n, vocabulary + 2, generator=g) * 3).to(dtype)[:, :vocabulary]
            bias = torch.randn(vocabulary, generator=g)
            labels = torch.randint(0, vocabulary, (n,), generator=g)
            ignored = torch.arange(n) == 2
            labels = labels.masked_fill(ignored, IGNORE)
            keep = ~ignored
            statistics, argmax = one.logits_statistics(
                logits,
                labels,
                bias=bias,
                **numbers,
                argmax=True,
                ignore_index=IGNORE,
                config=SMALL_ROWS,
            )
            leaf = logits.double().requires_grad_()
            truth_z = to_z(leaf + bias.double(), t)[keep]
            torch_z = to_z(logits.float() + bias, t)[keep]
            y = labels[keep]
            values = derived(truth_z, y)
            for a, b, c in zip(from_statistics(statistics[:, keep]), derived(torch_z, y), values):
                assert_no_worse_than_torch(a, b, c.detach())
            assert torch.equal(argmax[keep], truth_z.argmax(1))
            upstream = torch.randn(5, n, generator=g)
            total = sum((u * v).sum() for u, v in zip(upstream[:, keep].double(), values))
            (truth,) = torch.autograd.grad(total, leaf)
            coefficients = coefficients_of(statistics, upstream)
            fresh = one.logits_gradient(
                logits,
                labels,
                coefficients,
                bias=bias,
                **numbers,
                ignore_index=IGNORE,
                config=SMALL_ROWS,
            )
            # One rounding to the storage dtype is what torch would add to its float32 gradient.
            assert_no_worse_than_torch(fresh, truth.to(dtype), truth)
            copy = logits.clone()
            one.logits_gradient(
                copy, labels, coefficients, bias=bias, **numbers, ignore_index=IGNORE, out=copy
            )
            assert_no_worse_than_torch(copy, truth.to(dtype), truth)

    def test_argmax_takes_the_first_of_equal_maxima_across_tiles_and_splits() -> None:
        hidden = torch.ones(3, 8)
        weight = torch.zeros(130, 8)
        weight[[17, 18, 40, 129]] = 1.0
        labels = torch.zeros(3, dtype=torch.int64)
        _, argmax = one.forward(hidden, weight, None, labels, argmax=True, config=SMALL)
        assert argmax.tolist() == [17, 17, 17]
        _, argmax = one.logits_statistics(
            hidden @ weight.t(), labels, argmax=True, config=SMALL_ROWS
        )
        assert argmax.tolist() == [17, 17, 17]

    def test_label_of_another_part_of_the_vocabulary_is_nan_and_maxima_are_global() -> None:
        hidden, weight, _, labels = make(5, 8, 130, torch.float32)
        labels[0], labels[1] = 3, 90
        part, argmax = one.forward(
            hidden, weight[64:], None, labels, first_column=64, argmax=True, config=SMALL
        )
        z = hidden @ weight[64:].t()
        assert torch.isnan(part[5, 0])
        torch.testing.assert_close(part[5, 1], z[1, 90 - 64])
        assert torch.equal(argmax, 64 + z.argmax(1))

    def test_nan_reaches_every_sum_and_rows_of_minus_infinity_make_none() -> None:
        labels = torch.zeros(3, dtype=torch.int64)
        logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(0))
        logits[0, 200] = float("nan")
        logits[1] = -float("inf")
        logits[2, :256] = -float("inf")
        s, _ = one.logits_statistics(logits, labels, config=SMALL_ROWS)
        assert torch.isnan(s[1:5, 0]).all()
        assert s[:, 1].tolist() == [-float("inf"), 0.0, 0.0, 0.0, -float("inf"), -float("inf")]
        torch.testing.assert_close(s[0, 2] + s[1, 2].log(), logits[2].logsumexp(0))
        assert torch.isfinite(s[1:4, 2]).all()
        logits[0, 200] = 0.0
        d = two.statistics(two.Logits(logits), two.Logits(logits), config=SMALL_ROWS)
        assert not torch.isnan(d).any()

    def test_result_does_not_depend_on_the_order_of_programs_or_other_rows() -> None:
        hidden, weight, bias, labels = make(33, 40, 130, torch.float32)
        whole, _ = one.forward(hidden, weight, bias, labels, config=SMALL)
        again, _ = one.forward(hidden, weight, bias, labels, config=SMALL)
        assert torch.equal(whole, again)
        some = labels.masked_fill(torch.arange(33) % 2 == 0, IGNORE)
        fewer, _ = one.forward(hidden, weight, bias, some, ignore_index=IGNORE, config=SMALL)
        # numpy's product of a row depends, in the last bits, on where in the tile the row is: the
        # sum of 130 logits of about 5 then differs by up to 130 * 5 * 2^-24.
        torch.testing.assert_close(fewer[:, 1::2], whole[:, 1::2], rtol=1e-6, atol=4e-5)

    def test_rows_that_count_come_first_in_order() -> None:
        valid = torch.tensor([False, True, True, False, True])
        rows = tiles.Rows.where(valid, 5)
        assert rows.index.tolist() == [1, 2, 4, 0, 3]
        assert rows.count.tolist() == [3]

    def test_all_rows_ignored() -> None:
        hidden, weight, bias, labels = make(5, 8, 7, torch.float32)
        labels.fill_(IGNORE)
        s, _ = one.forward(hidden, weight, bias, labels, ignore_index=IGNORE)
        dhidden, dweight, dbias = one.backward(
            hidden, weight, bias, labels, s, ignore_index=IGNORE, need_bias=True
        )
        for gradient in (dhidden, dweight, dbias):
            assert not gradient.any()

    def test_splits_fill_the_chip_and_cover_the_vocabulary() -> None:
        for row_blocks, count, slots, group in (
            (64, 594, 132, 16),
            (1, 594, 132, 1),
            (3, 1, 132, 16),
        ):
            splits, per_split = tiles._split_tiles(row_blocks, count, slots, group)
            assert (splits - 1) * per_split < count <= splits * per_split
            waves = -(-row_blocks * splits // slots) * per_split
            assert waves <= max(1.15 * row_blocks * count / slots, 1)

    def divergences(s: Tensor, t: Tensor, beta: float) -> tuple[Tensor, ...]:
        """Forward KL, reverse KL and the two parts of JSD."""
        log_q, log_p = s.log_softmax(1), t.log_softmax(1)
        q, p = log_q.exp(), log_p.exp()
        log_m = (beta * p + (1 - beta) * q).log()
        return (
            (p * (log_p - log_q)).sum(1),
            (q * (log_q - log_p)).sum(1),
            (p * (log_p - log_m)).sum(1),
            (q * (log_q - log_m)).sum(1),
        )

    def kls_from_statistics(d: Tensor) -> tuple[Tensor, ...]:
        lse_s, lse_t = d[0] + d[1].log(), d[3] + d[4].log()
        return lse_s, lse_t, d[6] / d[4] + lse_s - lse_t, d[7] / d[1] + lse_t - lse_s

    @pytest.mark.parametrize("form", ["linear", "default", "logits"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_two_heads(dtype, form) -> None:
        beta = 0.3
        st, tt = Transform(1.5, 4.0, 0.7), Transform(1.0, 0.0, 2.0)
        shapes = ((0, 8, 7), (1, 8, 1), (5, 8, 7), (33, 40, 130))
        for n, inner, vocabulary in shapes[:3] if form == "default" else shapes:
            hidden, weight, bias, _ = make(n, inner, vocabulary, dtype, strided=True)
            teacher_hidden, teacher_weight, _, _ = make(n, 2 * inner, vocabulary, dtype)
            valid = (torch.arange(n) % 4 != 0) | (n == 1)
            hidden[~valid] = float("nan")
            x, xt = hidden[valid], teacher_hidden[valid]

            def logits_pair(wide, x, weight, bias, xt=xt, teacher_weight=teacher_weight):
                s = to_z(logits_of(x, weight, bias, wide), st)
                return s, to_z(logits_of(xt, teacher_weight, None, wide), tt)

            if form == "logits":
                student = two.Logits((hidden @ weight.t()), bias, st)
                teacher = two.Logits(teacher_hidden @ teacher_weight.t(), None, tt)
                leaf = student.logits[valid].double().requires_grad_()
                truth_pair = (
                    to_z(leaf + bias.double(), st),
                    to_z(teacher.logits[valid].double(), tt),
                )
                torch_pair = (
                    to_z(student.logits[valid].float() + bias, st),
                    to_z(teacher.logits[valid].float(), tt),
                )
                config = SMALL_ROWS
            else:
                student = two.LmHead(hidden, weight, bias, st)
                teacher = two.LmHead(teacher_hidden, teacher_weight, None, tt)
                truth_pair = logits_pair(torch.float64, x, weight, bias)
                torch_pair = logits_pair(torch.float32, x, weight, bias)
                config = SMALL if form == "linear" else None
            d = two.statistics(student, teacher, valid=valid, config=config)
            assert d.shape == (8, n)
            lse_s, lse_t, forward, reverse = kls_from_statistics(d)
            lses = torch.stack([lse_s, lse_t])
            m = two.mixture(student, teacher, lses, beta=beta, valid=valid, config=config)
            ours = (forward, reverse, m[0], m[1])
            for a, b, c in zip(
                ours, divergences(*torch_pair, beta), divergences(*truth_pair, beta)
            ):
                assert_no_worse_than_torch(a[valid], b, c.detach())
                assert not a[~valid].any()

            upstream = torch.randn(3, n, generator=torch.Generator().manual_seed(n))
            upstream[1, 1:2] = 0.0
            coefficients = torch.cat([lses, upstream, reverse[None], m[1:]])

            def total(s, t, upstream=upstream, valid=valid):
                f, r, a, b = divergences(s, t, beta)
                u = upstream[:, valid].to(s.dtype)
                return (u[0] * f + u[1] * r + u[2] * (beta * a + (1 - beta) * b)).sum()

            if form == "logits":
                (truth,) = torch.autograd.grad(total(*truth_pair), leaf)
                g = two.logits_gradient(
                    student, teacher, coefficients, beta=beta, jsd=True, valid=valid, config=config
                )
                assert not g[~valid].any()
                assert_no_worse_than_torch(g[valid], truth.to(dtype), truth)
                continue
            ours = two.gradient(
                student, teacher, coefficients, beta=beta, jsd=True, valid=valid, need_bias=True,
                workspace_bytes=8000, config=config,
            )  # fmt: skip
            assert not ours[0][~valid].any()

            def gradients(
                wide, store, x=x, weight=weight, bias=bias, logits_pair=logits_pair, total=total
            ):
                leaves = [x.to(store), weight.to(store), bias.to(wide)]
                leaves = [leaf.detach().requires_grad_() for leaf in leaves]
                return torch.autograd.grad(total(*logits_pair(wide, *leaves)), leaves)

            truth = gradients(torch.float64, torch.float64)
            same = gradients(torch.float32, dtype)
            for a, b, c in zip((ours[0][valid], *ours[1:]), same, truth):
                assert_no_worse_than_torch(a, b, c)

    def test_equal_heads_do_not_diverge() -> None:
        hidden, weight, bias, _ = make(5, 8, 130, torch.float32)
        head = two.LmHead(hidden, weight, bias)
        d = two.statistics(head, head, config=SMALL)
        lse_s, lse_t, forward, reverse = kls_from_statistics(d)
        assert torch.equal(lse_s, lse_t)
        assert not forward.any()
        assert not reverse.any()
        zeros, ones = torch.zeros(5), torch.ones(5)
        coefficients = torch.stack([lse_s, lse_t, ones, ones, zeros, reverse, zeros])
        for g in two.gradient(head, head, coefficients, need_bias=True, config=SMALL):
            assert not g.any()
