from __future__ import annotations

import collections.abc
import typing

def chain(
    whole_block: bool,
    batch: int,
    width: int,
    ids: typing.Any,
    target: tuple[typing.Any, ...],
    draft: typing.Any,
    lengths: typing.Any,
    seed: typing.Any,
    offset: typing.Any,
    outputs: tuple[typing.Any, ...],
    workspace: collections.abc.Callable[..., typing.Any],
    device: int,
    stream: int,
) -> None: ...
def sample(
    batch: int,
    rows: int,
    law: tuple[typing.Any, ...],
    seed: typing.Any,
    offset: typing.Any,
    ids: typing.Any,
    logps: typing.Any,
    workspace: collections.abc.Callable[..., typing.Any],
    device: int,
    stream: int,
) -> None: ...
def tree(
    batch: int,
    width: int,
    depth: int,
    ids: typing.Any,
    parents: typing.Any,
    target: tuple[typing.Any, ...],
    draft: typing.Any,
    replacement: bool,
    lengths: typing.Any,
    seed: typing.Any,
    offset: typing.Any,
    outputs: tuple[typing.Any, ...],
    nodes: typing.Any,
    workspace: collections.abc.Callable[..., typing.Any],
    device: int,
    stream: int,
) -> None: ...
