# SPDX-License-Identifier: Apache-2.0
"""Sparse mixtures of experts: router, order of expert rows, expert products, combine, momentum across depth."""

from . import Paper, Room

op = Room(__name__, impls=("reference", "cpu"), gradient=True, compiles=True, needs_torch=True)
WITH_TRITON = ("reference", "cpu", "triton")
WITH_CUDA = ("reference", "cpu", "cuda")

SPARSELY_GATED = Paper(
    "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer", "1701.06538"
)
MEGABLOCKS = Paper("MegaBlocks: Efficient Sparse Training with Mixture-of-Experts", "2211.15841")
DEEPSEEK_V3 = Paper(
    "DeepSeek-V3 Technical Report",
    "2412.19437",
    "E = 256, k = 8, 4 of 8 groups, routed_scale = 2.5, bias rate 0.001",
)

op(
    "route",
    SPARSELY_GATED,
    DEEPSEEK_V3,
    impls=WITH_CUDA,
    implements=("softmax_topk_gate", "sigmoid_group_topk_gate"),
)
op(
    "dispatch",
    MEGABLOCKS,
    impls=WITH_CUDA,
    dtypes=(),
    gradient=False,
)
op(
    "load_balance_loss",
    Paper("Switch Transformers", "2101.03961", "weight 0.01"),
    Paper("FastMoE: A Fast Mixture-of-Expert Training System", "2103.13262"),
    impls=("reference",),
    implements=("moe_load_balance_loss", "fmoe_load_balance_loss"),
)
op(
    "router_z_loss",
    Paper(
        "ST-MoE: Designing Stable and Transferable Sparse Expert Models",
        "2202.08906",
        "weight 0.001",
    ),
    impls=("reference",),
)
op("sequence_balance_loss", DEEPSEEK_V3, impls=WITH_CUDA)
op(
    "update_routing_bias",
    Paper(
        "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts",
        "2408.15664",
        "rate 0.001",
    ),
    DEEPSEEK_V3,
    impls=("reference",),
    dtypes=("float32", "float64"),
    gradient=False,
    implements=("aux_free_bias_update",),
)
GLU = Paper("GLU Variants Improve Transformer", "2002.05202")
op("grouped_linear", MEGABLOCKS, impls=WITH_TRITON, implements=("grouped_gemm",))
op("expert_mlp", MEGABLOCKS, GLU, impls=WITH_TRITON)
op("expert_rows", MEGABLOCKS, GLU, impls=WITH_TRITON)
op(
    "pmoe_routing_loss",
    Paper(
        "Probabilistic Mixture-of-Experts for Efficient Deep Reinforcement Learning",
        "2104.09122",
        "K = 2 in the authors' SAC script, weight 1",
    ),
    impls=("reference",),
)
grouped = Paper("MegaBlocks: Efficient Sparse Training with Mixture-of-Experts", "2211.15841")
momentum = Paper(
    "MomentumSMoE: Integrating Momentum into Sparse Mixture of Experts",
    "2410.14574",
    "mu = 0.7, gamma = 1, 16 experts, top-2",
)
robust = Paper(
    "A Robust Accelerated Optimization Algorithm for Strongly Convex Functions", "1710.04753"
)
op("permute", grouped, impls=WITH_CUDA, implements=("moe_permute",))
op("combine", grouped, impls=WITH_CUDA, implements=("moe_unpermute_combine",))
op("residual_smoe_layer", momentum, impls=WITH_CUDA)
op("momentum_smoe_layer", momentum, impls=WITH_CUDA)
op("adam_smoe_layer", momentum, impls=WITH_CUDA)
op("robust_momentum_smoe_layer", momentum, robust, impls=WITH_CUDA)
op("lookahead", robust, impls=WITH_CUDA)
op("robust_momentum_coefficients", robust, impls=("reference",), gradient=False, compiles=False)

op(
    "anchor_reconcile_moe",
    Paper(
        "Omni-Mol: Exploring Universal Convergent Space for Omni-Molecular Tasks",
        "2502.01074",
        "5 experts, top-2, no renormalisation, load balance 0.01",
    ),
    impls=("reference",),
    compiles=False,
)
op("MoE", SPARSELY_GATED, impls=("reference",))
op("MomentumMoE", momentum, impls=("reference",))
op("AdamMoE", momentum, impls=("reference",))
op("RobustMomentumMoE", robust, impls=("reference",))
