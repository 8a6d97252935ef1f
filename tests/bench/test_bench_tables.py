# SPDX-License-Identifier: Apache-2.0
"""The judges of the table benches reject what is wrong; the rivals do what they are taken for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from fixtures import threads
from torch import Tensor

from bench._case import Case, Contender, Inputs, Missing, resolve
from bench._check import check
from bench._options import Options
from bench.contenders import hash_maps
from bench.table import _inputs, lookup, train

QUICK = Options(quick=True)
CASES = [
    case
    for bench in (*lookup.BENCHES, *train.BENCHES)
    for case in bench.cases(QUICK)
]  # fmt: skip
RIVALS = [
    pytest.param(case, entry, id=f"{case.key} {entry.name}")
    for case in CASES
    for entry in case.contenders
    if not entry.name.startswith("hotloop")
]
MAPS = (hash_maps.CUCKOO, hash_maps.ABSL, hash_maps.ABSL_AHEAD)


two_threads = threads(2)


def present(entry: Any) -> Contender:
    contender = resolve(entry)
    if isinstance(contender, Missing):
        pytest.skip(contender.reason)
    return contender


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("case", "entry"), RIVALS)
def test_rivals_agree(case: Case, entry: Any) -> None:
    contender = present(entry)
    if not contender.checked:
        return
    checked = check(case, [contender], case.make_inputs(0))
    assert (checked.broken, checked.disagree) == ({}, {})
    assert len(checked.errors[contender.name]) >= 1


@pytest.mark.parametrize("name", MAPS)
def test_maps_keep_any_key_and_the_last_value(name: str) -> None:
    present(hash_maps.contender(name, lambda: Contender(name, "rival", lambda x: None)))
    pairs = hash_maps.Pairs(name, 64)
    keys = torch.tensor([0, -1, 2**63 - 1, -(2**63), 7])
    values = torch.arange(10.0).reshape(5, 2)
    pairs.insert_or_assign(keys, values)
    pairs.insert_or_assign(keys[1:2], torch.tensor([[50.0, 60.0]]))
    got, found = pairs.find(torch.tensor([7, -1, 8]))
    assert found.tolist() == [True, True, False]
    assert got[:2].tolist() == [[8.0, 9.0], [50.0, 60.0]]
    assert pairs.size == 5
    assert 0 < pairs.load_factor < 1
    rows = hash_maps.Rows(name, 64, keys, values)
    got, found = rows.find(torch.tensor([-(2**63), 9]))
    assert found.tolist() == [True, False]
    assert got.tolist() == [[6.0, 7.0], [0.0, 0.0]]
    assert rows.find(keys[:0])[0].shape == (0, 2)


@pytest.mark.parametrize("name", MAPS)
def test_maps_are_as_full_as_the_case_says(name: str) -> None:
    present(hash_maps.contender(name, lambda: Contender(name, "rival", lambda x: None)))
    keys = _inputs.keys_of(0, round(0.85 * 2**16))
    pairs = hash_maps.Pairs(name, 2**16)
    pairs.insert_or_assign(keys, torch.zeros(len(keys), 2))
    assert pairs.load_factor == pytest.approx(0.85, abs=1e-3)


def test_a_map_without_headers_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler() -> Any:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(hash_maps, "library", no_compiler)
    missing = resolve(hash_maps.contender("absl", lambda: Contender("absl", "rival", print)))
    assert missing == Missing("absl", "RuntimeError: no C++ compiler")


def test_keys_are_distinct_and_spread() -> None:
    keys = _inputs.keys_of(0, 10_000)
    assert len(keys.unique()) == 10_000
    assert torch.equal(keys[500:700], _inputs.keys_of(500, 700))
    assert abs(float((keys < 0).double().mean()) - 0.5) < 0.02


def test_ids_are_of_the_rows_they_say() -> None:
    world = _inputs.world(500, 1024, 4)
    x = _inputs.lookups(3, world, 1000, 0.75)
    stored = x["index"] >= 0
    assert abs(float(stored.double().mean()) - 0.75) < 0.06
    assert torch.equal(world.keys[x["index"][stored]], x["ids"][stored])
    assert not torch.isin(x["ids"][~stored], world.keys).any()


@pytest.mark.parametrize("law", ["uniform", "zipf"])
def test_bags_touch_as_many_rows_as_the_cost_says(law: str) -> None:
    world = _inputs.world(5000, 8192, 4)
    seen = [len(_inputs.bags(s, world, 500, 8, law)["dense"].unique()) for s in range(5)]
    wanted = train._touched(5000, 4000, law)
    assert sum(seen) / 5 == pytest.approx(wanted, rel=0.02)


def _wrong_value(values: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    values = values.clone()
    values[found.nonzero()[0, 0]] += 1
    return values, found


def _missed(values: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    found = found.clone()
    found[found.nonzero()[0, 0]] = False
    return values, found


@pytest.mark.parametrize("spoil", [_wrong_value, _missed])
def test_one_wrong_answer_of_a_lookup_is_seen(spoil: Callable[..., Any]) -> None:
    case = lookup.find_cases(QUICK)[0]
    plain = next(c for c in case.contenders if isinstance(c, Contender) and c.role == "plain")
    bad = replace(plain, forward=lambda x: spoil(*plain.forward(x)))
    assert bad.name in check(case, [bad], case.make_inputs(0)).disagree


def test_a_table_that_is_half_full_is_seen() -> None:
    case = lookup.insert_cases(QUICK)[0]

    class Roomy(lookup.Sorted):
        load_factor = 0.4

    bad = Contender("roomy", "rival", lambda x: Roomy(x["world"]))
    complaint = check(case, [bad], case.make_inputs(0)).disagree["roomy"]
    assert "is 0.40 full, expected about 0.85" in complaint


def test_a_key_too_few_is_seen() -> None:
    case = lookup.insert_cases(QUICK)[0]

    class Short(lookup.Sorted):
        @property
        def size(self) -> int:
            return super().size - 1

    bad = Contender("short", "rival", lambda x: Short(x["world"]))
    found = check(case, [bad], case.make_inputs(0))
    assert "holds" in found.disagree["short"]
    assert found.errors["short"] == [math.inf]


@pytest.mark.parametrize("law", ["uniform", "zipf"])
@pytest.mark.parametrize("fault", ["no update", "wrong rate", "repeated rows apart"])
def test_a_wrong_update_is_seen(law: str, fault: str) -> None:
    case = next(
        c for c in train.step_cases(QUICK) if "adagrad" in c.label and f"{law} ids" in c.label
    )

    class Faulty(train.Plain):
        @torch.no_grad()
        def _adagrad(self) -> None:
            if fault == "no update":
                return
            if fault == "wrong rate":
                before = self.weight.clone()
                super()._adagrad()
                self.weight += 1e-3 * (self.weight - before)
                return
            gradient = self.weight.grad
            assert gradient is not None
            rows, each = gradient._indices()[0], gradient._values()
            self._sums.index_add_(0, rows, each.square().mean(-1))
            rate = -train._LR / (self._sums[rows].sqrt() + train._EPS)
            self.weight.index_add_(0, rows, each * rate.unsqueeze(-1))

    def forward(x: Inputs) -> Tensor:
        faulty = _inputs.built(x, "faulty", lambda w: Faulty(w.values, "rowwise_adagrad"))
        return faulty.step(x["dense"], x["offsets"], x["upstream"])

    bad = Contender("faulty", "rival", forward)
    assert "faulty" in check(case, [bad], case.make_inputs(0)).disagree


def test_cases_of_one_size_share_nothing_that_trains() -> None:
    """Else a contender built for one rule would be timed under the name of the next."""
    cases = [*train.step_cases(QUICK), *train.forward_cases(QUICK)]
    made = [case.make_inputs(0)["built"] for case in cases]
    assert len({id(one) for one in made}) == len(cases)
    sets = [cases[0].make_inputs(seed)["built"] for seed in range(2)]
    assert sets[0] is sets[1]
