# SPDX-License-Identifier: Apache-2.0
"""The ops of ``hotloop.table`` without tricks: NumPy, one row or query at a time; torch where there is a gradient."""

from ...front import needs
from .error_memory import error_memory_compensate
from .error_sketch import lsh_buckets, lsh_error_sketch, lsh_error_sketch_write, lsh_projections
from .filters import frequency_admission_filter, probabilistic_admission_filter
from .hashing import feature_keys, hash_strings, salted_hash_bucket
from .managed_slots import mch_evict_batch
from .rows import (
    ftrl_proximal_update,
    group_adagrad_update,
    merge_duplicates,
    rowwise_adagrad_update,
    serving_row_dequantize,
    serving_row_quantize,
    sparse_adagrad_update,
    sparse_adam_update,
    sparse_dedup_optimize,
    sparse_sgd_update,
)

__all__ = [
    "error_memory_compensate", "expert_space_routing", "feature_keys", "frequency_admission_filter",
    "ftrl_proximal_update", "group_adagrad_update", "hash_strings", "lsh_buckets", "lsh_error_sketch",
    "lsh_error_sketch_write", "lsh_projections", "mch_evict_batch", "merge_duplicates", "multi_reward_embedding",
    "multiplexed_embedding_lookup", "probabilistic_admission_filter", "rowwise_adagrad_update", "salted_hash_bucket",
    "serving_row_dequantize", "serving_row_quantize", "sparse_adagrad_update", "sparse_adam_update",
    "sparse_dedup_optimize", "sparse_sgd_update",
]  # fmt: skip

_WITH_TORCH = {
    "expert_space_routing": "routing",
    "multi_reward_embedding": "routing",
    "multiplexed_embedding_lookup": "multiplex",
}
__getattr__ = needs.room(__name__, globals(), _WITH_TORCH)
