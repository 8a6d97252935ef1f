# SPDX-License-Identifier: Apache-2.0
"""FBGEMM's table-batched embedding on the CPU: rows of a static table, the optimizer fused in."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from torch import Tensor

from .._case import Contender, Inputs, Lazy
from ._optional import contender

NAME = "fbgemm"
_CONFIGS = "fbgemm_gpu.split_embedding_configs"
_COMMON = "fbgemm_gpu.split_table_batched_embeddings_ops_common"
_TRAINING = "fbgemm_gpu.split_table_batched_embeddings_ops_training"


def rowwise_adagrad_step(lr: float, eps: float) -> Lazy:
    """Forward, backward and the exact row-wise Adagrad update, on row numbers."""

    def build(module: ModuleType) -> Contender:
        common = importlib.import_module(_COMMON)
        optimizer = importlib.import_module(_CONFIGS).EmbOptimType.EXACT_ROWWISE_ADAGRAD

        def make(values: Tensor) -> Any:
            spec = (*values.shape, common.EmbeddingLocation.HOST, module.ComputeDevice.CPU)
            tables = module.SplitTableBatchedEmbeddingBagsCodegen(
                [spec], optimizer=optimizer, learning_rate=lr, eps=eps
            )
            tables.split_embedding_weights()[0].copy_(values)
            return tables

        def forward(x: Inputs) -> Tensor:
            tables = x["built"].get(NAME)
            if tables is None:
                tables = x["built"][NAME] = make(x["world"].values)
            pooled: Tensor = tables(x["dense"], x["ends"])
            pooled.backward(x["upstream"])
            return pooled.detach()

        return Contender(NAME, "rival", forward)

    return contender(NAME, _TRAINING, build)
