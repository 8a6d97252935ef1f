# SPDX-License-Identifier: Apache-2.0
"""The settings of a table as a file states them, checked before anything is built or allocated.

A manifest with a right checksum may still come from another program, or be written to do harm. So names are looked up
in the lists below, numbers must have the types and ranges of a table, and the memory that they would make the table
allocate must be in the file.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...core.rules import FTRL, SGD, Adagrad, Adam, GroupAdagrad, RowwiseAdagrad
from ...front import check
from .. import filters, initializers
from .._store import DTYPES, EVICT_STRATEGIES, MAX_ROWS, TRACKED, Store, check_together
from .container import FormatError
from .deltas import TABLE_ID


def _by_name(*kinds: type) -> dict[str, Any]:
    return {kind.__name__: kind for kind in kinds}


RULES = _by_name(SGD, RowwiseAdagrad, Adagrad, Adam, FTRL, GroupAdagrad)
INITIALIZERS = _by_name(initializers.Constant, initializers.Uniform, initializers.Normal)
_WRONG = (LookupError, TypeError, ValueError, OverflowError, AttributeError)


class _Unknown(ValueError):
    """A name that this hotloop does not have."""


def checked(op: str, config: dict[str, Any]) -> dict[str, Any]:
    """The entries of ``Table.save`` as a table takes them, the rule and the initializer made; others are left alone.

    Raises:
        FormatError: an entry is missing, or is not what a table could have.
    """
    try:
        return {**config, **_checked(config)}
    except _Unknown as error:
        raise FormatError(
            f"[{op}] config: expected {error}. A newer hotloop wrote the file: upgrade hotloop to read it."
        ) from None
    except _WRONG as error:
        raise FormatError(
            f"[{op}] config: expected the settings of a table, got one that is refused: {_told(error)} "
            "Another program wrote the file, or it is damaged: fetch it again."
        ) from None


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, (TypeError, ValueError)) else f"{error!r}."


def _checked(config: dict[str, Any]) -> dict[str, Any]:
    name = "config"

    def count(entry: str, default: int | None, most: int) -> int:
        given = config[entry] if default is None else config.get(entry, default)
        return check.integer(name, entry, given, at_least=0, at_most=most)

    bound = config["max_capacity"]
    if bound is not None:
        check.integer(name, "max_capacity", bound, at_least=1, at_most=MAX_ROWS)
    _chosen(name, "evict_strategy", config["evict_strategy"], EVICT_STRATEGIES)
    _chosen(name, "dtype", config["dtype"], DTYPES)
    track = config["track"]
    check.instance(name, "track", track, list)
    for tracked in track:
        _chosen(name, "track", tracked, TRACKED)
    rule = _made(name, "optimizer", config["optimizer"], RULES)
    first = _made(name, "initializer", config["initializer"], INITIALIZERS)
    check.instance(name, "initializer", first, *INITIALIZERS.values())
    initializers.check_range(name, first, config["dtype"])
    check_together(name, config["evict_strategy"], bound, config["dtype"], rule)
    if not isinstance(config["table_id"], str) or not TABLE_ID.fullmatch(config["table_id"]):
        raise ValueError(
            f"[{name}] table_id: expected 32 hexadecimal digits, got {config['table_id']!r}."
        )
    flags = {flag: config.get(flag, False) for flag in ("own_mark", "smaller", "left_out")}
    for flag, given in flags.items():
        check.instance(name, flag, given, bool)
    shard = config.get("shard")
    if shard is not None:
        check.instance(name, "shard", shard, list)
        index, of = shard
        of = check.integer(name, "shard", of, at_least=1, at_most=2**63 - 1)
        shard = [check.integer(name, "shard", index, at_least=0, at_most=of - 1), of]
    seed = config.get("hash_seed")
    if seed is not None:
        check.integer(name, "hash_seed", seed, at_least=0, at_most=2**64 - 1)
    return {
        "dim": check.integer(name, "dim", config["dim"], at_least=1, at_most=65536),
        "track": track,
        "optimizer": rule,
        "initializer": first,
        "value_range": check.number(
            name, "value_range", config["value_range"], above=0, below=float("inf")
        ),
        "position": count("position", None, 2**32 - 3 if "changes" in track else 2**63 - 1),
        "tick": count("tick", None, 2**64 - 2),
        "epoch": count("epoch", 0, 2**32 - 1),
        "step": count("step", 0, 2**64 - 2),
        **flags,
        "shard": shard,
        "hash_seed": seed,
    }


def _chosen(op: str, entry: str, given: Any, allowed: tuple[str, ...]) -> None:
    check.instance(op, entry, given, str)
    if given not in allowed:
        raise _Unknown(f"{entry} of {', '.join(allowed)}, got {given!r}")


def _made(op: str, entry: str, stored: Any, kinds: dict[str, Any]) -> Any:
    """A rule or an initializer of its name and fields."""
    if stored is None:
        return None
    _chosen(op, f"{entry}.name", stored["name"], tuple(kinds))
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items() if k != "name"}
    return kinds[stored["name"]](**fields)


def admission(op: str, filed: tuple[dict[str, Any], list[dict[str, Any]]] | None) -> Any:
    """The filter of a snapshot, which is made when its cells are known to be there."""
    if filed is None:
        return None
    state, blocks = filed
    try:
        name = state["name"]
        if name == "CountFilter":
            cells = np.concatenate([block["cells"] for block in blocks] or [np.empty(0, np.uint16)])
            elements = np.array(state["elements"], np.int64)
            return filters.CountFilter.restored(
                {**state, "cells": cells, "elements": elements}, state["threshold"]
            )
        if name == "ProbabilisticFilter":
            chance = filters.ProbabilisticFilter(
                state["threshold"], equal=state["equal"], seed=state["seed"]
            )
            chance.load_state_dict(state)
            return chance
    except _WRONG as error:
        raise FormatError(
            f"[{op}] admission: expected the state of a filter, got {error!r}. Another program wrote it."
        ) from error
    raise FormatError(
        f"[{op}] admission: expected a CountFilter or a ProbabilisticFilter, got {name!r}. "
        "A newer hotloop wrote the file: upgrade hotloop to read it."
    )


def admission_state(table: Store) -> tuple[dict[str, Any], np.ndarray | None]:
    """What a filter goes on from: numbers and its cells (splits, cells), None where it has none."""
    state = {"name": type(table.admission).__name__, **table.admission.state_dict()}  # type: ignore[union-attr]
    if isinstance(table.admission, filters.CountFilter):
        state["threshold"] = table.admission.threshold
        state["elements"] = state["elements"].tolist()
    return state, state.pop("cells", None)
