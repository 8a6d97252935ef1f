# SPDX-License-Identifier: Apache-2.0
"""The same contenders under pytest-benchmark: ``pytest bench/ --benchmark-only``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from bench import _machine, _registry
from bench._case import Case, Contender, Entry, Inputs, Missing, resolve, step
from bench._check import check
from bench._options import DTYPES, Options


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("hotloop benches")
    group.addoption("--hotloop-quick", action="store_true", help="small shapes: a smoke run")
    group.addoption("--hotloop-device", choices=("cpu", "cuda"), default="cpu")
    group.addoption("--hotloop-dtype", choices=DTYPES, default=None)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "contest" not in metafunc.fixturenames:
        return
    config = metafunc.config
    options = Options(
        device=config.getoption("hotloop_device"),
        dtype=config.getoption("hotloop_dtype"),
        quick=config.getoption("hotloop_quick"),
    )
    contests = [
        (case, entry)
        for bench in _registry.benches()
        for case in bench.cases(options)
        if options.dtype in (None, case.dtype)
        for entry in case.contenders
    ]
    ids = [f"{case.key} {entry.name}".replace(" ", "_") for case, entry in contests]
    metafunc.parametrize("contest", contests, ids=ids)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Rivals warn, and take longer than a test may."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore"))
            if config.pluginmanager.hasplugin("timeout"):
                item.add_marker(pytest.mark.timeout(0))


@dataclass
class _Current:
    """Inputs of the case at hand; the tests come case by case."""

    case: Case | None = None
    inputs: list[Inputs] | None = None


_current = _Current()


@pytest.fixture
def agreeing(contest: tuple[Case, Entry]) -> tuple[Case, Contender, list[Inputs]]:
    """The contender and the input sets, once its results agree with the reference."""
    case, entry = contest
    contender = resolve(entry)
    if isinstance(contender, Missing):
        pytest.skip(contender.reason)
    if _current.case is not case:
        torch.compiler.reset()
        inputs = [case.make_inputs(seed) for seed in range(case.sets)]
        _current.case, _current.inputs = case, inputs
    assert _current.inputs is not None
    if contender.checked:
        plain = [c for c in case.contenders if isinstance(c, Contender) and c.role == "plain"]
        together = [contender, *(p for p in plain if p is not contender)]
        checked = check(case, together, _current.inputs[0])
        for problems in (checked.broken, checked.disagree):
            if contender.name in problems:
                pytest.fail(f"no number: {problems[contender.name]}")
    return case, contender, _current.inputs


@pytest.fixture
def turn(agreeing: tuple[Case, Contender, list[Inputs]], benchmark):  # type: ignore[no-untyped-def]
    """Times one contender; the input set changes from call to call."""
    case, contender, inputs = agreeing
    benchmark.group = case.key
    benchmark.extra_info.update(
        op=case.op,
        impl=contender.name,
        device=_machine.device_name(case.device),
        simd=_machine.simd(),
        versions=_machine.versions(),
        commit=_machine.commit(),
        **{case.cost.unit: case.cost.formula, "dims": case.cost.dims},
    )
    calls = 0

    def one() -> None:
        nonlocal calls
        step(contender, inputs[calls % len(inputs)], case.mode)
        calls += 1
        if case.device == "cuda":
            torch.cuda.synchronize()

    before = torch.get_num_threads()
    torch.set_num_threads(case.threads or before)
    yield lambda: benchmark(one)
    torch.set_num_threads(before)
