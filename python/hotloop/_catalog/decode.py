# SPDX-License-Identifier: Apache-2.0
"""Speculative acceptance, sampling and search, for NumPy, torch or CuPy arrays."""

from functools import partial

from . import Paper, Room

op = Room(__name__, impls=("reference", "cpu"))
on_gpus = partial(op, impls=("reference", "cpu", "cuda"), compiles=True)  # registered operators
tree_search = partial(op, dtypes=("float32", "float64"))

LEVIATHAN = Paper(
    "Fast Inference from Transformers via Speculative Decoding", "2211.17192", "K = 3 to 8"
)
CHEN = Paper("Accelerating LLM Decoding with Speculative Sampling", "2302.01318", "K = 4")
BLOCK = Paper("Block Verification Accelerates Speculative Decoding", "2403.10444")
EAGLE_2 = Paper("EAGLE-2", "2406.16858", "26 to 60 nodes, depth 5 to 6")
BLOCKWISE = Paper("Blockwise Parallel Decoding", "1811.03115")
TOP_P = Paper("The Curious Case of Neural Text Degeneration", "1904.09751", "top_p = 0.9 to 0.95")
TOP_K = Paper("Hierarchical Neural Story Generation", "1805.04833", "top_k = 10 to 50")
MIN_P = Paper("Turning Up the Heat: Min-p Sampling", "2407.01082", "min_p = 0.05 to 0.1")
MIRROR = Paper("Mirror Speculative Decoding", "2510.13161", "kappa = 1 to 8, gamma = 3 to 7")
MEDUSA = Paper("Medusa", "2401.10774", "epsilon = 0.3, alpha = 0.09, T = 0.7")
LANTERN = Paper("LANTERN", "2410.03355", "k = 1000, delta = 0.05 to 0.4")
HAPO = Paper("From Uniform to Heterogeneous (HAPO)", "2509.16591", "tau = 0.05")
VAS = Paper("Value Augmented Sampling", "2405.06639", "k = 20, beta = 3")
REST_MCTS = Paper("ReST-MCTS*", "2406.03816", "alpha = 0.5, c = 0.7, branch 3")
MCTS_DPO = Paper("Monte Carlo Tree Search Boosts Reasoning", "2405.00451", "c = 1, lp = 1.25")
REVERSE = Paper("Generate, but Verify (REVERSE)", "2504.13169", "tau = 0.003, N = 10, K = 50")

on_gpus("chain_speculative_sampling", LEVIATHAN, CHEN)
on_gpus("block_speculative_sampling", BLOCK)
on_gpus("speculative_streaming_verify", MIRROR, LEVIATHAN)
on_gpus("tree_speculative_verify", Paper("SpecInfer", "2305.09781"), EAGLE_2)
on_gpus("greedy_speculative_accept", BLOCKWISE, MEDUSA)
op("typical_accept", MEDUSA)
op("lantern_relaxed_accept", LANTERN, Paper("LANTERN++", "2502.06352", "delta > 1: a factor"))
op("vq_neighbor_table", LANTERN)
op("mirror_sd_branch_reuse", MIRROR, dtypes=())
on_gpus("sample", TOP_P, TOP_K, MIN_P, implements=("topk_topp_minp_sample",))
op("Logits", TOP_P, TOP_K, MIN_P, impls=("reference", "cpu", "cuda"))
op("Probs", TOP_P, TOP_K, MIN_P, impls=("reference", "cpu", "cuda"))
op("law_probs", TOP_P, TOP_K, MIN_P)
op("top_logprobs", MIRROR)
op("entropy_adaptive_temperature", HAPO)
op("geometric_mixture_logits", Paper("IPO-MD", "2403.08635", "mixture = 0.5"))
op("value_augmented_logits", VAS)
op("value_augmented_law", VAS, impls=("reference",))
op("likelihood_beam_search", Paper("From r to Q*", "2404.12358", "k = 5"))
tree_search("mcts_star_step", REST_MCTS)
tree_search("puct_select_backup", MCTS_DPO)
op("retrospective_backtrack", REVERSE)
