# SPDX-License-Identifier: Apache-2.0
"""TorchRec: ids remapped by a managed-collision module (MCH), then an ``EmbeddingBagCollection``.

On the CPU this is what TorchRec has for ids that are not row numbers: HashZch will not train there.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .._case import Contender, Inputs, Lazy
from ._optional import contender

NAME, EVERY_STEP = "torchrec mch", "torchrec mch, evicts each step"
_MODULES = "torchrec.modules."
_FEATURE, _TABLE = "id", "rows"
# New ids wait for the next eviction, which sorts the whole table; the median step has none.
_INTERVAL = 10


def lookup() -> Lazy:
    """Remap and rows of ids that are stored, in evaluation."""
    return _forward(NAME, training=False, interval=_INTERVAL)


def train_forward() -> list[Lazy]:
    """Bags of ids as in training, up to the pooled rows."""
    return [
        _forward(NAME, training=True, interval=_INTERVAL),
        _forward(EVERY_STEP, training=True, interval=1),
    ]


def _forward(name: str, training: bool, interval: int) -> Lazy:
    def build(module: ModuleType) -> Contender:
        make = _maker(module, training, interval)

        def forward(x: Inputs) -> Tensor:
            made = x["built"].get(name)
            if made is None:
                made = x["built"][name] = make(x["world"].keys, x["world"].values)
            collection, features = made
            ids = x["ids"]
            ends = x["ends"] if "ends" in x.tensors else torch.arange(len(ids) + 1)
            with torch.set_grad_enabled(training):
                pooled, _ = collection(features(keys=[_FEATURE], values=ids, offsets=ends))
            rows: Tensor = pooled[_FEATURE]
            return rows

        return Contender(name, "rival", forward)

    return contender(name, _MODULES + "mc_embedding_modules", build)


def _maker(
    module: ModuleType, training: bool, interval: int
) -> Callable[[Tensor, Tensor], tuple[Any, Any]]:
    collisions = importlib.import_module(_MODULES + "mc_modules")
    tables = importlib.import_module(_MODULES + "embedding_modules")
    configs = importlib.import_module(_MODULES + "embedding_configs")
    tensors = importlib.import_module("torchrec.sparse.jagged_tensor")

    def make(keys: Tensor, values: Tensor) -> tuple[Any, Any]:
        cpu = torch.device("cpu")
        size = len(keys) + 1  # the last row is that of ids it does not know
        config = configs.EmbeddingBagConfig(
            name=_TABLE, embedding_dim=values.shape[1], num_embeddings=size,
            feature_names=[_FEATURE],
        )  # fmt: skip
        mch = collisions.MCHManagedCollisionModule(
            zch_size=size, device=cpu, eviction_interval=interval,
            eviction_policy=collisions.LFU_EvictionPolicy(),
        )  # fmt: skip
        bags = tables.EmbeddingBagCollection(tables=[config], device=cpu)
        every = {_TABLE: tensors.JaggedTensor(values=keys, lengths=torch.ones_like(keys))}
        mch.train()
        for _ in range(interval):
            mch.profile(every)
        slots = mch.remap(every)[_TABLE].values()
        with torch.no_grad():
            bags.embedding_bags[_TABLE].weight[slots] = values
        managed = collisions.ManagedCollisionCollection({_TABLE: mch}, [config])
        collection = module.ManagedCollisionEmbeddingBagCollection(bags, managed)
        return collection.train(training), tensors.KeyedJaggedTensor

    return make
