"""The ops of ``hotloop.table`` in NumPy and float64."""

from .optimizers import (
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
    "ftrl_proximal_update",
    "group_adagrad_update",
    "merge_duplicates",
    "rowwise_adagrad_update",
    "serving_row_dequantize",
    "serving_row_quantize",
    "sparse_adagrad_update",
    "sparse_adam_update",
    "sparse_dedup_optimize",
    "sparse_sgd_update",
]
