# SPDX-License-Identifier: Apache-2.0
"""Real forks, each with a time limit: after calls on several threads, and while other threads use a table."""

from __future__ import annotations

import os

import pytest
from processes import WITHOUT_TORCH, printed

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")

FORKS = """
import os, signal, sys, threading, time, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # Python's own, about forks of processes with threads

def ends(work, seconds=60):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(3)
        os._exit(0)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hung"
"""


def run(code: str) -> str:
    return printed(FORKS + code, OMP_NUM_THREADS="2")


NUMPY_ROOMS = """
import numpy as np
from hotloop import core
from hotloop.front import native as _native
from hotloop.decode import Logits, sample
from hotloop.table import Table

x = np.zeros(1 << 20, np.float32)
logits = np.zeros((64, 20000), np.float32)
keys, values = np.arange(100000), np.zeros((100000, 16), np.float32)
table = Table(16)

def work():
    assert core.elementary("exp", x)[0] == 1.0
    assert sample(Logits(logits), seed=1).token_ids.shape == (64,)
    table.insert_or_assign(keys, values)
    assert table.find(keys).found.all()

work()
assert _native.core.max_threads() == 2
"""

TORCH_ROOMS = """
import torch
torch.set_num_threads(2)
from hotloop.logprob import linear_cross_entropy
from hotloop.preference import dpo_loss

pairs = torch.zeros(1 << 19, requires_grad=True)
hidden, weight = torch.zeros(400, 64, requires_grad=True), torch.zeros(2000, 64)
labels = torch.zeros(400, dtype=torch.int64)

def more():
    dpo_loss(pairs, pairs, pairs.detach(), pairs.detach()).backward()
    linear_cross_entropy(hidden, weight, labels).backward()

more()
"""


def test_a_child_of_a_process_with_threads_runs_every_numpy_room() -> None:
    report = "print(ends(work), ends(lambda: print(_native.core.max_threads(), flush=True)))"
    assert run(NUMPY_ROOMS + report).split() == ["1", "0", "0"]


def test_a_child_of_a_process_with_threads_runs_losses_and_heads() -> None:
    report = "print(ends(lambda: (work(), more())), ends(more), torch.get_num_threads())"
    assert run(NUMPY_ROOMS + TORCH_ROOMS + report).split() == ["0", "0", "2"]


def test_threads_started_in_the_child_work_in_parallel_again() -> None:
    report = """
def in_threads():
    seen = []
    def task():
        seen.append(_native.core.max_threads())
        work()
    thread = threading.Thread(target=task)
    thread.start()
    thread.join(50)
    assert seen == [2] and not thread.is_alive(), seen
print(ends(in_threads), _native.core.max_threads())
"""
    assert run(NUMPY_ROOMS + report).split() == ["0", "2"]


def test_a_fork_before_the_first_call_keeps_its_threads() -> None:
    """Servers that fork their workers first lose nothing."""
    code = """
from hotloop.front import native as _native
_native.core
def look():
    assert _native.core.max_threads() == 2 and not _native.core.lost_threads()
if len(os.listdir("/proc/self/task")) > 1:
    print("other threads already")
else:
    print(ends(look))
"""
    # Without torch nothing else starts threads.
    assert printed(
        WITHOUT_TORCH + FORKS + code, OMP_NUM_THREADS="2", OPENBLAS_NUM_THREADS="1"
    ).strip() in (
        "0",
        "other threads already",
    )


@pytest.mark.parametrize("strategy", ["none", "lru"])
def test_children_of_a_training_process_find_no_lock_taken(strategy: str) -> None:
    """Three threads insert, find and erase while the main thread forks: every child uses the same keys to the end."""
    code = f"""
import numpy as np
from hotloop.table import CountFilter, Table
options = dict(max_capacity=4000, evict_strategy="lru") if {strategy!r} == "lru" else {{}}
table = Table(32, admission=CountFilter(10000, 2), **options)
ones, stop = np.ones((5000, 32), np.float32), threading.Event()

def train(seed):
    draw = np.random.default_rng(seed)
    while not stop.is_set():
        keys = draw.integers(0, 5000, 512)
        table.insert_or_assign(keys, ones[:512])
        table.find_or_insert(keys)
        table.erase(keys[:50])

def use():
    keys = np.arange(3000)
    table.find(keys)
    table.insert_or_assign(keys, ones[:3000])
    table.find_or_insert(keys)
    assert table.erase(keys) is not None

threads = [threading.Thread(target=train, args=(i,)) for i in range(3)]
for thread in threads: thread.start()
print(*(ends(use, 20) for _ in range(24)))
stop.set()
for thread in threads: thread.join()
"""
    assert run(code).split() == ["0"] * 24
