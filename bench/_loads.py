# SPDX-License-Identifier: Apache-2.0
"""Whether the package that is on the path can run on this GPU: ``python -m bench._loads 90``."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType


def problem(cuda: ModuleType, capability: int) -> str:
    """Why ``_cuda`` cannot run on a device of this compute capability (90 for 9.0), or ""."""
    if cuda.device_count() < 1:
        return "hotloop._cuda finds no device"
    held = cuda.architectures()
    if f"sm_{capability}" not in held:
        return f"hotloop._cuda holds {' '.join(held)}, not sm_{capability}"
    return ""


def main(capability: int) -> int:
    import torch  # first: it carries the OpenMP runtime

    core = importlib.import_module("hotloop._core")
    cuda = importlib.import_module("hotloop._cuda")  # an ImportError here says why, and fails
    if cuda.__file__ is None:
        raise ImportError("hotloop._cuda was not built: there is only the folder of its stubs")
    print(core.__file__, cuda.__file__, torch.cuda.get_device_name())
    found = problem(cuda, capability)
    print(found or f"machine code for sm_{capability}; devices: {cuda.device_count()}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
