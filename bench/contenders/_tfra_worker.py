# SPDX-License-Identifier: Apache-2.0
"""Runs in the environment of TFRA: ``_tfra_worker.py DIM THREADS``, spoken to by ``tfra.py``.

In: count and keys, count and values, then for each turn -1, count and ids of a new input set, or
the number of a known one. Out: the rows of a new set, one byte for a known one.
"""

from __future__ import annotations

import os
import sys
import warnings

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
# TensorFlow logs to the standard output too, which is the pipe.
_out = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)
warnings.simplefilter("ignore")

import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
import tensorflow_recommenders_addons as tfra  # noqa: E402


def _read(dtype: str, columns: int = 1) -> np.ndarray:
    count = int(np.frombuffer(sys.stdin.buffer.read(8), np.int64)[0])
    size = count * columns * np.dtype(dtype).itemsize
    return np.frombuffer(sys.stdin.buffer.read(size), dtype)


def main() -> None:
    dim, threads = int(sys.argv[1]), int(sys.argv[2])
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    keys = _read("int64")
    values = _read("float32", dim).reshape(-1, dim)
    table = tfra.dynamic_embedding.get_variable(
        "table", key_dtype=tf.int64, value_dtype=tf.float32, dim=dim, devices=["/CPU:0"],
        init_size=len(keys),
    )  # fmt: skip
    table.upsert(tf.constant(keys), tf.constant(values))
    lookup = tf.function(table.lookup)  # a few percent faster than eager
    sets: list[tf.Tensor] = []
    while word := sys.stdin.buffer.read(8):
        number = int(np.frombuffer(word, np.int64)[0])
        if number < 0:
            sets.append(tf.constant(_read("int64")))
            _out.write(lookup(sets[-1]).numpy().tobytes())
        else:
            lookup(sets[number]).numpy()  # waits for the result
            _out.write(b".")
        _out.flush()


if __name__ == "__main__":
    main()
