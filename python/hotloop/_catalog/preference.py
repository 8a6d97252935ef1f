# SPDX-License-Identifier: Apache-2.0
"""Losses that learn from preferences between answers."""

from functools import partial

from . import Paper, pointwise_room

op = pointwise_room(__name__)
experimental = partial(op, maturity="experimental")

DPO = Paper("Direct Preference Optimization", "2305.18290", "beta = 0.1 to 0.5")
BCO = Paper("Binary Classifier Optimization", "2404.04656", "beta = 0.01 to 0.1")
NOISY = Paper("A note on DPO with noisy preferences", "Mitchell, 2023", "eps = 0.1")
PER_PAIR = Paper(
    "Monte Carlo Tree Search Boosts Reasoning (per-pair eps)", "2405.00451", "beta = 0.1"
)
CPO = Paper("Contrastive Preference Optimization", "2401.08417", "beta = 0.1")
INPO = Paper(
    "Iterative Nash Policy Optimization", "2407.00617", "eta = 0.005 to 0.0075, tau = eta / 3"
)
RPO = Paper("Provably Mitigating Overoptimization (RPO)", "2405.16436", "beta = 0.01, eta = 0.005")
SRPO = Paper("Self-Improving Robust Preference Optimization", "2406.01660", "alpha = 0.5")
DRIFT = Paper("DRIFT", "ICLR 2026", "beta = 0.1 (not confirmed), 2 rounds")
HYPO = Paper("The Importance of Online Data (HyPO)", "2406.01462", "beta = 0.1, k = 2")
VPO = Paper("Value-Incentivized Preference Optimization", "2405.19320", "beta = 0.1")
XPO = Paper("Exploratory Preference Optimization", "2405.21046", "alpha = 1e-5, beta = 0.1")
OPA_DPO = Paper("OPA-DPO", "2501.09695", "beta = 0.1, image 0.2, anchor 1")
APO = Paper("Anchored Preference Optimization", "2408.06266", "beta = 0.1")
SELM = Paper("Self-Exploring Language Models", "2405.19332", "beta = 0.01, alpha = 0.001")
CPL = Paper("Contrastive Preference Learning", "2310.13639", "alpha = 0.1, lam = 0.5, gamma = 1")
SPPO = Paper(
    "Self-Play Preference Optimization", "2405.00675", "eta = 1000 (beta = 0.001), 3 iterations"
)

op("dpo_loss", DPO, Paper("Beyond Reverse KL (f-divergence DPO)", "2309.16240"))
op("conservative_dpo_loss", NOISY, PER_PAIR)
op("robust_dpo_loss", Paper("Provably Robust DPO", "2403.00409", "beta = 0.1, eps = 0.1"))
op("dpo_norm_loss", Paper("Tulu 3", "2411.15124", "beta = 5"))
op("flex_dpo_loss", Paper("3D-Properties", "2406.07327", "beta+ = 0.1, beta- = 0.08"))
op("dno_loss", Paper("Direct Nash Optimization", "2404.03715", "eta = 0.1 or 0.05"))
experimental("drift_iterative_dpo_loss", DRIFT, implements=("drift_iterative_dpo",))
op("ipo_loss", Paper("A General Theoretical Paradigm (IPO)", "2310.12036", "tau = 0.1"))
op("online_ipo_loss", Paper("Online IPO / IPO-MD", "2403.08635", "tau = 0.1, mixture 0.125 to 0.5"))
op("inpo_loss", INPO)
op("sppo_loss", SPPO)
op("sppo_hard_loss", SPPO)
experimental("srpo_loss", SRPO)
op("slic_hinge_loss", Paper("SLiC-HF", "2305.10425", "delta = 1"))
op("exo_pair_loss", Paper("Towards Efficient Exact Optimization (EXO)", "2402.00856", "eps = 1e-3"))
op("apo_loss", APO, implements=("apo_losses",))
op("aot_loss", Paper("Distributional Preference Alignment (AOT)", "2406.05882", "beta = 0.1"))
op("nca_loss", Paper("Noise Contrastive Alignment", "2402.05369", "beta = 0.01"))
op("kto_loss", Paper("KTO", "2402.01306", "beta = 0.1, weights 1"))
op("bco_loss", BCO)
op("bco_pair_loss", BCO)
op("RunningRewardMean", BCO, impls=("reference",), gradient=False, compiles=False)
op("orpo_loss", Paper("ORPO", "2403.07691", "lambda = 0.1"))
op("cpo_loss", CPO, Paper("AlphaPO (reward shape)", "2501.03884"))
op("simpo_loss", Paper("SimPO", "2405.14734", "beta = 2 to 10, gamma / beta = 0.3 to 1.6"))
op("cpl_loss", CPL)
op("cpl_dense_loss", CPL)
op("xpo_loss", XPO)
experimental("vpo_loss", VPO)
op("selm_loss", SELM)
experimental("hypo_loss", HYPO)
op("rpo_sft_loss", RPO)
op("modpo_loss", Paper("Multi-Objective DPO", "2310.03708", "beta = 0.1"))
op("opa_dpo_loss", OPA_DPO, compiles=False)
op("preference_metrics", Paper("TRL 1.16 DPOTrainer"), impls=("reference",), gradient=False)
op(
    "linear_preference_loss",
    DPO,
    Paper("and every other loss of this room"),
    impls=("reference", "cpu", "triton"),
)
