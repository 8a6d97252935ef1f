from __future__ import annotations

import collections.abc
import typing

class TableFull(Exception):
    pass

class Table:
    def __init__(self, settings: dict[str, typing.Any]) -> None: ...
    def assign(
        self,
        n: int,
        keys: typing.Any,
        values: typing.Any,
        moment: tuple[typing.Any, ...],
        accumulate: bool,
        found: typing.Any,
    ) -> None: ...
    def changed_since(self, since: int) -> bool: ...
    def clear(self) -> None: ...
    def contains(self, n: int, keys: typing.Any, found: typing.Any, scores: typing.Any) -> None: ...
    def erase(self, n: int, keys: typing.Any, found: typing.Any) -> None: ...
    def erased_since(self, since: int) -> bytes: ...
    def expire(self, time: int) -> int: ...
    def export(self, begin: int, end: int, since: int, arrays: tuple[typing.Any, ...]) -> int: ...
    def find(
        self, n: int, keys: typing.Any, values: typing.Any, found: typing.Any, scale: float
    ) -> None: ...
    def find_or_insert(
        self,
        n: int,
        keys: typing.Any,
        values: typing.Any,
        found: typing.Any,
        scale: float,
        moment: tuple[typing.Any, ...],
        admission: typing.Any,
    ) -> None: ...
    def forget_erased(self, until: int) -> None: ...
    def import_rows(self, n: int, arrays: tuple[typing.Any, ...], beyond: bool = False) -> None: ...
    def locate(self, n: int, keys: typing.Any, rows: typing.Any) -> None: ...
    def mark(self) -> int: ...
    def pool(
        self,
        bags: tuple[typing.Any, ...],
        rows: typing.Any,
        out: typing.Any,
        sizes: typing.Any,
        largest: typing.Any,
    ) -> None: ...
    def pool_or_insert(
        self,
        bags: tuple[typing.Any, ...],
        moment: tuple[typing.Any, ...],
        admission: typing.Any,
        rows: typing.Any,
        found: typing.Any,
        out: typing.Any,
        sizes: typing.Any,
        largest: typing.Any,
    ) -> None: ...
    def reserve(self, rows: int) -> None: ...
    def trim(self) -> int: ...
    def update(
        self,
        rule: dict[str, typing.Any],
        bags: tuple[typing.Any, ...],
        rows: typing.Any,
        grad: typing.Any,
        sizes: typing.Any,
        largest: typing.Any,
        time: int,
        seed: int,
    ) -> int: ...
    def upsert(
        self,
        n: int,
        keys: typing.Any,
        values: typing.Any,
        moment: tuple[typing.Any, ...],
        admission: typing.Any,
        keep_evicted: bool,
        rows: typing.Any,
        found: typing.Any,
    ) -> typing.Any: ...
    def weight_gradient(
        self, bags: tuple[typing.Any, ...], kept: typing.Any, grad: typing.Any, out: typing.Any
    ) -> None: ...
    @property
    def bytes(self) -> int: ...
    @property
    def capacity(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def generation(self) -> int: ...
    @generation.setter
    def generation(self, arg1: int) -> None: ...
    @property
    def row_bytes(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def slots(self) -> int: ...
    @property
    def state_floats(self) -> int: ...
    @property
    def tick(self) -> int: ...
    @tick.setter
    def tick(self, arg1: int) -> None: ...

class CountFilter:
    def __init__(self, capacity: int, splits: int) -> None: ...
    def add(self, n: int, keys: typing.Any, counts: typing.Any, old: typing.Any) -> None: ...
    def admits(
        self, n: int, keys: typing.Any, counts: typing.Any, threshold: int, admitted: typing.Any
    ) -> None: ...
    def changed_since(self, mark: int | None) -> tuple[typing.Any, ...]: ...
    def clear(self) -> None: ...
    def count(self, n: int, keys: typing.Any, counts: typing.Any) -> None: ...
    def has_changed_since(self, mark: int) -> bool: ...
    def load(
        self,
        head: int,
        advances: int,
        failures: int,
        elements: collections.abc.Sequence[int],
        cells: typing.Any,
    ) -> None: ...
    def mark(self) -> int: ...
    def put(
        self,
        head: int,
        advances: int,
        failures: int,
        elements: collections.abc.Sequence[int],
        n: int,
        names: typing.Any,
        cells: typing.Any,
        whole: bool,
    ) -> None: ...
    def save(self, cells: typing.Any) -> tuple[typing.Any, ...]: ...
    @property
    def bytes(self) -> int: ...
    @property
    def cells_per_split(self) -> int: ...

class MultiplexHits:
    def __init__(self, layout: tuple[typing.Any, ...]) -> None: ...
    def dense(self, gradients: list[typing.Any], grad: typing.Any) -> None: ...
    def rows(self, table: int) -> int: ...
    def sparse(
        self, table: int, indices: typing.Any, values: typing.Any, grad: typing.Any
    ) -> None: ...

def error_memory(
    query: typing.Any,
    keys: typing.Any,
    first: int,
    base_prediction: typing.Any,
    labels: typing.Any,
    base_predictions: typing.Any,
    k: int,
    numbers: typing.Annotated[collections.abc.Sequence[float], "FixedSize(3)"],
    prediction: typing.Any,
    weights: typing.Any,
    neighbors: typing.Any,
) -> None: ...
def evict(
    slots: int,
    state: tuple[typing.Any, ...],
    n: int,
    incoming: tuple[typing.Any, ...],
    now: int,
    policy: str,
    decay_exponent: float,
    mapping: typing.Any,
) -> tuple[typing.Any, ...]: ...
def filter_cells(capacity: int, splits: int) -> int: ...
def hash_bucket(
    n: int, keys: typing.Any, feature: int, chunk: int, seed: int, buckets: int, out: typing.Any
) -> None: ...
def hash_strings(n: int, text: bytes, offsets: typing.Any, out: typing.Any) -> None: ...
def largest(x: typing.Any) -> float: ...
def least(n: int, x: typing.Any) -> int: ...
def lsh_buckets(hidden: typing.Any, projections: typing.Any, buckets: typing.Any) -> None: ...
def lsh_sketch_read(
    buckets: typing.Any,
    base_prediction: typing.Any,
    sketch: typing.Any,
    share: float,
    numbers: typing.Annotated[collections.abc.Sequence[float], "FixedSize(3)"],
    prediction: typing.Any,
    weights: typing.Any,
) -> None: ...
def lsh_sketch_write(
    buckets: typing.Any, labels: typing.Any, base_predictions: typing.Any, sketch: typing.Any
) -> None: ...
def merge_rows(grads: typing.Any, inverse: typing.Any, out: typing.Any) -> None: ...
def multiplexed(
    layout: tuple[typing.Any, ...], tables: list[typing.Any], out: typing.Any
) -> None: ...
def number_ids(
    ids: typing.Any, inverse: typing.Any, unique: typing.Any, counts: typing.Any
) -> int: ...
def probabilistic(
    n: int,
    seed: int,
    keys: typing.Any,
    step: int,
    counts: typing.Any,
    threshold: float,
    equal: bool,
    admitted: typing.Any,
) -> None: ...
def quantize(values: typing.Any, codes: typing.Any, value_range: float, encode: bool) -> None: ...
def state_shape(rule: dict[str, typing.Any]) -> tuple[typing.Any, ...]: ...
def update_rows(
    rule: dict[str, typing.Any],
    weight: typing.Any,
    grad: typing.Any,
    state: list[typing.Any],
    rows: typing.Any,
    distinct: bool,
    seed: int,
) -> None: ...
