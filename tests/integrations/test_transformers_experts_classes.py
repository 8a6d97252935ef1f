# SPDX-License-Identifier: Apache-2.0
"""Every class of transformers that takes an experts implementation, alone: hotloop's against its own."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from experts_cases import EVERY, D, E, experts, step, visits
from helpers import assert_no_worse_than_torch
from hotloop.integrations import _transformers_experts

importlib.import_module(
    "hotloop.integrations.transformers"
)  # registers; experts_cases skips where there is none
pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore::Warning")]  # the peer's own


WIDE = {"OpenAIPrivacyFilterExperts"}
"""Their eager computes bfloat16 in float32; their other implementations do not."""


def test_the_classes_are_found() -> None:
    assert len(EVERY) > 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_output_and_gradients_are_those_of_eager(name: str, dtype: torch.dtype) -> None:
    x, ids, weights = visits(dtype=dtype)
    other = "batched_mm" if name in WIDE else "eager"
    ours, theirs = (
        step(experts(name, how).to(dtype), x, ids, weights) for how in ("hotloop", other)
    )
    truth = step(experts(name, "eager").to(dtype).double(), x.double(), ids, weights.double())
    for a, b, c in zip(ours, theirs, truth, strict=True):
        assert a.dtype == b.dtype
        assert_no_worse_than_torch(
            a, b, c.double(), k=3, eps=1e-6 if dtype == torch.float32 else 8e-3
        )


@pytest.mark.parametrize("name", ["MixtralExperts", "GptOssExperts", "NemotronHExperts"])
def test_choices_that_lie_on_another_rank_add_nothing(name: str) -> None:
    """As expert parallelism marks them: the id behind the last."""
    module = experts(name)
    x, ids, weights = visits()
    away = ids.clone()
    away[::2, 1] = E
    kept = torch.where(away == E, 0.0, weights)
    torch.testing.assert_close(module(x, away, weights), module(x, ids, kept))
    assert away[0, 1] == E


@pytest.mark.parametrize(
    "act", ["gelu", "gelu_pytorch_tanh", "relu", "relu2", "quick_gelu", "mish", "prelu"]
)
def test_every_activation(act: str) -> None:
    x, ids, weights = visits()
    ours, theirs = (
        step(experts("MixtralExperts", how, hidden_act=act), x, ids, weights)
        for how in ("hotloop", "eager")
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_an_activation_of_the_users_own() -> None:
    class Own(type(experts("MixtralExperts"))):  # type: ignore[misc]
        def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
            gate, up = gate_up.chunk(2, dim=-1)
            return gate.sin() * up

    x, ids, weights = visits()
    own = experts("MixtralExperts")
    before = own(x, ids, weights)
    own.__class__ = Own
    after = own(x, ids, weights)
    assert not torch.allclose(before, after)
    own.config._experts_implementation = "grouped_mm"
    torch.testing.assert_close(after, own(x, ids, weights), rtol=1e-4, atol=1e-5)


class SiLU(torch.nn.Module):
    """A namesake of torch's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(3 * x)


def test_an_activation_that_is_more_than_its_name() -> None:
    def hook(module: Any) -> None:
        module.act_fn.register_forward_hook(lambda _module, _inputs, out: 2 * out)

    def hook_back(module: Any) -> None:
        module.act_fn.register_full_backward_hook(lambda _module, into, _out: (2 * into[0],))

    def patch(module: Any) -> None:
        module.act_fn.forward = torch.tanh

    def rename(module: Any) -> None:
        module.act_fn = SiLU()

    plain = step(experts("MixtralExperts"), *visits())
    for change in (hook, hook_back, patch, rename):
        ours, theirs = (experts("MixtralExperts", how) for how in ("hotloop", "eager"))
        change(ours)
        change(theirs)
        found = step(ours, *visits())
        torch.testing.assert_close(found, step(theirs, *visits()), rtol=1e-4, atol=1e-5)
        assert any(not torch.allclose(a, b) for a, b in zip(found, plain))


def test_the_activations_of_transformers_are_known() -> None:
    from hotloop.integrations._transformers_experts import _activation

    kinds = {"silu": "swiglu", "gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh", "relu": "reglu"}
    for act, kind in kinds.items():
        found = _activation(experts("MixtralExperts", hidden_act=act))
        assert found is not None
        assert found.kind == kind


def refused(module: Any, text: str, kind: type[Exception] = NotImplementedError) -> None:
    x, ids, weights = visits()
    with pytest.raises(kind, match=r"^\[transformers experts\] " + text):
        _transformers_experts.experts_forward(module, x, ids, weights)


def test_what_is_refused() -> None:
    class Bare(torch.nn.Module):
        num_experts = E

    refused(
        Bare(),
        r"Bare: expected a class under @use_experts_implementation, got one that does not say has_gate",
    )
    module = experts("MixtralExperts")
    module.gate_up_proj = torch.nn.Parameter(
        torch.zeros(E, 3, 16, dtype=torch.int8), requires_grad=False
    )
    refused(
        module,
        r"MixtralExperts.gate_up_proj: expected dtype .*, got int8.*set_experts_implementation\('eager'\)",
    )
    module = experts("MixtralExperts")
    module.down_proj = torch.nn.Parameter(module.down_proj[0].detach())
    refused(module, r"MixtralExperts.down_proj: expected 3 dimension\(s\), got shape")
    module = experts("MixtralExperts")
    module.num_experts = 2 * E
    refused(module, rf"MixtralExperts.gate_up_proj: expected {2 * E} experts, got shape")


def test_quantized_experts_are_refused() -> None:
    from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface

    forward = FP8ExpertsInterface().get_interface("hotloop", None)
    with pytest.raises(
        NotImplementedError, match=r"expected weights of a float dtype, got quantized ones"
    ):
        forward(experts("MixtralExperts"), *visits())


def test_ids_out_of_range_are_refused() -> None:
    x, ids, weights = visits()
    with pytest.raises(ValueError, match=r"topk_ids: expected"):
        experts("MixtralExperts")(x, ids + E + 1, weights)
    with pytest.raises(ValueError, match=r"topk_ids: expected"):  # as eager does
        experts("MixtralExperts")(x, ids - E, weights)
    assert D == 16
