# SPDX-License-Identifier: Apache-2.0
"""What every front door uses: checks, arrays, the choice of an implementation, the compiled modules.

torch and CuPy are looked up where a caller already loaded them, never imported, except by ``buffers``, ``autocast``,
``second`` and ``at_run_time``, which only rooms that need torch import.
"""
