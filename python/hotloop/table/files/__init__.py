# SPDX-License-Identifier: Apache-2.0
"""Tables in files: the container and what is written of it, snapshots, deltas, and what pickles and modules keep."""
