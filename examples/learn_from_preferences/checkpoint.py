# SPDX-License-Identifier: Apache-2.0
"""Files that are either whole or not there, whatever instant the program is killed at."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from .settings import DemoError

NAME = "checkpoint.pt"


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside the target, force it to disk, then rename over it."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    _rename(temporary, path)


def save(folder: Path, state: dict[str, Any]) -> None:
    """Save tensors, numbers, strings and containers of them."""
    temporary = folder / (NAME + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    _rename(temporary, folder / NAME)


def load(folder: Path) -> dict[str, Any] | None:
    """The last saved state, or None if there is none. Loading runs no code from the file."""
    path = folder / NAME
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise DemoError(
            f"{path}: the checkpoint cannot be read ({_first_line(error)}). "
            "Pass --restart to begin anew."
        ) from error
    return state


def _rename(temporary: Path, path: Path) -> None:
    os.replace(temporary, path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the new name, too, must outlive a power cut
    finally:
        os.close(descriptor)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
