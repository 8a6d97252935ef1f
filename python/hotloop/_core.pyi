from collections.abc import Sequence
from typing import Any

LOGPROB_STATISTICS: int
DIVERGENCE_STATISTICS: int

def map(name: str, x: Any, out: Any) -> None: ...
def map_names() -> list[str]: ...
def philox_fill(seed: int, offset: int, first_item: int, out: Any) -> None: ...
def philox4x32_10(counter: Sequence[int], key: Sequence[int]) -> list[int]: ...
def simd_level() -> str: ...
def force_simd_level(level: str) -> None: ...
def last_simd_level() -> str: ...
def simd_levels() -> dict[str, bool]: ...
def max_threads() -> int: ...
def lost_threads() -> bool: ...
def advise_huge_pages(address: int, bytes: int) -> None: ...
def describe(array: Any) -> dict[str, Any]: ...
def row_statistics(
    tile: Any,
    bias: Any,
    labels: Any,
    first_column: int,
    logit: tuple[float, float, float],
    all: bool,
    statistics: Any,
    argmax: Any,
) -> None: ...
def row_gradient(
    tile: Any,
    bias: Any,
    labels: Any,
    first_column: int,
    logit: tuple[float, float, float],
    coefficients: Any,
) -> None: ...
def divergence(
    mode: str,
    student: Any,
    teacher: Any,
    student_bias: Any,
    teacher_bias: Any,
    student_logit: tuple[float, float, float],
    teacher_logit: tuple[float, float, float],
    beta: float,
    statistics: Any,
    coefficients: Any,
    mixture: Any,
) -> None: ...
def log_cosh(
    student: Any,
    teacher: Any,
    student_bias: Any,
    teacher_bias: Any,
    student_logit: tuple[float, float, float],
    teacher_logit: tuple[float, float, float],
    sums: Any,
    weights: Any,
) -> None: ...
def pair_loop(
    head: str,
    n: int,
    inputs: list[Any],
    params: Sequence[float],
    loss: Any,
    grads: list[Any],
    grad_scale: float,
    total: bool,
    double_precision: bool,
) -> float: ...
def are_marks(rows: Any) -> bool: ...
def within(rows: Any, high: float, open: bool) -> bool: ...
def pair_heads() -> dict[str, tuple[int, int, int]]: ...
def decode_chain(
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
) -> int: ...
def decode_tree(
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
) -> int: ...
def decode_lantern(
    batch: int,
    width: int,
    ids: Any,
    target: tuple[Any, ...],
    draft: Any,
    neighbors: Any,
    k: int,
    delta: float,
    lengths: Any,
    seed: Any,
    offset: Any,
    outputs: tuple[Any, ...],
    moved: Any,
) -> int: ...
def decode_paths(
    typical: bool,
    batch: int,
    paths: int,
    width: int,
    ids: Any,
    target: tuple[Any, ...],
    epsilon: float,
    alpha: float,
    entropy_eps: float,
    lengths: Any,
    seed: Any,
    offset: Any,
    outputs: tuple[Any, ...],
) -> int: ...
def decode_sample(
    batch: int, rows: int, law: tuple[Any, ...], seed: Any, offset: Any, ids: Any, logps: Any
) -> int: ...
def decode_probs(
    batch: int, rows: int, law: tuple[Any, ...], log: bool, wide: bool, out: Any
) -> int: ...
def decode_top(
    batch: int, rows: int, k: int, law: tuple[Any, ...], ids: Any, logps: Any
) -> int: ...
def decode_logits(batch: int, law: tuple[Any, ...], wide: bool, out: Any) -> None: ...
def decode_branch_reuse(
    batch: int,
    width: int,
    kappa: int,
    following: int,
    emitted: Any,
    accepted: Any,
    roots: Any,
    branches: Any,
    reused: Any,
    branch: Any,
    window: Any,
) -> None: ...
def decode_temperatures(
    batch: int,
    rows: int,
    law: tuple[Any, ...],
    statistics: tuple[float, float, float, float],
    temperature: float,
    tau: float,
    out: Any,
) -> None: ...
def search_beam_step(
    width: int,
    length: int,
    logits: Any,
    ref_logits: Any,
    eos: Sequence[int],
    before: tuple[Any, ...],
    after: tuple[Any, ...],
    beam_indices: Any,
    next_ids: Any,
) -> None: ...
def search_star_step(
    tree: tuple[Any, ...],
    nodes: tuple[Any, ...],
    rollouts: Any,
    max_depth: int,
    numbers: tuple[float, float, float, float],
    seed: int | None,
    offset: int,
    outputs: tuple[Any, ...],
) -> None: ...
def search_puct_step(
    tree: tuple[Any, ...],
    nodes: tuple[Any, ...],
    max_depth: int,
    numbers: tuple[float, float, float],
    outputs: tuple[Any, ...],
) -> None: ...
def search_backtrack(
    batch: int,
    phrases: int,
    p_unconfident: Any,
    span_ends: Any,
    lengths: tuple[Any, ...],
    before: tuple[Any, ...],
    numbers: tuple[float, float, float, float],
    limits: tuple[int, int],
    after: tuple[Any, ...],
    outputs: tuple[Any, ...],
) -> None: ...
def search_nearest_codes(
    products: Any, codebook: Any, squares: Any, first: int, errors: tuple[float, float], out: Any
) -> None: ...
def table_update_rows(
    rule: dict[str, Any],
    weight: Any,
    grad: Any,
    state: list[Any],
    rows: Any,
    distinct: bool,
    seed: int,
) -> None: ...
def table_state_shape(rule: dict[str, Any]) -> tuple[int, int]: ...
def table_number_ids(ids: Any, inverse: Any, unique: Any, counts: Any) -> int: ...
def table_merge_rows(grads: Any, inverse: Any, out: Any) -> None: ...
def table_quantize(values: Any, codes: Any, value_range: float, encode: bool) -> None: ...
def table_hash_bucket(
    n: int, keys: Any, feature: int, chunk: int, seed: int, buckets: int, out: Any
) -> None: ...
def table_hash_strings(n: int, text: bytes, offsets: Any, out: Any) -> None: ...
def table_probabilistic(
    n: int,
    seed: int,
    keys: Any,
    step: int,
    counts: Any,
    threshold: float,
    equal: bool,
    admitted: Any,
) -> None: ...
def table_evict(
    slots: int,
    state: tuple[Any, ...],
    n: int,
    incoming: tuple[Any, ...],
    now: int,
    policy: str,
    decay_exponent: float,
    mapping: Any,
) -> tuple[int, list[int], list[int], list[int]]: ...

class CountFilter:
    def __init__(self, capacity: int, splits: int) -> None: ...
    @property
    def cells_per_split(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    def add(self, n: int, keys: Any, counts: Any, old: Any) -> None: ...
    def count(self, n: int, keys: Any, counts: Any) -> None: ...
    def admits(self, n: int, keys: Any, counts: Any, threshold: int, admitted: Any) -> None: ...
    def save(self, cells: Any) -> tuple[int, int, int, list[int]]: ...
    def load(
        self, head: int, advances: int, failures: int, elements: list[int], cells: Any
    ) -> None: ...
    def mark(self) -> int: ...
    def has_changed_since(self, mark: int) -> bool: ...
    def changed_since(
        self, mark: int | None
    ) -> tuple[tuple[int, int, int, list[int]], bytes_, bytes_]: ...
    def put(
        self,
        head: int,
        advances: int,
        failures: int,
        elements: list[int],
        n: int,
        names: Any,
        cells: Any,
        whole: bool,
    ) -> None: ...
    def clear(self) -> None: ...

def error_memory(
    query: Any,
    keys: Any,
    first: int,
    base_prediction: Any,
    labels: Any,
    base_predictions: Any,
    k: int,
    numbers: tuple[float, float, float],
    prediction: Any,
    weights: Any,
    neighbors: Any,
) -> None: ...
def lsh_buckets(hidden: Any, projections: Any, buckets: Any) -> None: ...
def lsh_sketch_write(buckets: Any, labels: Any, base_predictions: Any, sketch: Any) -> None: ...
def lsh_sketch_read(
    buckets: Any,
    base_prediction: Any,
    sketch: Any,
    share: float,
    numbers: tuple[float, float, float],
    prediction: Any,
    weights: Any,
) -> None: ...

class TableFull(Exception): ...

class Table:
    generation: int
    tick: int
    def __init__(self, settings: dict[str, Any]) -> None: ...
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
        admission: Any,
        keep_evicted: bool,
        rows: Any,
        found: Any,
    ) -> tuple[bytes_, bytes_, bytes_] | None: ...
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
    def clear(self) -> None: ...
    def reserve(self, rows: int) -> None: ...
    def expire(self, time: int) -> int: ...
    def export(self, begin: int, end: int, since: int, arrays: tuple[Any, ...]) -> int: ...
    def import_rows(self, n: int, arrays: tuple[Any, ...], beyond: bool = False) -> None: ...
    def trim(self) -> int: ...
    def mark(self) -> int: ...
    def erased_since(self, since: int) -> bytes_: ...
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
    ) -> int: ...

bytes_ = bytes

def table_largest(x: Any) -> float: ...
def table_least(n: int, scores: Any) -> int: ...
def table_filter_cells(capacity: int, splits: int) -> int: ...
def table_multiplexed(layout: tuple[Any, ...], tables: list[Any], out: Any) -> None: ...

class MultiplexHits:
    def __init__(self, layout: tuple[Any, ...]) -> None: ...
    def dense(self, gradients: list[Any], grad: Any) -> None: ...
    def rows(self, table: int) -> int: ...
    def sparse(self, table: int, indices: Any, values: Any, grad: Any) -> None: ...
