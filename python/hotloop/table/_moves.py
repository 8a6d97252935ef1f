# SPDX-License-Identifier: Apache-2.0
"""When gradients reach rows: after the whole backward that brings them, so that nothing in it reads moved rows.

A table may be looked up many times in one graph, and a checkpoint looks it up again in the middle of a backward.
Moves therefore wait in a queue that torch's engine calls at the end of its graph task. Only the engine holds the queue:
a backward that raises drops its moves, and no row has changed.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import Variable


class _Queue:
    """The moves of one graph task. ``outer``: the task inside whose checkpoint this one is a backward, or None."""

    def __init__(self, outer: _Queue | None) -> None:
        self.waiting: list[tuple[Callable[[Any], None], Any]] = []
        self.outer = None if outer is None else weakref.ref(outer)

    def __call__(self) -> None:
        waiting, self.waiting = self.waiting, []
        outer = None if self.outer is None else self.outer()
        if outer is not None:
            outer.waiting += waiting
            return
        for take, saved in waiting:
            take(saved)


class _Local(threading.local):
    def __init__(self) -> None:
        self.inside: list[weakref.ref[_Queue]] = []  # tasks of this thread that looked rows up


_QUEUES: weakref.WeakValueDictionary[int, _Queue] = weakref.WeakValueDictionary()
_local = _Local()


def _queue(task: int) -> _Queue:
    queue = _QUEUES.get(task)
    if queue is None:
        alive = [q for ref in _local.inside if (q := ref()) is not None]
        queue = _QUEUES[task] = _Queue(alive[-1] if alive else None)
        Variable._execution_engine.queue_callback(queue)
    return queue


def recomputes() -> bool:
    """Whether a lookup is that of a checkpoint: one that a backward makes. Backwards inside it wait for its end."""
    task = torch._C._current_graph_task_id()
    if task == -1:
        return False
    queue = _queue(task)
    alive = [ref for ref in _local.inside if ref() is not None]
    if not any(ref() is queue for ref in alive):
        alive.append(weakref.ref(queue))
    _local.inside = alive
    return True


def after_backward(take: Callable[[Any], None], saved: tuple[Any, ...]) -> None:
    """Call ``take`` with a gradient when the backward is through; at once where the engine runs none."""
    task = torch._C._current_graph_task_id()
    if task == -1:
        take(saved)
    else:
        _queue(task).waiting.append((take, saved))
