# SPDX-License-Identifier: Apache-2.0
"""Random results are judged by their law: what is right passes, what is nearly right does not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bench._case import Case, Contender, Inputs, Verdict
from bench._check import CheckFailed, check
from bench._harness import run_case
from bench._options import Options
from bench.contenders import decode_plain
from bench.decode import _inputs, _judge, sampling, speculative, tree

QUICK = Options(quick=True, quiet=True)
Verified = tuple[Tensor, Tensor]


def _first(cases: list[Case]) -> Case:
    return cases[0]


def _ours(case: Case) -> Contender:
    (found,) = (c for c in case.contenders if isinstance(c, Contender) and c.role == "ours")
    return found


def _judged(case: Case, contender: Contender) -> Verdict:
    assert case.judge is not None
    return case.judge(contender, case.make_inputs(0))


def accepts_too_much(x: Inputs) -> Verified:
    """What an ensemble weight of 0 does: every draft token is kept."""
    p = x["target"].float().softmax(-1)
    n = torch.full((len(p),), x["tokens"].shape[1])
    return torch.cat([x["tokens"], torch.multinomial(p[:, -1], 1)], 1), n


def accepts_a_little_too_much(x: Inputs) -> Verified:
    """The draft at a temperature of 1.5: its likely tokens look less likely."""
    return decode_plain.chain(x["target"], x["draft"].float() / 1.5, x["tokens"])


def emits_from_the_draft(x: Inputs) -> Verified:
    """After a rejection the token comes from q, not from what is left of p."""
    ids, n = decode_plain.chain(x["target"], x["draft"], x["tokens"])
    k = x["tokens"].shape[1]
    q = x["draft"].float().softmax(-1)
    for b in range(len(ids)):
        if n[b] < k:
            ids[b, n[b]] = torch.multinomial(q[b, n[b]], 1)[0]
    return ids, n


def changes_a_kept_token(x: Inputs) -> Verified:
    ids, n = decode_plain.chain(x["target"], x["draft"], x["tokens"])
    ids[:, 0] = (x["tokens"][:, 0] + 1) % x["draft"].shape[-1]
    return ids, n


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (accepts_too_much, "kept more than 1 .* times, expected"),
        (accepts_a_little_too_much, "kept more than|probability 0"),
        (emits_from_the_draft, "likelier half|probability 0"),
        (changes_a_kept_token, "no path of the draft|probability 0"),
    ],
)
def test_a_wrong_chain_prints_no_number(wrong: object, message: str) -> None:
    torch.manual_seed(1)
    case = _first(speculative.chain_cases(QUICK))
    rival = Contender("wrong", "rival", wrong)  # type: ignore[arg-type]
    with pytest.raises(CheckFailed, match=f"wrong .*({message})"):
        run_case(replace(case, contenders=[_ours(case), rival]), QUICK, None)


def test_a_chain_verified_token_by_token_is_no_block() -> None:
    torch.manual_seed(1)
    case = _first(speculative.block_cases(QUICK))
    by_token = Contender(
        "by token", "rival", lambda x: decode_plain.chain(x["target"], x["draft"], x["tokens"])
    )
    assert "probability 0" in _judged(case, by_token).complaint


def test_a_tree_that_forgets_the_rejected_prints_no_number() -> None:
    case = _first(tree.cases(QUICK))

    def from_the_whole_law(x: Inputs) -> Verified:
        ids, n = decode_plain.tree(x)
        p = x["target"][:, 0].float().softmax(-1)
        return torch.where((n == 0).unsqueeze(-1), torch.multinomial(p, 1), ids), n

    verdict = _judged(case, Contender("wrong", "rival", from_the_whole_law))
    assert "probability 0" in verdict.complaint


@pytest.mark.parametrize("temperature", [0.8, 1.25])
def test_a_sample_at_another_temperature_prints_no_number(temperature: float) -> None:
    torch.manual_seed(1)
    whole = next(case for case in sampling.cases(QUICK) if case.label == "whole law")
    warm = Contender("warm", "rival", lambda x: decode_plain.sample(x["logits"] / temperature))
    assert "likelier half" in _judged(whole, warm).complaint


def test_a_sample_without_truncation_prints_no_number() -> None:
    torch.manual_seed(1)
    whole = Contender("whole", "rival", lambda x: decode_plain.sample(x["logits"]))
    assert "probability 0" in _judged(_first(sampling.cases(QUICK)), whole).complaint


def test_ours_must_equal_the_reference_for_the_same_seed() -> None:
    case = _first(sampling.cases(QUICK))
    other = Contender("hotloop cpu", "ours", lambda x: _ours(case).forward(_with_next_seed(x)))
    assert "differs from hotloop.reference" in _judged(case, other).complaint
    assert _judged(case, _ours(case)).complaint == ""


def _with_next_seed(x: Inputs) -> Inputs:
    return Inputs({**x.tensors, "seeds": iter([next(x["seeds"]) + 1])}, x.wrt)


def test_a_judged_contender_that_raises_is_reported() -> None:
    def raises(x: Inputs) -> Verified:
        raise RuntimeError("no kernel for this")

    case = _first(speculative.chain_cases(QUICK))
    checked = check(case, [Contender("broken", "rival", raises)], case.make_inputs(0))
    assert checked.broken == {"broken": "RuntimeError: no kernel for this"}


def test_counts_within_the_bound_pass_and_others_do_not() -> None:
    count = _judge.Count("won")
    for i in range(1000):
        count.add(i % 2 == 0, 0.5)
    assert count.complaint() == ""
    assert _judge.bernstein(250.0) == pytest.approx(97.5, abs=0.1)
    for _ in range(400):
        count.add(True, 0.5)
    assert count.complaint().startswith("won 900 of 1400 times, expected 700.0 +- ")


def test_the_draft_is_right_about_as_often_as_stated() -> None:
    x = _inputs.chain(3, (64, 4, 4000), "float32", "cpu")
    p, q = x["target"][:, :4].softmax(-1), x["draft"].softmax(-1)
    assert float(torch.minimum(p, q).sum(-1).mean()) == pytest.approx(_inputs.ACCEPTED, abs=0.03)


def test_the_tree_has_the_nodes_the_children_and_the_depth_asked_for() -> None:
    parents = _inputs.topology(64, 4, 8)
    depths: list[int] = []
    for parent in parents:
        depths.append(0 if parent < 0 else depths[parent] + 1)
    assert len(parents) == 64
    assert max(depths) == 7
    assert {parents.count(p) for p in set(parents)} == {4}


def test_the_chain_beside_a_tree_visits_as_many_rows() -> None:
    from hotloop import decode

    x = _inputs.tree(0, (3, 20, 1000), 4, 3, "float32", "cpu")
    law, rows = decode.Logits(x["target"]), decode.Logits(x["chains"]["rows"])
    for seed in range(4):
        ids, lengths = next(x["chains"]["chains"])
        along = decode.chain_speculative_sampling(None, ids, rows, num_draft_tokens=lengths)
        across = decode.tree_speculative_verify(
            x["tokens"], x["parents"], law, max_depth=3, seed=seed
        )
        assert along.rows_read.tolist() == across.rows_read.tolist()
