"""The list of every public op. Docs, README table and ``python -m hotloop info`` are made from it.

Only the standard library is imported here, so the list can be read where nothing else works.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

FLOATS = ("float32", "float64", "float16", "bfloat16")
MATURITIES = ("experimental", "tested")


@dataclass(frozen=True)
class Paper:
    """A paper an op computes something of, and the settings the paper uses."""

    title: str
    source: str  # arXiv id, or venue and year
    settings: str = ""

    @property
    def link(self) -> str:
        return f"https://arxiv.org/abs/{self.source}" if self.source[:4].isdigit() else ""


@dataclass(frozen=True)
class Op:
    """One public function."""

    name: str
    room: str
    papers: tuple[Paper, ...]
    impls: tuple[str, ...]
    dtypes: tuple[str, ...] = FLOATS
    gradient: bool = True
    compiles: bool = True
    deterministic: bool = True
    maturity: str = "tested"

    @property
    def full_name(self) -> str:
        return f"{self.room}.{self.name}"

    def function(self) -> Callable[..., Any]:
        """Import the room and return the function."""
        found: Callable[..., Any] = getattr(
            importlib.import_module(f"hotloop.{self.room}"), self.name
        )
        return found


_HEAD = ("reference", "cpu", "triton")
_PAIR = ("reference", "cpu", "cuda")


def _head(name: str, *papers: Paper, **kw: Any) -> Op:
    return Op(name, "logprob", papers, kw.pop("impls", _HEAD), **kw)


def _pair(name: str, *papers: Paper, room: str = "preference", **kw: Any) -> Op:
    return Op(name, room, papers, kw.pop("impls", _PAIR), **kw)


def _core(name: str, *papers: Paper) -> Op:
    return Op(
        name,
        "core",
        papers,
        ("reference", "cpu"),
        ("float32", "float64"),
        gradient=False,
        compiles=False,
    )


def _decode(name: str, *papers: Paper, **kw: Any) -> Op:
    """What runs on a GPU is a registered operator, and compiles; the rest also takes NumPy alone."""
    impls = kw.pop("impls", ("reference", "cpu"))
    return Op(name, "decode", papers, impls, gradient=False, compiles="cuda" in impls, **kw)


def _table(name: str, *papers: Paper, **kw: Any) -> Op:
    """NumPy, torch or CuPy arrays; what compiles is a registered operator."""
    impls, gradient = kw.pop("impls", ("reference", "cpu")), kw.pop("gradient", False)
    compiles = kw.pop("compiles", gradient)
    return Op(name, "table", papers, impls, gradient=gradient, compiles=compiles, **kw)


_ONLINE_SOFTMAX = Paper("Online normalizer calculation for softmax", "1805.02867")
_AUTONUMERICS = Paper("AutoNumerics-Zero", "2312.08472", "2^x on [0, 1], 10 operations in float64")
_PHILOX = Paper("Parallel random numbers: as easy as 1, 2, 3", "SC11, 2011", "Philox 4x32-10")
_HINTON = Paper(
    "Distilling the Knowledge in a Neural Network", "1503.02531", "T = 2 to 4, times T^2"
)
_GKD = Paper(
    "On-Policy Distillation of Language Models (GKD)", "2306.13649", "beta = 0.5, T = 0.9 to 1"
)
_MINILLM = Paper("MiniLLM", "2306.08543", "T = 1, on-policy samples")
_BDKD = Paper("BD-KD", "2212.12965", "T = 4, delta = 2 (not confirmed)")
_DHKD = Paper("Dual-Head Knowledge Distillation", "2411.08937", "T = 2")
_BCO = Paper("Binary Classifier Optimization", "2404.04656", "beta = 0.01 to 0.1")
_CPL = Paper("Contrastive Preference Learning", "2310.13639", "alpha = 0.1, lam = 0.5, gamma = 1")
_SPPO = Paper(
    "Self-Play Preference Optimization", "2405.00675", "eta = 1000 (beta = 0.001), 3 iterations"
)

_LEVIATHAN = Paper(
    "Fast Inference from Transformers via Speculative Decoding", "2211.17192", "K = 3 to 8"
)
_CHEN = Paper("Accelerating LLM Decoding with Speculative Sampling", "2302.01318", "K = 4")
_TOP_P = Paper("The Curious Case of Neural Text Degeneration", "1904.09751", "top_p = 0.9 to 0.95")
_TOP_K = Paper("Hierarchical Neural Story Generation", "1805.04833", "top_k = 10 to 50")
_MIN_P = Paper("Turning Up the Heat: Min-p Sampling", "2407.01082", "min_p = 0.05 to 0.1")
_MIRROR = Paper("Mirror Speculative Decoding", "2510.13161", "kappa = 1 to 8, gamma = 3 to 7")
_MEDUSA = Paper("Medusa", "2401.10774", "epsilon = 0.3, alpha = 0.09, T = 0.7")
_LANTERN = Paper("LANTERN", "2410.03355", "k = 1000, delta = 0.05 to 0.4")
_VAS = Paper("Value Augmented Sampling", "2405.06639", "k = 20, beta = 3")
_SIMHASH = Paper("Similarity Estimation Techniques from Rounding", "STOC, 2002", "L = 16")
_RELOOP2 = Paper(
    "ReLoop2: Self-Adaptive Recommendation Models via Error Compensation",
    "2306.08808",
    "k = 180 or 70, tau = 0.1, lam = 0.9 or 0.4",
)

_MONOLITH = Paper("Monolith", "2209.07663", "15 sightings at most, 3e8 ids, 7 splits")
_UNIFIED = Paper("Unified Embedding", "2305.12102", "2 to 6 chunks per feature")
_ADAGRAD = Paper("Adaptive Subgradient Methods (Adagrad)", "JMLR 12, 2011")


_OPS = (
    _core("elementary", Paper("Definition", "")),
    _core("exp2_evolved", _AUTONUMERICS),
    _core("exp2_minimax", _AUTONUMERICS),
    _core("exp_by_exp2", _AUTONUMERICS),
    _core("philox", _PHILOX),
    _core("philox_uniform", _PHILOX),
    _head("linear_logprob", _ONLINE_SOFTMAX),
    _head("token_logprob", _ONLINE_SOFTMAX),
    _head(
        "linear_cross_entropy",
        Paper("Rethinking the Inception Architecture (label smoothing)", "1512.00567", "0.1"),
        Paper("PaLM (z-loss)", "2204.02311", "1e-4"),
    ),
    _head(
        "linear_logprob_partial",
        _ONLINE_SOFTMAX,
        impls=("cpu", "triton"),
        gradient=False,
        compiles=False,
    ),
    _head(
        "merge_logprob_partials",
        _ONLINE_SOFTMAX,
        impls=("reference",),
        gradient=False,
        compiles=False,
    ),
    _head("linear_kl", _HINTON, _MINILLM),
    _head("linear_jsd", _GKD),
    _head("linear_distill", _HINTON, _GKD, _BDKD, _DHKD),
    _head("forward_kl_distill", _HINTON),
    _head("reverse_kl_distill", _MINILLM),
    _head("generalized_jsd_distill", _GKD),
    _head("balanced_divergence_kd", _BDKD, maturity="experimental"),
    _head("log_cosh_logit_distill", _DHKD, impls=("reference", "cpu")),
    _head("bonsai_synthesis_loss", Paper("Rich Feature Construction (Bonsai)", "2203.15516")),
    _head("mi_alpha_bound", Paper("Distiller", "2109.11105", "alpha = 0.7"), impls=("reference",)),
    _decode("chain_speculative_sampling", _LEVIATHAN, _CHEN, impls=("reference", "cpu", "cuda")),
    _decode(
        "block_speculative_sampling",
        Paper("Block Verification Accelerates Speculative Decoding", "2403.10444"),
        impls=("reference", "cpu", "cuda"),
    ),
    _decode(
        "speculative_streaming_verify", _MIRROR, _LEVIATHAN, impls=("reference", "cpu", "cuda")
    ),
    _decode(
        "tree_speculative_verify",
        Paper("SpecInfer", "2305.09781"),
        Paper("EAGLE-2", "2406.16858", "26 to 60 nodes, depth 5 to 6"),
        impls=("reference", "cpu", "cuda"),
    ),
    _decode(
        "greedy_speculative_accept",
        Paper("Blockwise Parallel Decoding", "1811.03115"),
        _MEDUSA,
        impls=("reference", "cpu", "cuda"),
    ),
    _decode("typical_accept", _MEDUSA),
    _decode(
        "lantern_relaxed_accept",
        _LANTERN,
        Paper("LANTERN++", "2502.06352", "delta > 1: a factor"),
    ),
    _decode("vq_neighbor_table", _LANTERN),
    _decode("mirror_sd_branch_reuse", _MIRROR, dtypes=()),
    _decode("sample", _TOP_P, _TOP_K, _MIN_P, impls=("reference", "cpu", "cuda")),
    _decode("law_probs", _TOP_P, _TOP_K, _MIN_P),
    _decode("top_logprobs", _MIRROR),
    _decode(
        "entropy_adaptive_temperature",
        Paper("From Uniform to Heterogeneous (HAPO)", "2509.16591", "tau = 0.05"),
    ),
    _decode("geometric_mixture_logits", Paper("IPO-MD", "2403.08635", "mixture = 0.5")),
    _decode("value_augmented_logits", _VAS),
    _decode("value_augmented_law", _VAS, impls=("reference",)),
    _decode("likelihood_beam_search", Paper("From r to Q*", "2404.12358", "k = 5")),
    _decode(
        "mcts_star_step",
        Paper("ReST-MCTS*", "2406.03816", "alpha = 0.5, c = 0.7, branch 3"),
        dtypes=("float32", "float64"),
    ),
    _decode(
        "puct_select_backup",
        Paper(
            "Monte Carlo Tree Search Boosts Reasoning (MCTS-DPO)", "2405.00451", "c = 1, lp = 1.25"
        ),
        dtypes=("float32", "float64"),
    ),
    _decode(
        "retrospective_backtrack",
        Paper("Generate, but Verify (REVERSE)", "2504.13169", "tau = 0.003, N = 10, K = 50"),
    ),
    _table("salted_hash_bucket", _UNIFIED, compiles=True, dtypes=()),
    _table("hash_strings", _UNIFIED, dtypes=()),
    _table("feature_keys", _UNIFIED, impls=("reference",), dtypes=()),
    _table("frequency_admission_filter", _MONOLITH, dtypes=()),
    _table("probabilistic_admission_filter", _MONOLITH, dtypes=()),
    _table("multiplexed_embedding_lookup", _UNIFIED, gradient=True),
    _table("mch_evict_batch", Paper("TorchRec managed collisions", "TorchRec 1.8"), dtypes=()),
    _pair(
        "dpo_loss",
        Paper("Direct Preference Optimization", "2305.18290", "beta = 0.1 to 0.5"),
        Paper("Beyond Reverse KL (f-divergence DPO)", "2309.16240"),
    ),
    _pair(
        "conservative_dpo_loss",
        Paper("A note on DPO with noisy preferences", "Mitchell, 2023", "eps = 0.1"),
        Paper(
            "Monte Carlo Tree Search Boosts Reasoning (per-pair eps)", "2405.00451", "beta = 0.1"
        ),
    ),
    _pair("robust_dpo_loss", Paper("Provably Robust DPO", "2403.00409", "beta = 0.1, eps = 0.1")),
    _pair("dpo_norm_loss", Paper("Tulu 3", "2411.15124", "beta = 5")),
    _pair("flex_dpo_loss", Paper("3D-Properties", "2406.07327", "beta+ = 0.1, beta- = 0.08")),
    _pair("dno_loss", Paper("Direct Nash Optimization", "2404.03715", "eta = 0.1 or 0.05")),
    _pair(
        "drift_iterative_dpo_loss",
        Paper("DRIFT", "ICLR 2026", "beta = 0.1 (not confirmed), 2 rounds"),
        maturity="experimental",
    ),
    _pair("ipo_loss", Paper("A General Theoretical Paradigm (IPO)", "2310.12036", "tau = 0.1")),
    _pair(
        "online_ipo_loss",
        Paper("Online IPO / IPO-MD", "2403.08635", "tau = 0.1, mixture 0.125 to 0.5"),
    ),
    _pair(
        "inpo_loss",
        Paper(
            "Iterative Nash Policy Optimization",
            "2407.00617",
            "eta = 0.005 to 0.0075, tau = eta / 3",
        ),
    ),
    _pair("sppo_loss", _SPPO),
    _pair("sppo_hard_loss", _SPPO),
    _pair(
        "srpo_loss",
        Paper("Self-Improving Robust Preference Optimization", "2406.01660", "alpha = 0.5"),
        maturity="experimental",
    ),
    _pair("slic_hinge_loss", Paper("SLiC-HF", "2305.10425", "delta = 1")),
    _pair(
        "exo_pair_loss",
        Paper("Towards Efficient Exact Optimization (EXO)", "2402.00856", "eps = 1e-3"),
    ),
    _pair("apo_loss", Paper("Anchored Preference Optimization", "2408.06266", "beta = 0.1")),
    _pair(
        "aot_loss", Paper("Distributional Preference Alignment (AOT)", "2406.05882", "beta = 0.1")
    ),
    _pair("nca_loss", Paper("Noise Contrastive Alignment", "2402.05369", "beta = 0.01")),
    _pair("kto_loss", Paper("KTO", "2402.01306", "beta = 0.1, weights 1")),
    _pair("bco_loss", _BCO),
    _pair("bco_pair_loss", _BCO),
    _pair("orpo_loss", Paper("ORPO", "2403.07691", "lambda = 0.1")),
    _pair(
        "cpo_loss",
        Paper("Contrastive Preference Optimization", "2401.08417", "beta = 0.1"),
        Paper("AlphaPO (reward shape)", "2501.03884"),
    ),
    _pair("simpo_loss", Paper("SimPO", "2405.14734", "beta = 2 to 10, gamma / beta = 0.3 to 1.6")),
    _pair("cpl_loss", _CPL),
    _pair("cpl_dense_loss", _CPL),
    _pair(
        "xpo_loss",
        Paper("Exploratory Preference Optimization", "2405.21046", "alpha = 1e-5, beta = 0.1"),
    ),
    _pair(
        "vpo_loss",
        Paper("Value-Incentivized Preference Optimization", "2405.19320", "beta = 0.1"),
        maturity="experimental",
    ),
    _pair(
        "selm_loss",
        Paper("Self-Exploring Language Models", "2405.19332", "beta = 0.01, alpha = 0.001"),
    ),
    _pair(
        "hypo_loss",
        Paper("The Importance of Online Data (HyPO)", "2406.01462", "beta = 0.1, k = 2"),
        maturity="experimental",
    ),
    _pair(
        "rpo_sft_loss",
        Paper(
            "Provably Mitigating Overoptimization (RPO)", "2405.16436", "beta = 0.01, eta = 0.005"
        ),
    ),
    _pair("modpo_loss", Paper("Multi-Objective DPO", "2310.03708", "beta = 0.1")),
    _pair(
        "opa_dpo_loss",
        Paper("OPA-DPO", "2501.09695", "beta = 0.1, image 0.2, anchor 1"),
        compiles=False,
    ),
    _pair(
        "preference_metrics", Paper("TRL 1.16 DPOTrainer", ""), impls=("reference",), gradient=False
    ),
    _pair(
        "linear_preference_loss",
        Paper("Direct Preference Optimization and every other loss of this room", "2305.18290"),
        impls=("reference", "cpu", "triton"),
    ),
    _table("sparse_sgd_update", Paper("A Stochastic Approximation Method", "AMS 22, 1951")),
    _table("rowwise_adagrad_update", _ADAGRAD),
    _table("sparse_adagrad_update", _ADAGRAD),
    _table(
        "sparse_adam_update",
        Paper("Adam", "1412.6980", "lr = 1e-3, b1 = 0.9, b2 = 0.999, eps = 1e-8"),
        Paper("Decoupled Weight Decay Regularization (AdamW)", "1711.05101"),
    ),
    _table(
        "ftrl_proximal_update",
        Paper("Ad Click Prediction: a View from the Trenches", "KDD 2013", "beta = 1"),
    ),
    _table("group_adagrad_update", _MONOLITH),
    _table("merge_duplicates", _MONOLITH),
    _table("sparse_dedup_optimize", _MONOLITH),
    _table("serving_row_quantize", _MONOLITH),
    _table("serving_row_dequantize", _MONOLITH, dtypes=("float32", "float16", "bfloat16")),
    _pair(
        "npo_loss",
        Paper("Negative Preference Optimization", "2404.05868", "beta = 0.1"),
        Paper("SimNPO", "2410.07163"),
        room="unlearn",
    ),
    _table("error_memory_compensate", _RELOOP2),
    _table("lsh_projections", _SIMHASH, _RELOOP2, impls=("reference",), dtypes=("float32",)),
    _table("lsh_buckets", _SIMHASH, _RELOOP2),
    _table("lsh_error_sketch_write", _RELOOP2),
    _table("lsh_error_sketch", _RELOOP2),
    _table(
        "expert_space_routing",
        Paper("OmniBind", "2407.11895", "D = 1536, temperature 1, text 0.1"),
        impls=("reference",),
        gradient=True,
    ),
    _table(
        "multi_reward_embedding",
        Paper(
            "Optimizing Immediate Feedback and Retention (DT4IER)", "2404.03637", "K = 100, D = 128"
        ),
        impls=("reference",),
        gradient=True,
    ),
)


def catalog() -> tuple[Op, ...]:
    """Return every public op: name, room, papers, impls, dtypes, gradient, compiles, deterministic, maturity."""
    return _OPS


def rooms() -> tuple[str, ...]:
    return tuple(dict.fromkeys(op.room for op in _OPS))
