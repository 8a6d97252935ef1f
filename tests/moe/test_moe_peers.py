# SPDX-License-Identifier: Apache-2.0
"""Sparse blocks of transformers as ``MoE``: the rows of docs/moe.md that say how one becomes the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hotloop.moe import MoE, load_balance_loss
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="needs the peers extra")
pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore::Warning")]  # the peer's own

D, I, E, K = 16, 12, 8, 2


def started(block: nn.Module) -> nn.Module:
    g = torch.Generator().manual_seed(0)
    for parameter in [*block.parameters(), *block.buffers()]:
        parameter.data.normal_(generator=g)
    return block.eval()


def loaded(layer: MoE, block: nn.Module) -> MoE:
    """The state of a block under our names."""
    state = {}
    for name, value in block.state_dict().items():
        name = name.replace("gate.weight", "router.weight") if name.startswith("gate") else name
        state[name.replace("gate.e_score_correction_bias", "routing_bias")] = value
    shared = [state.pop(f"shared_experts.{n}_proj.weight", None) for n in ("gate", "up", "down")]
    if shared[0] is not None:
        state["shared.gate_up_proj"] = torch.cat(shared[:2])[None]
        state["shared.down_proj"] = shared[2][None]
    layer.load_state_dict(state)
    return layer.eval()


def mixtral() -> tuple[nn.Module, MoE]:
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = transformers.MixtralConfig(
        hidden_size=D, intermediate_size=I, num_local_experts=E, num_experts_per_tok=K
    )
    config._experts_implementation = "eager"
    return MixtralSparseMoeBlock(config), MoE(D, I, E, K)


def qwen3(normed: bool) -> tuple[nn.Module, MoE]:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = transformers.Qwen3MoeConfig(
        hidden_size=D, moe_intermediate_size=I, num_experts=E, num_experts_per_tok=K, norm_topk_prob=normed
    )  # fmt: skip
    config._experts_implementation = "eager"
    return Qwen3MoeSparseMoeBlock(config), MoE(D, I, E, K, renormalize=normed)


def deepseek_v3() -> tuple[nn.Module, MoE]:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = transformers.DeepseekV3Config(
        hidden_size=D, moe_intermediate_size=I, n_routed_experts=E, num_experts_per_tok=K, n_group=4, topk_group=2,
        routed_scaling_factor=2.5, n_shared_experts=2,
    )  # fmt: skip
    config._experts_implementation = "eager"
    layer = MoE(
        D, I, E, K, scoring="sigmoid", n_group=4, topk_group=2, routed_scale=2.5, bias_rate=1e-3,
        shared_hidden_dim=2 * I,
    )  # fmt: skip
    return DeepseekV3MoE(config), layer


BLOCKS: dict[str, Callable[[], tuple[nn.Module, MoE]]] = {
    "mixtral": mixtral,
    "qwen3": lambda: qwen3(True),
    "qwen3-sums": lambda: qwen3(False),
    "deepseek-v3": deepseek_v3,
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_of_transformers_is_a_layer(name: str) -> None:
    theirs, ours = BLOCKS[name]()
    loaded(ours, started(theirs))
    if ours.routing_bias is not None:
        # Theirs puts 0 for an excluded group, which is only below the others while scores and bias are above 0.
        theirs.gate.e_score_correction_bias.abs_()  # type: ignore[union-attr, operator]
        ours.routing_bias.abs_()
    x = torch.randn(2, 9, D, generator=torch.Generator().manual_seed(1))
    wanted: Any = theirs(x)
    wanted = wanted[0] if isinstance(wanted, tuple) else wanted
    torch.testing.assert_close(ours(x).output, wanted, rtol=1e-4, atol=1e-4)


def test_load_balance_of_several_layers_is_that_of_transformers() -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    layers = [MoE(D, I, E, K, load_balance_weight=1.0, convention="mixtral") for _ in range(3)]
    x: Tensor = torch.randn(20, D, generator=torch.Generator().manual_seed(1))
    found = load_balance_loss([layer(x).routing for layer in layers], "mixtral")
    wanted = load_balancing_loss_func(tuple(layer.router(x) for layer in layers), E, K)
    torch.testing.assert_close(found, wanted)
