# SPDX-License-Identifier: Apache-2.0
"""Claims of papers, tried on small models: each file is a program, and its table stands in docs/fidelity.md."""
