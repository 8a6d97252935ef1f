"""Writers killed at random instants, run as a program without torch so that a fork costs a millisecond.

``python table_kill.py save|publish DIRECTORY KILLS`` prints what it saw as JSON and fails if anything was lost.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from hotloop.table.files.deltas import Delta, encode_delta, pending, publish
from hotloop.table.files.snapshots import load, save

TABLE_ID = "0" * 32


def save_generation(directory: Path, generation: int) -> None:
    block = {"keys": np.full(40, generation), "values": np.full((40, 4), generation, np.float32)}
    save(directory, {"generation": generation}, [block], part_bytes=24 * 10)


def generation_of_snapshot(directory: Path) -> int:
    config, blocks = load(directory, mapped=False)
    generation, count = config["generation"], 0
    for block in blocks:
        assert (block["keys"] == generation).all() and (block["values"] == generation).all()
        count += len(block["keys"])
    assert count == 40, count
    return int(generation)


def publish_generation(directory: Path, generation: int) -> None:
    rows = {"keys": np.full(500, generation), "values": np.full((500, 4), generation, np.float32)}
    publish(
        directory, encode_delta(Delta(TABLE_ID, generation - 1, generation, rows, np.arange(3)))
    )


def generation_of_deltas(directory: Path) -> int:
    generation = 1
    while found := pending(directory, TABLE_ID, generation):
        for delta in found:
            assert (delta.keys == delta.until).all() and len(delta.keys) == 500
            generation = delta.until
    return generation


def start(write: Callable[[Path, int], None], directory: Path, generation: int) -> tuple[int, int]:
    """A process that says "b" when it begins and "d" when it is done, and the pipe to hear it."""
    hear, say = os.pipe()
    process = os.fork()
    if process == 0:
        status = 1
        try:
            os.close(hear)
            os.write(say, b"b")
            write(directory, generation)
            os.write(say, b"d")
            status = 0
        finally:
            os._exit(status)
    os.close(say)
    assert os.read(hear, 1) == b"b"
    return process, hear


def main(what: str, where: str, kills: int) -> None:
    directory = Path(where)
    write, read, written = {
        "save": (save_generation, generation_of_snapshot, "part-"),
        "publish": (publish_generation, generation_of_deltas, "."),
    }[what]
    generator = random.Random(5)
    write(directory, 1)
    if what == "publish":  # so that a reader at position 1 has the newest delta to look for
        write(directory, 2)
    generation = read(directory)
    durations = []
    for _ in range(8):
        process, hear = start(write, directory, generation + 1)
        begin = time.perf_counter()
        assert os.read(hear, 1) == b"d"
        durations.append(time.perf_counter() - begin)
        os.waitpid(process, 0)
        os.close(hear)
        generation += 1
    longest = sorted(durations)[-2]  # the slowest is an outlier
    seen: Counter[str] = Counter()
    for _ in range(kills):
        process, hear = start(write, directory, generation + 1)
        time.sleep(generator.random() * 1.2 * longest)
        os.kill(process, signal.SIGKILL)
        status = os.waitpid(process, 0)[1]
        assert os.WIFSIGNALED(status) or status == 0, "a write failed by itself"
        done = os.read(hear, 1) == b"d"
        os.close(hear)
        found = read(directory)
        assert found in (generation, generation + 1), (found, generation)
        assert found == generation + 1 or not done, "a finished write was lost"
        seen["done" if done else "new" if found > generation else "old"] += 1
        tokens = {name.split("-")[1] for name in os.listdir(directory) if name.startswith("part-")}
        seen["left-overs"] += (
            len(tokens) > 1
            if what == "save"
            else any(name.startswith(written) for name in os.listdir(directory))
        )
        generation = found
    write(directory, generation + 1)
    names = os.listdir(directory)
    assert not [name for name in names if name.endswith(".hotloop-tmp")], names
    if what == "save":
        assert len({name.split("-")[1] for name in names if name.startswith("part-")}) == 1, names
    print(json.dumps({**seen, "ms": 1e3 * longest}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
