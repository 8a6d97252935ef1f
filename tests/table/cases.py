# SPDX-License-Identifier: Apache-2.0
"""Valid calls of the ops of this room on tensors."""

import torch
from catalog_cases import Call, D, normal, tokens

CALLS = [
    Call("salted_hash_bucket", lambda n: {"keys": tokens(n), "num_buckets": 100}),
    Call(
        "multiplexed_embedding_lookup",
        lambda n: {
            "tables": normal(7, 3, leaf=True),
            "values": [tokens(n), (tokens(2 * n), 2 * torch.arange(n + 1, device="cpu"))],
            "chunks": [2, 1],
        },
    ),
    Call(
        "expert_space_routing",
        lambda n: {
            "embeddings": normal(n, 3, 2, D, leaf=True),
            "router_logits": normal(n, 3, leaf=True),
        },
    ),
    Call(
        "expert_space_routing",
        lambda n: {
            "embeddings": normal(n, 3, D, leaf=True),
            "router_logits": normal(n, 3, leaf=True),
        },
        variant="expert_space_routing_without_copies",
    ),
    Call(
        "multi_reward_embedding",
        lambda n: {
            "returns_to_go": normal(n, 3, 2),
            "w1": normal(2, 5, leaf=True),
            "w2": normal(5, 5, leaf=True),
            "anchors": normal(5, 2, leaf=True),
            "bucket_weight": normal(2, D, leaf=True),
            "bucket_bias": normal(D, leaf=True),
        },
    ),
]
