# SPDX-License-Identifier: Apache-2.0
"""What is not needed is not read: rows after a rejection, tokens of rows only looked up; and no copy is kept."""

from __future__ import annotations

import json
import signal
import sys
from typing import Any

import numpy as np
import pytest
from hotloop.decode import (
    Logits,
    block_speculative_sampling,
    chain_speculative_sampling,
    greedy_speculative_accept,
    lantern_relaxed_accept,
    tree_speculative_verify,
    typical_accept,
)
from processes import printed

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mprotect and /proc")

# Runs each scenario in a process of its own, with NumPy alone, and says how it ended: the tokens and rows, or a signal.
# A row of 1024 float32 is one page of 4 KiB; pages of PROT_NONE end the process at the first touch.
PRELUDE = """
import ctypes, json, mmap, os, resource, sys
import numpy as np
from hotloop.front import native as _native
from hotloop.decode import *

_native.core  # once, not in every child
PAGE = mmap.PAGESIZE
V = PAGE // 4
libc = ctypes.CDLL(None, use_errno=True)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
kept = []

def pages(rows, tokens=V):
    memory = mmap.mmap(-1, rows * tokens * 4)
    kept.append(memory)
    return np.frombuffer(memory, np.float32).reshape(1, rows, tokens)

def forbid(array):
    address, size = array.ctypes.data, array.nbytes
    assert address % PAGE == 0 and size % PAGE == 0
    assert libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), 0) == 0

def logits(rows, best, tokens=V):
    z = pages(rows, tokens)
    z[:] = -np.inf
    for i, token in enumerate(best):
        z[0, i, token] = 0.0
    return z

def probs(rows, best, tokens=V):
    p = pages(rows, tokens)
    for i, token in enumerate(best):
        p[0, i, token] = 1.0
    return p

def found(done):
    return [done.output_token_ids[0].tolist(), done.rows_read.tolist()]

def run_all(scenarios):
    out = {}
    for name, scenario in scenarios.items():
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.write(write, json.dumps(scenario()).encode())
            finally:
                os._exit(0)
        os.close(write)
        with os.fdopen(read) as text:
            said = text.read()
        _, status = os.waitpid(child, 0)
        out[name] = os.WTERMSIG(status) if os.WIFSIGNALED(status) else json.loads(said or "null")
    print(json.dumps(out))
"""

UNREAD = """
X = np.array([[5, 6, 7, 8]])
near = np.tile(np.arange(1, 4, dtype=np.int32), (V, 1))

def verify(op, make, last, forbidden, draft=True, **more):
    # The draft is certain of its tokens; the target agrees on the first `last`, and with nothing after.
    def scenario():
        target = make(5, [5, 6, 7, 8, 9][:last] + [900] * (5 - last))
        q = make(4, [5, 6, 7, 8])
        forbid(target[:, forbidden:])
        if forbidden < 4:
            forbid(q[:, forbidden:])
        wrap = Logits if make is logits else Probs
        return found(op(wrap(q) if draft else None, X, wrap(target), **more))
    return scenario

def greedy(forbidden):
    def scenario():
        target = logits(5, [5, 6, 900, 900, 900])
        forbid(target[:, forbidden:])
        return found(greedy_speculative_accept(X, target))
    return scenario

def tree(forbidden, make):
    # Root 0 -> nodes 0 (token 5), 1 (token 6); node 1 -> nodes 2 (7), 3 (8). The target wants 6, then 8, then 9.
    def scenario():
        target = make(5, [6, 900, 8, 900, 9])
        for row in forbidden:
            forbid(target[:, row:row + 1])
        wrap = Logits if make is logits else Probs
        return found(tree_speculative_verify(
            np.array([[5, 6, 7, 8]]), np.array([[-1, -1, 1, 1]]), wrap(target), max_depth=2))
    return scenario

def looked_up(token):
    # Four pages a row; only the one with the draft token may be read, for every row but the one that draws.
    def scenario():
        target, q = probs(3, [5, 6, 7], 4 * V), probs(2, [5, 6], 4 * V)
        for rows, count in ((target, 2), (q, 2)):
            for i in range(count):
                forbid(rows[0, i, V:])
        return found(chain_speculative_sampling(q, np.array([[5, token]]), target))
    return scenario

chain, block = chain_speculative_sampling, block_speculative_sampling
relaxed = lambda q, x, p, **more: lantern_relaxed_accept(q, x, p, near, delta=0.0, **more)
streams = lambda q, x, p: speculative_streaming_verify(
    type(q)(q.values.reshape(1, 2, 2, V)), x, p)
run_all({
    "chain, logits": verify(chain, logits, 2, 3),
    "chain, probabilities": verify(chain, probs, 2, 3),
    "chain, no draft": verify(chain, logits, 2, 3, draft=False),
    "chain, first": verify(chain, logits, 0, 1),
    "block": verify(block, logits, 2, 3),
    "streams": verify(streams, logits, 2, 3),
    "lantern": verify(relaxed, probs, 2, 3),
    "ragged": verify(chain, logits, 4, 3, num_draft_tokens=np.array([2])),
    "tree": tree([1, 3], logits),
    "tree, probabilities": tree([1, 3], probs),
    "greedy": greedy(3),
    "look-up": looked_up(6),
    "control: chain, logits": verify(chain, logits, 2, 2),
    "control: chain, probabilities": verify(chain, probs, 2, 2),
    "control: chain, all accepted": verify(chain, logits, 4, 4),
    "control: block": verify(block, logits, 2, 2),
    "control: lantern": verify(relaxed, probs, 2, 2),
    "control: tree": tree([1, 3, 4], logits),
    "control: greedy": greedy(2),
    "control: look-up": looked_up(7),
})
"""

MEMORY = """
def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024

B, K, WIDE = 24, 4, 65536
rng = np.random.default_rng(0)
z = np.empty((B, K + 1, WIDE), np.float32)
for b in range(B):
    rng.standard_normal(out=z[b], dtype=np.float32)
x = rng.integers(0, WIDE, (B, K))

def grown(call):
    def scenario():
        assert np.isfinite(z.max())  # read once, so that its pages count before
        chain_speculative_sampling(None, x[:1, :1], Logits(z[:1, :2], top_p=0.9))
        before = peak()
        call(z, x)
        return peak() - before
    return scenario

parents = np.tile(np.arange(-1, K - 1), (B, 1))
near = np.tile(np.arange(1, 4, dtype=np.int32), (WIDE, 1))
run_all({
    "chain": grown(lambda z, x: chain_speculative_sampling(Logits(z[:, 1:]), x, Logits(z))),
    "chain, truncated": grown(lambda z, x: chain_speculative_sampling(
        Logits(z[:, 1:], top_k=50), x, Logits(z, top_p=0.9))),
    "chain, all accepted": grown(lambda z, x: chain_speculative_sampling(
        Logits(z[:, :K]), x, Logits(z))),
    "block": grown(lambda z, x: block_speculative_sampling(Logits(z[:, :K]), x, Logits(z))),
    "tree": grown(lambda z, x: tree_speculative_verify(x, parents, Logits(z), Logits(z))),
    "lantern": grown(lambda z, x: lantern_relaxed_accept(Logits(z[:, 1:]), x, Logits(z), near)),
    "greedy": grown(lambda z, x: greedy_speculative_accept(x, z)),
    "sample": grown(lambda z, x: sample(Logits(z, top_k=50, top_p=0.9))),
    "top": grown(lambda z, x: top_logprobs(Logits(z), 8)),
    "control": grown(lambda z, x: law_probs(Logits(z))),
})
"""


def run(script: str) -> dict[str, Any]:
    return dict(json.loads(printed(PRELUDE + script, OMP_NUM_THREADS="2")))


@linux
def test_rows_that_are_not_needed_are_not_touched() -> None:
    ended = run(UNREAD)
    rejected = [[5, 6, 900, -1, -1], [3]]
    assert ended == {
        "chain, logits": rejected,
        "chain, probabilities": rejected,
        "chain, no draft": rejected,
        "chain, first": [[900, -1, -1, -1, -1], [1]],
        "block": rejected,
        "streams": rejected,
        "lantern": rejected,
        "ragged": [[5, 6, 7, -1, -1], [3]],
        "tree": [[6, 8, 9], [3]],
        "tree, probabilities": [[6, 8, 9], [3]],
        "greedy": rejected,
        "look-up": [[5, 6, 7], [3]],
    } | {name: signal.SIGSEGV for name in ended if name.startswith("control")}
    assert sum(name.startswith("control") for name in ended) == 8


@linux
def test_no_copy_of_the_logits_is_made() -> None:
    """A float32 copy of the target is 30 MiB, one row of it 256 KiB; each thread keeps a few rows."""
    grown = run(MEMORY)
    assert grown.pop("control") > 25
    assert len(grown) == 9
    assert max(grown.values()) < 12, grown


def verified(n: int, k: int, v: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(n + v)
    z = rng.normal(size=(n, k + 1, v)).astype(np.float32)
    w = (z + 0.7 * rng.normal(size=z.shape)).astype(np.float32)
    q = np.exp(w[:, :k].astype(np.float64))
    cumulated = np.cumsum(q / q.sum(-1, keepdims=True), -1)
    x = np.minimum((rng.random((n, k, 1)) > cumulated).sum(-1), v - 1)
    return z, w, x, rng.integers(0, k + 1, n)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_rows_read(impl: str) -> None:
    n, k, v = 150, 4, 9
    z, w, x, lengths = verified(n, k, v)
    near = np.array([[u for u in range(v) if u != t] for t in range(v)], np.int32)
    target, draft = Logits(z), Logits(w[:, :k])
    more: dict[str, Any] = {"seed": 3, "impl": impl}
    parents = np.tile(np.arange(-1, k - 1), (n, 1))
    for num in (None, lengths):
        for done in (
            chain_speculative_sampling(draft, x, target, num_draft_tokens=num, **more),
            lantern_relaxed_accept(draft, x, target, near, num_draft_tokens=num, **more),
            tree_speculative_verify(x, parents, target, Logits(w), num_nodes=num, **more),
            greedy_speculative_accept(x, target, num_draft_tokens=num, impl=impl),
        ):
            assert np.array_equal(done.rows_read, done.num_accepted + 1)
            assert len(np.unique(done.num_accepted)) > 2
        block = block_speculative_sampling(draft, x, target, num_draft_tokens=num, **more)
        # Nothing here has r_i = 0: a block looks at all rows.
        assert np.array_equal(block.rows_read, (np.full(n, k) if num is None else num) + 1)


def test_a_block_stops_at_a_token_without_mass() -> None:
    p = np.full((1, 4, 3), 1 / 3)
    p[0, 1] = [0.0, 0.5, 0.5]
    q = np.full((1, 3, 3), 1 / 3)
    done = block_speculative_sampling(q, np.array([[2, 0, 1]]), p, seed=1)
    assert done.rows_read.tolist() == [2]
    assert done.num_accepted[0] <= 1


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_rows_read_over_paths(impl: str) -> None:
    """Every path up to its first token that is not accepted, and the row that gives the next one."""
    n, paths, k, v = 100, 3, 3, 4
    rng = np.random.default_rng(5)
    z = rng.normal(size=(n, paths, k + 1, v))
    ids = rng.integers(0, v, (n, paths, k + 1))
    hits = ids[:, :, 1:] == z[:, :, :k].argmax(-1)
    lengths = np.cumprod(hits, -1).sum(-1)
    done = greedy_speculative_accept(ids, z, impl=impl)
    assert np.array_equal(done.rows_read, np.minimum(lengths + 1, k).sum(-1) + 1)
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    typical = typical_accept(ids, Logits(z), epsilon=0.2, alpha=10.0, impl=impl)
    chances = np.take_along_axis(p[:, :, :k], ids[:, :, 1:, None], -1)[..., 0]
    lengths = np.cumprod(chances > 0.2, -1).sum(-1)
    assert np.array_equal(typical.rows_read, np.minimum(lengths + 1, k).sum(-1) + 1)
