# SPDX-License-Identifier: Apache-2.0
"""Small mixtures of experts of transformers, and every class of it that takes an experts implementation."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="needs the peers extra")

V = 64
_COMMON = {
    "vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "intermediate_size": 24,
    "num_experts_per_tok": 2,
}  # fmt: skip
_LATENT = {
    "moe_intermediate_size": 24, "n_routed_experts": 8, "first_k_dense_replace": 1, "n_shared_experts": 1,
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4, "output_router_logits": True},
    "Qwen3Moe": {"moe_intermediate_size": 24, "num_experts": 8, "head_dim": 8},
    "DeepseekV3": {**_LATENT, "n_group": 2, "topk_group": 1},
    "GptOss": {"num_local_experts": 4, "head_dim": 8, "sliding_window": 8},
    "Qwen2Moe": {"moe_intermediate_size": 24, "num_experts": 8, "shared_expert_intermediate_size": 24},
    "DeepseekV2": _LATENT,
    "Olmoe": {"num_experts": 8},
    "GraniteMoe": {"num_local_experts": 8},
    "Phimoe": {"num_local_experts": 4},
    "Glm4Moe": {
        "moe_intermediate_size": 24,
        "n_routed_experts": 8,
        "first_k_dense_replace": 1,
        "head_dim": 8,
    },
    "Ernie4_5_Moe": {
        "moe_intermediate_size": 24,
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_layer_start_index": 1,
    },
    "NemotronH": {
        "moe_intermediate_size": 24, "n_routed_experts": 4, "layers_block_type": ["attention", "moe"], "head_dim": 8,
        "n_shared_experts": 1, "moe_shared_expert_intermediate_size": 24,
    },
}  # fmt: skip
FIRST = ["Mixtral", "Qwen3Moe", "DeepseekV3", "GptOss"]


def model(name: str, implementation: str = "hotloop", **more: Any) -> Any:
    """A model of two layers with random weights, large enough that experts differ; the same for every call."""
    config = getattr(transformers, f"{name}Config")(**{**_COMMON, **MODELS[name], **more})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = getattr(transformers, f"{name}ForCausalLM")(config)
        for key, parameter in made.named_parameters():
            if ".experts." in key:
                nn.init.normal_(parameter, std=0.3)
    made.set_experts_implementation(implementation)
    return made.eval()


def tokens(rows: int = 3, length: int = 9) -> Tensor:
    return torch.randint(3, V, (rows, length), generator=torch.Generator().manual_seed(1))


def decorated() -> dict[str, str]:
    """Every class under ``@use_experts_implementation``, with its module."""
    found = {}
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        for name in re.findall(
            r"^@use_experts_implementation.*\nclass (\w+)", path.read_text(), re.M
        ):
            found[name] = f"transformers.models.{path.parent.name}.{path.stem}"
    return found


EVERY = decorated()
E, D, I = 6, 16, 12
_SIZES = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), E),
    **dict.fromkeys(("hidden_size", "moe_hidden_size"), D),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), I),
    "hidden_act": "silu", "hidden_activation": "gelu_pytorch_tanh", "mlp_hidden_act": "relu2", "moe_latent_size": None,
    "swiglu_limit": 0.7, "swiglu_alpha": 1.702, "post_norm_eps": 1e-6, "mlp_gate_softcap": 5.0, "mlp_up_softcap": 5.0,
}  # fmt: skip


def experts(name: str, implementation: str = "hotloop", **more: Any) -> Any:
    """The experts of one layer, as the class of that name makes them."""
    made = getattr(importlib.import_module(EVERY[name]), name)(
        SimpleNamespace(**{**_SIZES, **more}, _experts_implementation=implementation)
    )
    g = torch.Generator().manual_seed(2)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5, generator=g)
    return made.eval()


def visits(t: int = 11, k: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Hidden states, chosen experts and weights of t tokens; one expert gets none."""
    g = torch.Generator().manual_seed(t)
    scores = torch.rand(t, E, generator=g)
    scores[:, 3] = 0
    weights, ids = scores.topk(k)
    return torch.randn(t, D, generator=g).to(dtype), ids, weights.to(dtype)


def step(module: Any, x: Tensor, ids: Tensor, weights: Tensor) -> list[Tensor]:
    """The output, and the gradients of the hidden states, the weights and the parameters."""
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    out = module(x, ids, weights)
    above = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    leaves = [x, weights, *(p for p in module.parameters() if p.requires_grad)]
    return [out.detach(), *torch.autograd.grad(out, leaves, above)]
