# SPDX-License-Identifier: Apache-2.0
"""The ops of ``hotloop.moe`` in plain torch."""

__all__: list[str] = []
