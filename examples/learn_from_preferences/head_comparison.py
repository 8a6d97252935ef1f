# SPDX-License-Identifier: Apache-2.0
"""Time and memory of hotloop's head against plain torch on the same training step.

``python -m examples.learn_from_preferences.head_comparison CASE`` measures one case, given as JSON, in
a fresh process. Memory first: each contender runs in a fork of that process which has computed
nothing yet, so that no pool or cache of an earlier contender counts for or against it. Time after
that: the contenders take turns in the parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from hotloop.logprob import linear_cross_entropy
from hotloop.preference import linear_preference_loss
from torch import Tensor

from .settings import Settings, seed_of
from .train import IGNORE_INDEX, apply_gradient, hidden_states, new_model, new_optimizer

CONTENDERS = ("hotloop", "torch")
SIZES = ("this model", "large vocabulary")
LOSSES = ("cross-entropy", "dpo")
MEMORY = (
    "highest resident memory during one step above that just before it, in a fresh process after one "
    "step on two rows"
)
TIME = "median of steps, contenders taking turns"
Step = Callable[[str, int], Tensor]


def cases(settings: Settings) -> list[dict[str, Any]]:
    """This program's own model, and a head of a larger vocabulary; a process each."""
    shared = {"settings": dataclasses.asdict(settings), "threads": torch.get_num_threads()}
    repeats = (settings.measure_repeats, settings.large_repeats)
    return [shared | {"size": size, "repeats": n} for size, n in zip(SIZES, repeats)]


def in_fresh_process(case: dict[str, Any]) -> list[dict[str, Any]]:
    """Results of one size, one per loss."""
    command = [sys.executable, "-m", __name__, json.dumps(case)]
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        command, cwd=root, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"measuring {case['size']} failed:\n{done.stderr}")
    results: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return results


def head_loss(
    contender: str, loss: str, hidden: Tensor, weight: Tensor, labels: Tensor, beta: float
) -> Tensor:
    """The loss both contenders compute, from hidden states [B, T, D] and the head [V, D]."""
    if loss == "cross-entropy":
        if contender == "hotloop":
            return linear_cross_entropy(hidden, weight, labels)
        return F.cross_entropy(F.linear(hidden, weight).flatten(0, 1), labels.flatten())
    ref_logps = torch.zeros(len(labels))
    if contender == "hotloop":
        value, _ = linear_preference_loss(
            hidden, weight, labels, loss="dpo", ref_logps=ref_logps, options={"beta": beta}
        )
        return value
    logits = F.linear(hidden, weight)
    valid = labels != IGNORE_INDEX
    picked = logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    logps = ((picked - logits.logsumexp(-1)) * valid).sum(-1) - ref_logps
    chosen, rejected = logps.chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


def step_of(case: dict[str, Any], loss_name: str) -> tuple[Step, dict[str, int]]:
    """A function (contender, rows) -> loss that runs one step, and its sizes."""
    settings = Settings(**case["settings"])
    generator = torch.Generator().manual_seed(seed_of(settings.seed, "measure"))
    pairs = loss_name == "dpo"
    if case["size"] == "this model":
        rows = 2 * settings.pair_batch if pairs else settings.pretrain_batch
        length, vocabulary = settings.context, 256
    else:
        length, vocabulary = 128, settings.large_vocabulary
        rows = max(4, settings.large_rows // length)
    labels = torch.randint(1, vocabulary, (rows, length), generator=generator)
    if pairs:
        labels[:, : settings.prompt_bytes * length // settings.context] = IGNORE_INDEX
    sizes = {"rows": rows, "tokens": rows * length, "vocabulary": vocabulary}

    if case["size"] == "this model":
        model = new_model(settings)
        optimizer = new_optimizer(model, 0.0)
        tokens = labels.clamp(min=0)

        def model_step(contender: str, rows: int) -> Tensor:
            hidden = hidden_states(model, tokens[:rows], settings)
            loss = head_loss(contender, loss_name, hidden, model.head, labels[:rows], settings.beta)
            value = loss.detach()
            apply_gradient(model, optimizer, loss, 1e-9)
            return value

        return model_step, sizes | {"width": settings.width}

    width = settings.large_width
    hidden = torch.randn(rows, length, width, generator=generator).requires_grad_()
    weight = (torch.randn(vocabulary, width, generator=generator) * 0.02).requires_grad_()

    def head_step(contender: str, rows: int) -> Tensor:
        loss = head_loss(contender, loss_name, hidden[:rows], weight, labels[:rows], settings.beta)
        loss.backward()
        hidden.grad = weight.grad = (
            None  # what one step keeps must not hide what the next one takes
        )
        return loss.detach()

    return head_step, sizes | {"width": width}


def measure(case: dict[str, Any]) -> list[dict[str, Any]]:
    peaks = {
        (loss, contender): _peak_in_fork(case, loss, contender)
        for loss in LOSSES
        for contender in CONTENDERS
    }
    torch.set_num_threads(case["threads"])
    return [_timed(case, loss, peaks) for loss in LOSSES]


def _timed(case: dict[str, Any], loss: str, peaks: dict[tuple[str, str], int]) -> dict[str, Any]:
    step, sizes = step_of(case, loss)
    rows = sizes["rows"]
    values = {contender: float(step(contender, rows)) for contender in CONTENDERS}
    seconds: dict[str, list[float]] = {contender: [] for contender in CONTENDERS}
    for turn in range(case["repeats"]):
        for contender in CONTENDERS if turn % 2 else CONTENDERS[::-1]:
            start = time.perf_counter()
            step(contender, rows)
            seconds[contender].append(time.perf_counter() - start)
    what = "whole training step" if case["size"] == "this model" else "head, forward and backward"
    result: dict[str, Any] = {"size": case["size"], "loss": loss} | sizes
    result |= {"measured": what, "threads": case["threads"]}
    for contender in CONTENDERS:
        taken = seconds[contender]
        result[contender] = {
            "median_ms": 1e3 * statistics.median(taken),
            "least_ms": 1e3 * min(taken),
            "most_ms": 1e3 * max(taken),
            "peak_mb": peaks[loss, contender] / 1e6,
            "loss": values[contender],
        }
    return result


def _peak_in_fork(case: dict[str, Any], loss: str, contender: str) -> int:
    """Bytes; the child has its own memory, and threads only from here on."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(case["threads"])
            step, sizes = step_of(case, loss)
            step(contender, 2)
            before = _resting()
            step(contender, sizes["rows"])
            os.write(writer, str(_highest() - before).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    if not text:
        raise RuntimeError(f"the process that measured the memory of {contender} died")
    return max(0, int(text))


def _resting() -> int:
    """Bytes resident now; makes the kernel forget the highest value so far where it can."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that glibc keeps would hide new needs
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _highest()  # the highest so far is then the only honest start
    return _status("VmRSS")


def _highest() -> int:
    value = _status("VmHWM")
    return value or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status(name: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith(name + ":")), 0)


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
