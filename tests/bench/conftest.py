# SPDX-License-Identifier: Apache-2.0
"""Puts the repository root, where ``bench`` lies, on the path; a case that needs no rival."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from bench import _row  # noqa: E402
from bench._case import Case, Contender, Cost, Inputs, Target  # noqa: E402

Make = Callable[..., Case]


def square(inputs: Inputs) -> Tensor:
    return inputs["x"].square().sum()


@pytest.fixture
def make_case() -> Make:
    """A case of sum(x^2): ``make_case(contender, ...)`` beside plain torch."""

    def make(*more: Any, targets: tuple[Target, ...] = ()) -> Case:
        def truth(inputs: Inputs) -> list[Tensor]:
            x = inputs["x"].detach().double()
            return [x.square().sum(), 2 * x]

        return Case(
            op="toy.square",
            mode="fwd+bwd",
            label="",
            shape=(64,),
            dtype="float32",
            device="cpu",
            make_inputs=lambda seed: Inputs(
                {
                    "x": torch.randn(
                        64, generator=torch.Generator().manual_seed(seed)
                    ).requires_grad_()
                },
                ("x",),
            ),
            truth=truth,
            contenders=(Contender("torch", "plain", square), *more),
            cost=Cost("bytes", "2*n*4", {"n": 64}),
            roof=lambda: torch.ones(64).clone,
            roof_amount=512.0,
            targets=targets,
            sets=2,
        )

    return make


@pytest.fixture
def rows() -> list[_row.Row]:
    """Rows of a fixed file: two cases, one of which we lose."""
    return _row.read(Path(__file__).parent / "rows.jsonl")
