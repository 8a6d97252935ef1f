# SPDX-License-Identifier: Apache-2.0
"""What a module's ``state_dict`` holds of its table beside rows, and how a table goes on from it."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...front import check
from .. import filters
from .._store import Store
from . import deltas
from .settings import admission_state


def continued(table: Store) -> dict[str, Any]:
    """What a module's ``state_dict`` holds beside rows: whose state it is, and what the next batch goes on from."""
    state: dict[str, Any] = {
        "optimizer": None if table.optimizer is None else type(table.optimizer).__name__,
        "tick": int(table._native.tick),
        "epoch": table._epoch,
        "step": table._step,
        "admission": None,
    }
    if table.admission is not None:
        import torch

        filter_, cells = admission_state(table)
        if cells is not None:  # as int16: not every tool that moves checkpoints knows uint16
            filter_["cells"] = torch.from_numpy(cells.view(np.int16))
        state["admission"] = filter_
    return state


def take_over_admission(op: str, table: Store, state: dict[str, Any]) -> None:
    """Give a table's filter the sightings of a ``state_dict``, or refuse them and change nothing."""
    given = state.get("admission")
    if table.admission is None or given is None:
        return
    name = given.get("name") if isinstance(given, dict) else type(given).__name__
    if name != type(table.admission).__name__:
        raise ValueError(
            f"[{op}] admission: expected the state of {table.admission!r}, got that of a {name}. "
            "Make a module with the filter of the one saved."
        )
    if isinstance(table.admission, filters.CountFilter):
        try:
            cells = given["cells"].cpu().contiguous().numpy().view(np.uint16)
            elements = np.array(given["elements"], np.int64)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"[{op}] admission: expected the state of {table.admission!r}, got one whose parts give {error!r}. "
                "Pass what state_dict() returned."
            ) from error
        table.admission.load_state_dict({**given, "cells": cells, "elements": elements})


def counts_of(op: str, state: dict[str, Any]) -> tuple[int, int, int] | None:
    """Tick, epoch and step of a ``state_dict``; None of one from before there was a filter in it."""
    if not all(name in state for name in deltas.CLOCK):
        return None
    tick, epoch, step = (
        check.integer(op, name, state[name], at_least=0, at_most=most)
        for name, most in deltas.CLOCK.items()
    )
    return tick, epoch, step
