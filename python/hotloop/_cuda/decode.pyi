# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from typing import Any

def chain(
    whole_block: bool,
    batch: int,
    width: int,
    ids: Any,
    target: tuple[Any, ...],
    draft: Any,
    lengths: Any,
    seed: Any,
    offset: Any,
    outputs: tuple[Any, ...],
    workspace: Callable[..., Any],
    device: int,
    stream: int,
) -> None: ...
def sample(
    batch: int,
    rows: int,
    law: tuple[Any, ...],
    seed: Any,
    offset: Any,
    ids: Any,
    logps: Any,
    workspace: Callable[..., Any],
    device: int,
    stream: int,
) -> None: ...
def tree(
    batch: int,
    width: int,
    depth: int,
    ids: Any,
    parents: Any,
    target: tuple[Any, ...],
    draft: Any,
    replacement: bool,
    lengths: Any,
    seed: Any,
    offset: Any,
    outputs: tuple[Any, ...],
    nodes: Any,
    workspace: Callable[..., Any],
    device: int,
    stream: int,
) -> None: ...
