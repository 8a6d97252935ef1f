# SPDX-License-Identifier: Apache-2.0
"""TensorFlow Recommenders Addons: ``dynamic_embedding``, in a process and environment of its own.

TFRA 0.8.1 wants TensorFlow 2.16.2, which has no place beside this torch. Its interpreter is
``.venv-tfra/bin/python`` (``make rivals``) or what ``TFRA_PYTHON`` names. The worker keeps the ids
of every input set; a turn is one number down a pipe and one byte back, 0.05 ms of some 10 ms.
"""

from __future__ import annotations

import os
import subprocess
import weakref
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .._case import Contender, Inputs, Lazy, Missing
from .._machine import ROOT

NAME = "tfra"
_WORKER = Path(__file__).with_name("_tfra_worker.py")


def lookup() -> Lazy:
    """``lookup`` of ids that are stored."""

    def resolve() -> Contender | Missing:
        python = Path(os.environ.get("TFRA_PYTHON", ROOT / ".venv-tfra" / "bin" / "python"))
        if not python.exists():
            return Missing(NAME, f"no {python} (`make rivals`, or name it in TFRA_PYTHON)")
        probe = [str(python), "-c", "import tensorflow_recommenders_addons"]
        done = subprocess.run(probe, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return Missing(NAME, (done.stderr.strip().splitlines() or ["does not import"])[-1])

        def forward(x: Inputs) -> Tensor:
            worker = x["built"].get(NAME)
            if worker is None:
                stored = x["world"]
                worker = x["built"][NAME] = Worker(python, stored.keys, stored.values)
            return worker.lookup(x["ids"])  # type: ignore[no-any-return]

        return Contender(NAME, "rival", forward, elsewhere=True)

    return Lazy(NAME, resolve)


class Worker:
    """The other process. It answers a lookup once TensorFlow holds the result.

    The result itself comes over the pipe the first time that an input set is looked up, which is
    when it is checked or warmed up, and is returned again by later turns.
    """

    def __init__(self, python: Path, keys: Tensor, values: Tensor) -> None:
        threads = torch.get_num_threads()
        words = [str(python), str(_WORKER), str(values.shape[1]), str(threads)]
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        weakref.finalize(self, self._process.kill)
        self._dim = values.shape[1]
        self._sets: dict[int, tuple[int, Tensor, Tensor]] = {}
        self._send(keys)
        self._send(values)

    def lookup(self, ids: Tensor) -> Tensor:
        known = self._sets.get(id(ids))
        if known is not None:
            self._write(np.int64(known[0]).tobytes())
            self._read(1)
            return known[2]
        number = len(self._sets)
        self._write(np.int64(-1).tobytes())
        self._send(ids)
        answer = bytearray(self._read(4 * len(ids) * self._dim))
        rows = torch.frombuffer(answer, dtype=torch.float32).reshape(len(ids), -1)
        self._sets[id(ids)] = (number, ids, rows)
        return rows

    def _send(self, tensor: Tensor) -> None:
        self._write(np.int64(len(tensor)).tobytes())
        self._write(tensor.contiguous().numpy().tobytes())

    def _write(self, data: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(data)
        self._process.stdin.flush()

    def _read(self, count: int) -> bytes:
        assert self._process.stdout is not None
        data = self._process.stdout.read(count)
        if len(data) != count:
            raise RuntimeError("the process of TFRA ended before it answered")
        return data
