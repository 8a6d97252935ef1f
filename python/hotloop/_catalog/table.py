# SPDX-License-Identifier: Apache-2.0
"""Embedding tables keyed by any 64 bits, and what goes with them: NumPy, torch or CuPy arrays."""

from functools import partial

from . import Paper, Room

HALVES = ("float32", "float16", "bfloat16")
op = Room(__name__, impls=("reference", "cpu"))
keys = partial(op, dtypes=())  # no numbers but keys and counts
rows = partial(op, impls=("cpu", "cuda"), dtypes=HALVES)
trained = partial(op, gradient=True, compiles=True, needs_torch=True)
plain = partial(trained, impls=("reference",))

MONOLITH = Paper("Monolith", "2209.07663", "15 sightings at most, 3e8 ids, 7 splits")
HKV = Paper("HierarchicalKV (names of the verbs and of the scores)", "NVIDIA, 2022")
UNIFIED = Paper("Unified Embedding", "2305.12102", "2 to 6 chunks per feature")
TORCHREC = Paper("TorchRec managed collisions", "TorchRec 1.8")
SGD = Paper("A Stochastic Approximation Method", "AMS 22, 1951")
ADAGRAD = Paper("Adaptive Subgradient Methods (Adagrad)", "JMLR 12, 2011")
ADAM = Paper("Adam", "1412.6980", "lr = 1e-3, b1 = 0.9, b2 = 0.999, eps = 1e-8")
ADAMW = Paper("Decoupled Weight Decay Regularization (AdamW)", "1711.05101")
FTRL = Paper("Ad Click Prediction: a View from the Trenches", "KDD 2013", "beta = 1")
SIMHASH = Paper("Similarity Estimation Techniques from Rounding", "STOC, 2002", "L = 16")
RELOOP2 = Paper(
    "ReLoop2: Self-Adaptive Recommendation Models via Error Compensation",
    "2306.08808",
    "k = 180 or 70, tau = 0.1, lam = 0.9 or 0.4",
)
OMNIBIND = Paper("OmniBind", "2407.11895", "D = 1536, temperature 1, text 0.1")
DT4IER = Paper(
    "Optimizing Immediate Feedback and Retention (DT4IER)", "2404.03637", "K = 100, D = 128"
)
PHILOX = Paper("Parallel random numbers: as easy as 1, 2, 3", "SC11, 2011", "Philox 4x32-10")

rows(
    "Table",
    MONOLITH,
    HKV,
    dtypes=(*HALVES, "int8"),
    implements=(
        "collisionless_table_lookup_upsert",
        "expire_evict",
        "table_snapshot_restore",
        "bucketed_score_table_upsert",
        "bucketed_score_table_find",
    ),
)
rows("DeltaLog", MONOLITH, implements=("delta_parameter_sync",))
rows("Delta", MONOLITH)
rows("HashEmbedding", MONOLITH, gradient=True, compiles=True, needs_torch=True)
rows("HashEmbeddingBag", MONOLITH, gradient=True, compiles=True, needs_torch=True)
rows("TableOptimizer", needs_torch=True)
rows("Constant")
rows("Uniform", PHILOX)
rows("Normal", PHILOX)
op("mch_evict_batch", TORCHREC, dtypes=())
keys("CountFilter", MONOLITH)
keys("frequency_admission_filter", MONOLITH)
keys("ProbabilisticFilter", MONOLITH)
keys("probabilistic_admission_filter", MONOLITH)
keys("hash_strings", UNIFIED)
keys("feature_keys", UNIFIED, impls=("reference",))
keys("salted_hash_bucket", UNIFIED, compiles=True)
trained("multiplexed_embedding_lookup", UNIFIED)
trained("UnifiedEmbedding", UNIFIED)
rows("SGD", SGD)
op("sparse_sgd_update", SGD)
rows("RowwiseAdagrad", ADAGRAD)
op("rowwise_adagrad_update", ADAGRAD)
rows("Adagrad", ADAGRAD)
op("sparse_adagrad_update", ADAGRAD)
rows("Adam", ADAM, ADAMW)
op("sparse_adam_update", ADAM, ADAMW)
rows("FTRL", FTRL)
op("ftrl_proximal_update", FTRL)
rows("GroupAdagrad", MONOLITH)
op("group_adagrad_update", MONOLITH)
op("merge_duplicates", MONOLITH)
op("sparse_dedup_optimize", MONOLITH)
op("serving_row_quantize", MONOLITH)
op("serving_row_dequantize", MONOLITH, dtypes=HALVES)
op("ErrorMemory", RELOOP2)
op("error_memory_compensate", RELOOP2)
op("ErrorSketch", RELOOP2)
op("lsh_error_sketch", RELOOP2)
op("lsh_error_sketch_write", RELOOP2)
op("lsh_buckets", SIMHASH, RELOOP2)
op("lsh_projections", SIMHASH, RELOOP2, impls=("reference",), dtypes=("float32",))
plain("expert_space_routing", OMNIBIND)
plain("multi_reward_embedding", DT4IER)
