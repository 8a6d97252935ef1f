# SPDX-License-Identifier: Apache-2.0
"""Embedding tables keyed by any 64 bits, and what goes with them.

NumPy, torch or CuPy arrays; torch is needed for what has a gradient only.
"""

from typing import TYPE_CHECKING

from ..core.rules import FTRL, SGD, Adagrad, Adam, GroupAdagrad, RowOptimizer, RowwiseAdagrad
from ..front import needs
from ..reference.table.results import Compensated, Eviction, ManagedSlots, MergedGradients
from .error_memory.memory import ErrorMemory, error_memory_compensate
from .error_memory.sketch import (
    ErrorSketch,
    SketchCompensated,
    lsh_buckets,
    lsh_error_sketch,
    lsh_error_sketch_write,
    lsh_projections,
)
from .files.container import FormatError
from .files.delta_log import DeltaLog
from .files.deltas import Delta, DeltaError
from .filters import (
    CountFilter,
    ProbabilisticFilter,
    frequency_admission_filter,
    probabilistic_admission_filter,
)
from .hashing import feature_keys, hash_strings, salted_hash_bucket
from .initializers import Constant, Normal, Uniform
from .managed_slots import mch_evict_batch
from .results import Evicted, Found, Rows, TableFullError
from .rows.merge import merge_duplicates, sparse_dedup_optimize
from .rows.quantize import serving_row_dequantize, serving_row_quantize
from .rows.updates import (
    ftrl_proximal_update,
    group_adagrad_update,
    rowwise_adagrad_update,
    sparse_adagrad_update,
    sparse_adam_update,
    sparse_sgd_update,
)
from .table import Table

if TYPE_CHECKING:
    from ._kept import KeptGradients as KeptGradients
    from .modules import HashEmbedding as HashEmbedding
    from .modules import HashEmbeddingBag as HashEmbeddingBag
    from .multiplex import UnifiedEmbedding as UnifiedEmbedding
    from .multiplex import multiplexed_embedding_lookup as multiplexed_embedding_lookup
    from .routing import expert_space_routing as expert_space_routing
    from .routing import multi_reward_embedding as multi_reward_embedding
    from .training import TableOptimizer as TableOptimizer

__all__ = [
    "FTRL", "SGD", "Adagrad", "Adam", "Compensated", "Constant", "CountFilter", "Delta", "DeltaError", "DeltaLog",
    "ErrorMemory", "ErrorSketch", "Evicted", "Eviction", "FormatError", "Found", "GroupAdagrad", "HashEmbedding",
    "HashEmbeddingBag", "KeptGradients", "ManagedSlots", "MergedGradients", "Normal", "ProbabilisticFilter",
    "RowOptimizer", "Rows", "RowwiseAdagrad", "SketchCompensated", "Table", "TableFullError", "TableOptimizer",
    "UnifiedEmbedding", "Uniform", "error_memory_compensate", "expert_space_routing", "feature_keys",
    "frequency_admission_filter", "ftrl_proximal_update", "group_adagrad_update", "hash_strings", "lsh_buckets",
    "lsh_error_sketch", "lsh_error_sketch_write", "lsh_projections", "mch_evict_batch", "merge_duplicates",
    "multi_reward_embedding", "multiplexed_embedding_lookup", "probabilistic_admission_filter",
    "rowwise_adagrad_update", "salted_hash_bucket", "serving_row_dequantize", "serving_row_quantize",
    "sparse_adagrad_update", "sparse_adam_update", "sparse_dedup_optimize", "sparse_sgd_update",
]  # fmt: skip

_WITH_TORCH = {
    "HashEmbedding": "modules",
    "HashEmbeddingBag": "modules",
    "KeptGradients": "_kept",
    "TableOptimizer": "training",
    "UnifiedEmbedding": "multiplex",
    "expert_space_routing": "routing",
    "multi_reward_embedding": "routing",
    "multiplexed_embedding_lookup": "multiplex",
}
__getattr__ = needs.room(__name__, globals(), _WITH_TORCH)
