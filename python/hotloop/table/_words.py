# SPDX-License-Identifier: Apache-2.0
"""Texts of arguments and errors that mean the same in several ops of this room; see ``hotloop.vocabulary``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from .. import vocabulary

F = TypeVar("F", bound=Callable[..., Any])

ARGUMENTS = {
    "keys": "(n,), int64 or uint64 of any value, or int32.",
    "counts": "sightings of each key, int64 or int32 (n,), >= 0. Default 1 each.",
    "hidden": "hidden vectors of the samples to predict, (B, d), floats.",
    "return_neighbors": "also return weights and slots.",
    "dim": "d, length of a hidden vector, >= 1.",
    "repeats": "R, >= 1.",
    "bits": "L, 1 to 24; the paper's is 16.",
    "base_prediction": "y_base, what the model predicts for them, in [0, 1], (B,).",
    "temperature": "tau, > 0.",
    "gamma": "0 for errors of the model, 1 for labels, or between.",
    "lam": "step of the correction, in [0, 1].",
    "seed": "0 to 2^64 - 1.",
    "impl": '"auto", "cpu" or "reference".',
}
OF_ROWS = {
    "weight": "rows (U, D), float32, float16 or bfloat16 (float64: reference), written in place; any stride.",
    "grad": "(U, D) float32 (float64 too for float64 weights): the summed gradient of each row.",
    "state_sum": "(U,) or (U, 1) float32, >= 0, written in place.",
    "lr": "learning rate, >= 0.",
    "beta": ">= 0.",
    "eps": ">= 0.",
    "l1": ">= 0.",
    "l2": ">= 0.",
    "weight_decay": ">= 0.",
    "weight_decay_mode": '"l2" or "decoupled".',
    "rounding_seed": "0 to 2^64 - 1, another one each step: float16 and bfloat16 weights are rounded up or down at "
    "random, without bias, by Philox(rounding_seed, 0, row). None rounds to nearest even.",
    "value_range": "magnitude of the largest code, > 0; not used by the half types.",
    "impl": '"auto", "cpu" or "reference"; arrays on a GPU take the reference, through host memory.',
}
RAISES = {
    "TypeError": "an argument of another type or dtype, or arrays of two libraries.",
    "ValueError": "shapes or devices do not fit, or a number is out of range.",
    "NotImplementedError": "the forced impl cannot run these inputs.",
}
RAISES_OF_ROWS = {
    **RAISES,
    "ValueError": "shapes or devices do not fit, an array cannot be written, or a number is out of range; with "
    "HOTLOOP_CHECK=1 NaN or infinity in gradients.",
}


def documented(function: F) -> F:
    return _documented(function, ARGUMENTS, RAISES)


def documented_rows(function: F) -> F:
    return _documented(function, OF_ROWS, RAISES_OF_ROWS)


def _documented(function: F, arguments: Mapping[str, str], raises: Mapping[str, str]) -> F:
    """What returns nothing may leave ``Returns`` out, as classes do; what takes no impl refuses none."""
    returns = None if inspect.isclass(function) else "None."
    if "impl" not in inspect.signature(function).parameters:
        raises = {name: text for name, text in raises.items() if name != "NotImplementedError"}
    return vocabulary.documented(function, arguments=arguments, returns=returns, raises=raises)
