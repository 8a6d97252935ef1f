"""Row optimizers, gradients of repeated ids merged, and rows quantised for serving. NumPy, torch or CuPy arrays."""

from ._rows import MergedGradients
from .batches import merge_duplicates, sparse_dedup_optimize
from .optimizers import FTRL, SGD, Adagrad, Adam, GroupAdagrad, RowOptimizer, RowwiseAdagrad
from .row_updates import (
    ftrl_proximal_update,
    group_adagrad_update,
    rowwise_adagrad_update,
    sparse_adagrad_update,
    sparse_adam_update,
    sparse_sgd_update,
)
from .serving import serving_row_dequantize, serving_row_quantize

__all__ = [
    "FTRL",
    "SGD",
    "Adagrad",
    "Adam",
    "GroupAdagrad",
    "MergedGradients",
    "RowOptimizer",
    "RowwiseAdagrad",
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
