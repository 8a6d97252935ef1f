# SPDX-License-Identifier: Apache-2.0
"""One valid call of every public op, with every array argument it has: what tests over the whole catalogue start from.

The call is the one of the op's docstring; arrays that it leaves out are made here by the name of the argument. A new
op, or a new argument of an old one, is covered without a line of its own, or fails with the name that is missing.
"""

from __future__ import annotations

import dataclasses
import doctest
import functools
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from hotloop import catalog

Path = tuple[Any, ...]
ARRAYS = ("Tensor", "Any", "Row", "Array")
"""What the annotation of an array argument says."""
NOT_ARRAYS = {("linear_preference_loss", "loss"), ("linear_preference_loss", "options")}
# Arguments that need others of the call to change shape with them; the tests of their rooms pass them.
BY_HAND = {
    ("slic_hinge_loss", "target_logps"), ("cpl_loss", "ref_logps_1"), ("cpl_loss", "ref_logps_2"),
    ("cpl_dense_loss", "ref_logps"), ("opa_dpo_loss", "revised_weights"), ("opa_dpo_loss", "original_weights"),
    ("opa_dpo_loss", "image_weights"), ("linear_preference_loss", "ref_logps"),
    ("linear_preference_loss", "ref_hidden"), ("linear_preference_loss", "ref_weight"),
    ("linear_preference_loss", "ref_bias"), ("linear_preference_loss", "cu_seqlens"),
}  # fmt: skip


class _Seen(Exception):
    pass


@functools.cache
def _example(name: str) -> inspect.BoundArguments:
    op = next(op for op in catalog() if op.full_name == name)
    function = op.load()
    space = dict(vars(importlib.import_module(function.__module__))) | {"np": np, "torch": torch}
    found: list[inspect.BoundArguments] = []

    def record(*args: Any, **kwargs: Any) -> Any:
        found.append(inspect.signature(function).bind(*args, **kwargs))
        raise _Seen

    space[op.name] = record
    try:
        for example in doctest.DocTestParser().get_examples(function.__doc__ or ""):
            exec(compile(example.source, name, "single"), space)
        other = re.search(r"Examples:\s+See ``(\w+)``", function.__doc__ or "")
        if other is not None:
            neighbour = getattr(importlib.import_module(f"hotloop.{op.room}"), other[1])
            for example in doctest.DocTestParser().get_examples(neighbour.__doc__):
                exec(compile(example.source, name, "single"), space)
    except _Seen:
        return found[0]
    raise AssertionError(f"the docstring of {name} calls it nowhere")


def _first(arguments: dict[str, Any]) -> Any:
    return next(x for _, x in leaves(arguments))


def _row(value: float) -> Callable[[dict[str, Any]], Any]:
    return lambda a: torch.full((_first(a).shape[0],), value)


def _counts(a: dict[str, Any]) -> Any:
    return np.ones(len(_first(a)), np.int64)


def _batch(value: int) -> Callable[[dict[str, Any]], Any]:
    def make(a: dict[str, Any]) -> Any:
        return np.full(int(_first(a).shape[0]), value, np.int64)

    return make


def _labels(a: dict[str, Any]) -> Any:
    return torch.zeros(_first(a).shape[:-1], dtype=torch.int64)


def _vocabulary(weight: str) -> Callable[[dict[str, Any]], Any]:
    return lambda a: torch.linspace(-1, 1, a[weight].shape[0], dtype=a[weight].dtype)


def _of_experts(weight: str) -> Callable[[dict[str, Any]], Any]:
    return lambda a: torch.linspace(-1, 1, a[weight][:, :, 0].numel()).view(a[weight].shape[:2])


def _tokens(a: dict[str, Any]) -> int:
    return len(a["topk_weights"]) if "topk_weights" in a else len(_first(a))


def _a_row_each(a: dict[str, Any]) -> Any:
    """Rows of z as expert rows of one choice each."""
    from hotloop.moe import dispatch

    return dispatch(torch.zeros((len(a["x"]), 1), dtype=torch.int64), 1)


MADE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "route.bias": lambda a: torch.linspace(0, 1, a["router_logits"].shape[-1]),
    "sequence_balance_loss.bias": lambda a: torch.linspace(0, 1, a["router_logits"].shape[-1]),
    "sequence_balance_loss.cu_seqlens": lambda a: torch.tensor([0, 3, len(a["router_logits"])]),
    "token_mask": lambda a: torch.ones(_first(a).shape[:-1], dtype=torch.int64),
    "dispatch.topk_weights": lambda a: torch.linspace(0, 1, a["topk_ids"].numel()).view(a["topk_ids"].shape),
    "capacity": lambda a: 1,
    "drop": lambda a: "weight",
    "expert_counts": lambda a: torch.arange(1, 5),
    "load_balance_loss.num_tokens": lambda a: torch.tensor(10),
    "grouped_linear.bias": _of_experts("weight"),
    "gate_up_bias": _of_experts("gate_up"),
    "down_bias": _of_experts("down"),
    "shared": lambda a: torch.full((_tokens(a), _first(a).shape[1]), 0.5),
    "topk_weights": lambda a: torch.full((len(a["x"]), 1), 0.5),
    "dispatch": _a_row_each,
    "component_logps": lambda a: torch.zeros_like(a["action_values"]),
    "temperature": lambda a: torch.tensor(0.5),
    "m": lambda a: torch.full_like(a["x"], 0.25),
    "d": lambda a: torch.full_like(a["x"], 0.25),
    "mu": lambda a: torch.tensor(0.5),
    "gamma": lambda a: torch.tensor(0.5),
    "gamma2": lambda a: torch.tensor(0.5),
    "alpha": lambda a: torch.tensor(0.5),
    "bias": _vocabulary("weight"),
    "cu_seqlens": lambda a: torch.tensor([0, a["hidden"].shape[0]]),
    "segment_ids": lambda a: np.arange(len(a["values"])) % 2,
    "num_segments": lambda a: 2,
    "mask": lambda a: np.arange(len(a["values"])) % 2,
    "draft_probs": lambda a: np.full_like(a["target_probs"], 1 / a["target_probs"].shape[-1]),
    "num_nodes": lambda a: np.full(len(_first(a)), a["draft_token_ids"].shape[1], np.int64),
    "cpl_dense_loss.ref_logps": lambda a: torch.full_like(_first(a), -1.0),
    "vpo_loss.ref_calibration_logps": lambda a: torch.full_like(a["policy_calibration_logps"], -1.0),
    "selm_loss.ref_generated_logps": lambda a: torch.full_like(a["policy_generated_logps"], -1.0),
    "revised_weights": lambda a: torch.full_like(a["revised_logratios"], 0.5),
    "original_weights": lambda a: torch.full_like(a["original_logratios"], 0.5),
    "image_weights": lambda a: torch.full_like(a["image_logratios"], 0.5),
    "mch_evict_batch.last_access": lambda a: np.zeros(len(a["ids"]), np.int64),
    "mch_evict_batch.counts": lambda a: np.ones(len(a["ids"]), np.int64),
    "linear_preference_loss.ref_logps": lambda a: torch.full(a["labels"].shape[:1], -1.0),
    "linear_preference_loss.cu_seqlens": lambda a: torch.tensor([0, a["hidden"].shape[0]]),
    "leaves": lambda a: np.zeros(a["tree"].parents.shape[0], np.int64),
    "rollout_values": lambda a: np.full(a["tree"].parents.shape[0], 0.5, a["tree"].values.dtype),
    "starts": lambda a: np.zeros(a["tree"].parents.shape[0], np.int64),
    "roots": lambda a: np.zeros(a["tree"].parents.shape[0], np.int64),
    "ref_bias": _vocabulary("weight"),
    "student_bias": _vocabulary("student_weight"),
    "teacher_bias": _vocabulary("teacher_weight"),
    "labels": _labels,
    "num_draft_tokens": _batch(1),
    "seed": _batch(3),
    "offset": _batch(2),
    "counts": _counts,
    "last_access": _counts,
    "ref_logits": lambda a: a["logits"] * 0.5,
    "ref_hidden": lambda a: a["hidden"] * 0.5,
    "ref_weight": lambda a: a["weight"] * 0.5,
} | {
    name: _row(value)
    for name, value in {
        "label_smoothing": 0.25, "win_rate_gap": 0.25, "label": 0.75, "chosen_lengths": 3.0, "rejected_lengths": 2.0,
        "preference": 0.75, "lengths_1": 3.0, "lengths_2": 2.0, "target_logps": -1.5, "density_weights": 0.5,
        "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0, "policy_kl_logps": -1.0, "ref_kl_logps": -1.5,
        "delta": 0.1, "chosen_nll": 0.5, "ref_logps_1": -1.0, "ref_logps_2": -2.0, "ref_logps": -1.0,
        "ref_calibration_logps": -1.0, "ref_generated_logps": -1.0,
        "sequence_lengths": 4.0, "margin": 0.25, "bt_reward_loss.weight": 0.5,
        "retain_nll": 0.5, "retain_kl": 0.25, "kl": 0.1,
    }.items()
}  # fmt: skip
"""By name, an array for an argument that examples leave out."""

BESIDE: dict[str, tuple[str, ...]] = {
    "topk_weights": ("dispatch", "capacity", "drop"),
    "dispatch": ("topk_weights",),
    "num_tokens": ("expert_counts",),
    "chosen_lengths": ("rejected_lengths",),
    "rejected_lengths": ("chosen_lengths",),
    "lengths_1": ("lengths_2",),
    "lengths_2": ("lengths_1",),
    "ref_chosen_logps": ("ref_rejected_logps",),
    "ref_rejected_logps": ("ref_chosen_logps",),
    "policy_kl_logps": ("ref_kl_logps",),
    "ref_kl_logps": ("policy_kl_logps",),
    "ref_logps_1": ("ref_logps_2",),
    "ref_logps_2": ("ref_logps_1",),
    "ref_hidden": ("ref_weight",),
    "ref_weight": ("ref_hidden",),
    "ref_bias": ("ref_hidden", "ref_weight"),
    "rollout_values": ("leaves",),
    "segment_ids": ("num_segments",),
}
"""Arguments that are given together."""
INSTEAD: dict[str, tuple[str, ...]] = {
    "label": ("win_rate_gap",),
    "kl": ("policy_kl_logps", "ref_kl_logps"),
    "policy_kl_logps": ("kl",),
    "ref_kl_logps": ("kl",),
    "ref_hidden": ("ref_logps",),
    "ref_weight": ("ref_logps",),
    "ref_bias": ("ref_logps",),
    "bias_ids": (),
    "segment_ids": ("cu_seqlens",),
}
"""Arguments that exclude others."""


def calls(op: Any) -> Iterator[dict[str, Any]]:
    """Arguments by name: the example, then the example with each optional array argument that it leaves out."""
    bound = _example(op.full_name)
    given = dict(bound.arguments)
    if "seed" in inspect.signature(op.load()).parameters:
        given.setdefault("seed", 7)
    yield given
    for name, parameter in inspect.signature(op.load()).parameters.items():
        optional = parameter.default is not inspect.Parameter.empty
        arrays = any(word in str(parameter.annotation) for word in ARRAYS)
        if (
            optional
            and arrays
            and name not in given
            and (op.name, name) not in NOT_ARRAYS | BY_HAND
        ):
            yield _with(op, name, given)


def _with(op: Any, name: str, given: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(op.load()).parameters
    call = {n: x for n, x in given.items() if n not in INSTEAD.get(name, ())}
    for each in (name, *BESIDE.get(name, ())):
        make = MADE.get(f"{op.name}.{each}", MADE.get(each))
        assert make is not None, (
            f"{op.full_name} has an array argument {each} that no call passes: say in MADE how to make one"
        )
        if each in parameters:
            call[each] = make(given)
    return call


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every array inside arguments: in dictionaries, sequences, named tuples and dataclasses."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        yield path, value
    elif isinstance(value, dict):
        for key, x in value.items():
            yield from leaves(x, (*path, key))
    elif isinstance(value, (list, tuple)):
        for at, x in enumerate(value):
            yield from leaves(x, (*path, at))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from leaves(getattr(value, field.name), (*path, field.name))


def mapped(value: Any, change: Callable[[Path, Any], Any], path: Path = ()) -> Any:
    """The same structure with ``change(path, array)`` in place of every array."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return change(path, value)
    if isinstance(value, dict):
        return {key: mapped(x, change, (*path, key)) for key, x in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(x, change, (*path, at)) for at, x in enumerate(value)))
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(x, change, (*path, at)) for at, x in enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return dataclasses.replace(
            value, **{name: mapped(x, change, (*path, name)) for name, x in parts.items()}
        )
    return value
