# SPDX-License-Identifier: Apache-2.0
"""The ops of ``hotloop.moe`` in plain torch."""

from .recipes import pmoe_routing_loss

__all__ = ["pmoe_routing_loss"]
