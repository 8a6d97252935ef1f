# SPDX-License-Identifier: Apache-2.0
"""One thread for small inputs: waiting for a second one costs more than these tests do."""

import torch  # noqa: F401  torch.compile looks it up in the module that is called conftest
from fixtures import threads

single_thread = threads(1, "session")
