# SPDX-License-Identifier: Apache-2.0
"""The error memory of ReLoop2: exact, and as a sketch."""
