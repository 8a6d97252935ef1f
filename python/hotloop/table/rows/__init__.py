# SPDX-License-Identifier: Apache-2.0
"""Rows of matrices: updates by the row optimizers, merging of repeated ids, rows in fewer bytes."""
