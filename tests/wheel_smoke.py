# SPDX-License-Identifier: Apache-2.0
"""What an installed wheel must do at once: run by `make wheel` in an environment without a compiler."""

import importlib
import importlib.util
import shutil
import subprocess
import sys
import time

without_torch = "--no-torch" in sys.argv

started = time.perf_counter()
import hotloop  # noqa: E402

seconds = time.perf_counter() - started
assert seconds < 0.15, f"import hotloop took {seconds:.3f} s"
assert "torch" not in sys.modules
assert "numpy" not in sys.modules
for tool in ("gcc", "g++", "cc", "c++", "clang", "nvcc", "ninja", "cmake"):
    assert shutil.which(tool) is None, (
        f"{tool} is on PATH: this is no test of a machine without a compiler"
    )

import numpy as np  # noqa: E402

words = hotloop.core.philox(0, 1)
assert [hex(w) for w in words[0]] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"], words
x = np.linspace(-3, 3, 7, dtype=np.float32)
assert np.allclose(hotloop.core.elementary("exp", x), np.exp(x), rtol=1e-6)
report = subprocess.run(
    [sys.executable, "-m", "hotloop", "info"], capture_output=True, text=True, check=True
).stdout
assert "preference.dpo_loss" in report

cuda_module = importlib.util.find_spec("hotloop._cuda")
if cuda_module is not None and cuda_module.origin is not None:  # not only the folder of its stubs
    cuda = importlib.import_module("hotloop._cuda")  # loads without a driver
    print("_cuda", cuda.architectures(), "devices", cuda.device_count())

from hotloop import decode  # noqa: E402

logits = np.log(np.array([[0.1, 0.2, 0.7]], np.float32))
assert int(decode.sample(decode.Logits(logits, temperature=0.0)).token_ids[0]) == 2
draft = np.array([[2]])
verified = decode.chain_speculative_sampling(None, draft, np.stack([np.exp(logits)] * 2, 1), seed=1)
assert verified.output_token_ids.shape == (1, 2)

if without_torch:
    assert "torch" not in sys.modules
    message = ""
    try:
        hotloop.preference  # noqa: B018
    except ImportError as error:
        message = str(error)
    assert "[hotloop] preference: expected torch" in message, message
else:
    import torch

    z = torch.zeros(2)
    assert abs(float(hotloop.preference.dpo_loss(z, z, z, z)) - 0.6931472) < 1e-6
    h, w = torch.randn(4, 8, requires_grad=True), torch.randn(16, 8)
    loss = hotloop.logprob.linear_cross_entropy(h, w, torch.tensor([0, 3, -100, 15]))
    loss.backward()
    expected = torch.nn.functional.cross_entropy(h.detach() @ w.T, torch.tensor([0, 3, -100, 15]))
    assert torch.allclose(loss.detach(), expected, atol=1e-5)
print(f"wheel works: import {seconds * 1e3:.0f} ms, {len(hotloop.catalog())} ops")
