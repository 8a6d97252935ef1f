# SPDX-License-Identifier: Apache-2.0
"""The lm_head of a language model, fused: statistics, cross-entropy, divergences."""

from . import Paper, Room

HEAD = ("reference", "cpu", "triton")
op = Room(__name__, impls=HEAD, gradient=True, compiles=True, needs_torch=True)

SOFTMAX = Paper("Online normalizer calculation for softmax", "1805.02867")
SMOOTHING = Paper("Rethinking the Inception Architecture (label smoothing)", "1512.00567", "0.1")
HINTON = Paper(
    "Distilling the Knowledge in a Neural Network", "1503.02531", "T = 2 to 4, times T^2"
)
GKD = Paper(
    "On-Policy Distillation of Language Models (GKD)", "2306.13649", "beta = 0.5, T = 0.9 to 1"
)
MINILLM = Paper("MiniLLM", "2306.08543", "T = 1, on-policy samples")
BDKD = Paper("BD-KD", "2212.12965", "T = 4, delta = 2 (not confirmed)")
DHKD = Paper("Dual-Head Knowledge Distillation", "2411.08937", "T = 2")

op("linear_logprob", SOFTMAX)
op("token_logprob", SOFTMAX)
op("linear_cross_entropy", SMOOTHING, Paper("PaLM (z-loss)", "2204.02311", "1e-4"))
op("linear_logprob_partial", SOFTMAX, impls=("cpu", "triton"), gradient=False, compiles=False)
op("merge_logprob_partials", SOFTMAX, impls=("reference",), gradient=False, compiles=False)
op("linear_kl", HINTON, MINILLM)
op("linear_jsd", GKD)
op("linear_distill", HINTON, GKD, BDKD, DHKD)
op("forward_kl_distill", HINTON)
op("reverse_kl_distill", MINILLM)
op("generalized_jsd_distill", GKD)
op("balanced_divergence_kd", BDKD, maturity="experimental")
op("log_cosh_logit_distill", DHKD, impls=("reference", "cpu"))
op("bonsai_synthesis_loss", Paper("Rich Feature Construction (Bonsai)", "2203.15516"))
op("mi_alpha_bound", Paper("Distiller", "2109.11105", "alpha = 0.7"), impls=("reference",))
