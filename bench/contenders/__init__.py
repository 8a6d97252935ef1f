# SPDX-License-Identifier: Apache-2.0
"""The rivals, called the way their own users call them. One file per library."""
