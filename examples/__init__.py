# SPDX-License-Identifier: Apache-2.0
"""Programs that use hotloop from end to end."""
