# SPDX-License-Identifier: Apache-2.0
"""Models of transformers with ``set_experts_implementation("hotloop")`` against their own "eager" experts."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from experts_cases import FIRST, MODELS, model, tokens, transformers
from helpers import assert_no_worse_than_torch
from torch import Tensor, nn

importlib.import_module(
    "hotloop.integrations.transformers"
)  # registers; experts_cases skips where there is none
pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore::Warning")]  # the peer's own


def trained_step(made: Any, ids: Tensor) -> dict[str, Tensor]:
    """Logits and the gradients of all parameters of one training step, by name."""
    made.train()
    for each in made.modules():
        if type(each).__name__ == "PhimoeTopKRouter":
            each.eval()  # in training it draws the experts, float64 from other numbers than float32
    made.zero_grad()
    found = made(input_ids=ids, labels=ids)
    found.loss.backward()
    grads = {name: p.grad for name, p in made.named_parameters() if p.grad is not None}
    return {"logits": found.logits.detach(), "loss": found.loss.detach(), **grads}


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_of_eager(name: str) -> None:
    ids = tokens()
    ours, theirs = (trained_step(model(name, how), ids) for how in ("hotloop", "eager"))
    truth = trained_step(model(name, "eager").double(), ids)
    assert ours.keys() == theirs.keys() == truth.keys()
    assert any("experts" in key for key in ours)
    for key in ours:
        assert ours[key].dtype == theirs[key].dtype
        assert_no_worse_than_torch(ours[key], theirs[key], truth[key].double(), k=3)


@pytest.mark.parametrize("name", FIRST)
def test_bfloat16(name: str) -> None:
    ids = tokens()
    ours, theirs = (trained_step(model(name, how).bfloat16(), ids) for how in ("hotloop", "eager"))
    truth = trained_step(model(name, "eager").bfloat16().double(), ids)
    for key in ours:
        assert ours[key].dtype == torch.bfloat16 or key == "loss"
        assert_no_worse_than_torch(ours[key], theirs[key], truth[key].double(), k=3, eps=1e-3)


@pytest.mark.parametrize("name", FIRST)
def test_autocast(name: str) -> None:
    ids = tokens()
    truth = model(name, "eager").double()(ids).logits
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = (model(name, how)(ids).logits for how in ("hotloop", "eager"))
    assert ours.dtype == theirs.dtype
    assert_no_worse_than_torch(ours, theirs, truth, k=3, eps=2e-3)


@pytest.mark.parametrize("name", FIRST)
def test_generation(name: str) -> None:
    """Greedy, with a cache: prompts of many tokens, then one at a time."""
    ids = tokens()
    ours, theirs = (
        model(name, how).generate(ids, max_new_tokens=6, do_sample=False)
        for how in ("hotloop", "eager")
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", FIRST)
def test_training_goes_the_same_way(name: str) -> None:
    losses: dict[str, list[float]] = {}
    for how in ("hotloop", "eager"):
        made = model(name, how).train()
        optimizer = torch.optim.AdamW(made.parameters(), lr=3e-3)
        for step in range(6):
            ids = tokens(4, 8 + step % 2)
            optimizer.zero_grad()
            loss = made(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            losses.setdefault(how, []).append(float(loss))
    torch.testing.assert_close(losses["hotloop"], losses["eager"], rtol=2e-3, atol=1e-3)
    assert losses["hotloop"][-1] < losses["hotloop"][0]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", FIRST)
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    """Against eager inside the same checkpoint: a reentrant one loses the losses of routers."""
    ids, found = tokens(), []
    for how in ("hotloop", "eager"):
        made = model(name, how)
        made.gradient_checkpointing_enable({"use_reentrant": reentrant})
        found.append(trained_step(made, ids))
    assert found[0].keys() == found[1].keys()
    for key in found[0]:
        torch.testing.assert_close(found[0][key], found[1][key], rtol=1e-4, atol=1e-5)


def test_weights_are_shared_and_the_state_stays() -> None:
    made = model("Mixtral", "eager")
    before = {name: (p.data_ptr(), p.shape) for name, p in made.named_parameters()}
    state = {name: x.clone() for name, x in made.state_dict().items()}
    made.set_experts_implementation("hotloop")
    made(tokens())
    assert {name: (p.data_ptr(), p.shape) for name, p in made.named_parameters()} == before
    assert made.state_dict().keys() == state.keys()
    assert all(torch.equal(x, state[name]) for name, x in made.state_dict().items())
    assert made.get_experts_implementation()[""] == "hotloop"
    made.set_experts_implementation("eager")
    assert made.config._experts_implementation == "eager"


def test_a_checkpoint_is_loaded_with_the_implementation(tmp_path: Path) -> None:
    made = model("Qwen3Moe")
    made.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, experts_implementation="hotloop"
    )
    assert loaded.config._experts_implementation == "hotloop"
    torch.testing.assert_close(loaded(tokens()).logits, made(tokens()).logits)


@pytest.mark.parametrize("name", FIRST)
def test_frozen_experts_get_no_gradient_and_hand_it_on(name: str) -> None:
    ids, grads = tokens(), []
    for how in ("hotloop", "eager"):
        made = model(name, how)
        for key, parameter in made.named_parameters():
            parameter.requires_grad_("experts" not in key)
        grads.append(trained_step(made, ids))
    assert grads[0].keys() == grads[1].keys()
    assert not any(".experts.gate_up" in key for key in grads[0])
    for key in grads[0]:
        torch.testing.assert_close(grads[0][key], grads[1][key], rtol=1e-4, atol=1e-5)


class LowRank(nn.Module):
    """W + B A for every expert, as adapters of expert weights compute it: a parametrisation of the parameter."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        e, rows, columns = weight.shape
        g = torch.Generator().manual_seed(5)
        self.a = nn.Parameter(0.1 * torch.randn(e, 2, columns, generator=g))
        self.b = nn.Parameter(0.1 * torch.randn(e, rows, 2, generator=g))

    def forward(self, weight: Tensor) -> Tensor:
        return weight.detach() + self.b @ self.a


@pytest.mark.parametrize("name", FIRST)
def test_low_rank_adapters_of_experts(name: str) -> None:
    ids, found = tokens(), []
    for how in ("hotloop", "eager"):
        made = model(name, how).requires_grad_(False)
        for module in made.modules():
            for weight in ("gate_up_proj", "down_proj"):
                if (
                    isinstance(getattr(module, weight, None), nn.Parameter)
                    and module.is_transposed is not None
                ):
                    adapter = LowRank(getattr(module, weight))
                    nn.utils.parametrize.register_parametrization(module, weight, adapter)
        found.append(trained_step(made, ids))
    assert found[0].keys() == found[1].keys()
    assert sum(".a" in key for key in found[0]) >= 2
    for key in found[0]:
        torch.testing.assert_close(found[0][key], found[1][key], rtol=1e-4, atol=1e-5)
