# SPDX-License-Identifier: Apache-2.0
"""A small byte-level decoder learns to write from text, then from checkable preferences.

Run it with ``python -m examples.learn_from_preferences`` from the root of the repository.
"""

import os

# Before torch loads its OpenMP. Waiting threads spin by default, and on a machine with other work they
# take the core from the thread they wait for: a training step of this model went from 0.10 s to over
# 2 s on two busy cores. Asleep they cost 0.13 s, idle or busy. Results are the same.
if "GOMP_SPINCOUNT" not in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
