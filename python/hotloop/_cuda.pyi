from collections.abc import Callable, Sequence
from typing import Any

PAIR_PARTIALS: int

def device_count() -> int: ...
def architectures() -> list[str]: ...
def pair_heads() -> dict[str, tuple[int, int, int]]: ...
def pair_loop(
    head: str,
    n: int,
    inputs: list[Any],
    params: Sequence[float],
    loss: Any,
    grads: list[Any],
    grad_scale: float,
    total: Any,
    partials: Any,
    double_precision: bool,
    device: int,
    stream: int,
) -> None: ...
def decode_chain(
    whole_block: bool,
    batch: int,
    width: int,
    ids: Any,
    target: tuple[Any, ...],
    draft: tuple[Any, ...] | None,
    lengths: Any,
    seed: Any,
    offset: Any,
    outputs: tuple[Any, ...],
    workspace: Callable[[int], Any],
    device: int,
    stream: int,
) -> None: ...
def decode_tree(
    batch: int,
    width: int,
    depth: int,
    ids: Any,
    parents: Any,
    target: tuple[Any, ...],
    draft: tuple[Any, ...] | None,
    replacement: bool,
    lengths: Any,
    seed: Any,
    offset: Any,
    outputs: tuple[Any, ...],
    nodes: Any,
    workspace: Callable[[int], Any],
    device: int,
    stream: int,
) -> None: ...
def decode_sample(
    batch: int,
    rows: int,
    law: tuple[Any, ...],
    seed: Any,
    offset: Any,
    ids: Any,
    logps: Any,
    workspace: Callable[[int], Any],
    device: int,
    stream: int,
) -> None: ...

class TableFull(Exception): ...

class Table:
    """``_core.Table`` in the memory of a device; exports and imports are in the host's."""

    tick: int
    generation: int
    def __init__(self, settings: dict[str, Any], device: int, stream: int) -> None: ...
    def use(self, stream: int) -> None: ...
    @property
    def size(self) -> int: ...
    @property
    def capacity(self) -> int: ...
    @property
    def slots(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def row_bytes(self) -> int: ...
    @property
    def state_floats(self) -> int: ...
    @property
    def end(self) -> int: ...
    def find(self, n: int, keys: Any, values: Any, found: Any, scores: Any) -> None: ...
    def locate(self, n: int, keys: Any, rows: Any) -> None: ...
    def upsert(
        self,
        n: int,
        keys: Any,
        values: Any,
        moment: tuple[Any, int, int],
        admission: Callable[[Any, Any], Any] | None,
        keep_evicted: bool,
        rows: Any,
        found: Any,
    ) -> int: ...
    def evicted(self, keys: Any, values: Any, scores: Any) -> None: ...
    def assign(
        self,
        n: int,
        keys: Any,
        values: Any,
        moment: tuple[Any, int, int],
        accumulate: bool,
        found: Any,
    ) -> None: ...
    def erase(self, n: int, keys: Any, found: Any) -> None: ...
    def erase_host(self, n: int, keys: Any, found: Any) -> None: ...
    def clear(self) -> None: ...
    def reserve(self, rows: int) -> None: ...
    def expire(self, time: int) -> int: ...
    def export(self, begin: int, end: int, since: int, arrays: tuple[Any, ...]) -> int: ...
    def import_rows(self, n: int, arrays: tuple[Any, ...], beyond: bool = False) -> None: ...
    def mark(self) -> int: ...
    def erased_since(self, since: int) -> Any: ...
    def changed_since(self, since: int) -> bool: ...
    def forget_erased(self, until: int) -> None: ...
    def pool(
        self, bags: tuple[Any, ...], rows: Any, out: Any, sizes: Any, largest: Any
    ) -> None: ...
    def weight_gradient(self, bags: tuple[Any, ...], kept: Any, grad: Any, out: Any) -> None: ...
    def update(
        self,
        rule: dict[str, Any],
        bags: tuple[Any, ...],
        rows: Any,
        grad: Any,
        sizes: Any,
        largest: Any,
        time: int,
        seed: int,
        counts: bool,
    ) -> int: ...
