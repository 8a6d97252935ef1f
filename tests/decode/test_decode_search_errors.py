# SPDX-License-Identifier: Apache-2.0
"""Every error text of the searches, and that a refused call has changed nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hotloop.decode import BacktrackState, BeamState, PuctTree, StarTree
from hotloop.decode import search as s

Z = np.zeros((2, 3, 8), np.float32)
START = BeamState.start(2, 3)


def star(**changes: Any) -> StarTree:
    arrays = {
        "parents": np.array([[-1, 0, 0, 1], [-1, 0, -1, -1]]),
        "values": np.full((2, 4), 0.5),
        "visits": np.zeros((2, 4), np.int64),
    }
    return StarTree(**{**arrays, **changes})


def puct(**changes: Any) -> PuctTree:
    reals = {name: np.full((2, 4), 0.5) for name in ("q", "v", "values", "logps")}
    return PuctTree(
        **{**star()._asdict(), **reals, "lengths": np.ones((2, 4), np.int64), **changes}
    )


def chunk(**changes: Any) -> dict[str, Any]:
    return {
        "p_unconfident": np.array([[0.1, 0.2], [0.3, 0.0]]),
        "span_ends": np.array([[2, 5], [3, -1]]),
        "chunk_lengths": np.array([8, 8]),
        "prefix_lengths": np.array([4, 4]),
        "sentence_lengths": np.array([2, 0]),
        "state": BacktrackState.start(2),
        **changes,
    }


def beams(
    logits: Any = Z, state: Any = START, ref: Any = None, **options: Any
) -> Callable[[], Any]:
    return lambda: s.likelihood_beam_search(logits, state, ref, **options)


def star_step(tree: Any = None, *places: Any, **options: Any) -> Callable[[], Any]:
    return lambda: s.mcts_star_step(star() if tree is None else tree, *places, **options)


def puct_step(tree: Any = None, *places: Any, **options: Any) -> Callable[[], Any]:
    return lambda: s.puct_select_backup(puct() if tree is None else tree, *places, **options)


def backtrack(**changes: Any) -> Callable[[], Any]:
    return lambda: s.retrospective_backtrack(**chunk(**changes))


def table(codebook: Any, **options: Any) -> Callable[[], Any]:
    return lambda: s.vq_neighbor_table(codebook, **options)


TWO = np.array([0, 1])
NEITHER = np.array([[-1, 0, 3, 1], [-1, 0, -1, -1]])
BEAM, STAR, PUCT, BACK, VQ = (
    "likelihood_beam_search",
    "mcts_star_step",
    "puct_select_backup",
    "retrospective_backtrack",
    "vq_neighbor_table",
)

VALUES: list[tuple[str, Callable[[], Any], str]] = [
    (BEAM, beams(Z[0]), r"logits: expected 3 dimension\(s\), got shape \(3, 8\)\."),
    (BEAM, beams(Z[:, :0]), r"logits: expected 1 to 3 rows of at least one token, got shape \(2, 0, 8\)\. Pass"),
    (BEAM, beams(np.zeros((2, 4, 8))), r"logits: expected 1 to 3 rows .*, got shape \(2, 4, 8\)\. Pass a row"),
    (BEAM, beams(Z[..., :0]), r"logits: expected 1 to 3 rows of at least one token, got shape \(2, 3, 0\)"),
    (BEAM, beams(state=BeamState.start(3, 3)), r"state\.scores: expected shape \(2, 3\), got \(3, 3\)\. Match logits"),
    (BEAM, beams(state=START._replace(done=np.zeros(3, bool))), r"state\.done: expected shape \(2,\), got \(3,\)\."),
    (BEAM, beams(ref=Z[:, :2]), r"ref_logits: expected shape \(2, 3, 8\), got \(2, 2, 8\)\. Match logits"),
    (BEAM, beams(eos_token_ids=8), r"eos_token_ids: expected an integer >= 0 and <= 7, got 8"),
    (BEAM, beams(eos_token_ids=[1, -1]), r"eos_token_ids: expected an integer >= 0 and <= 7, got -1"),
    (BEAM, beams(Z[:, :2], s.likelihood_beam_search(Z, START)), r"logits: expected a row for each live beam, got 2 "
     r"rows and beam 2 of request 0 alive\. Pass all rows"),
    (BEAM, beams(impl="gpu"), r"impl: expected one of auto, .*, got 'gpu'"),
    (BEAM, lambda: BeamState.start(-1), "batch: expected an integer >= 0, got -1"),
    (BEAM, lambda: BeamState.start(1, 0), "num_beams: expected an integer >= 1, got 0"),
    (STAR, star_step(star(values=np.zeros((2, 3)))), r"tree\.values: expected shape \(2, 4\), got \(2, 3\)\. Match"),
    (STAR, star_step(star(parents=np.zeros(4, int))), r"tree\.parents: expected 2 dimension\(s\), got shape \(4,\)"),
    (STAR, star_step(star(parents=np.zeros((2, 4), int))), r"tree\.parents: expected -1 or an earlier node \(-1 at "
     r"node 0\), got 0 at \[0, 0\] \(.*\)\. Append children after their parent"),
    (STAR, star_step(star(parents=NEITHER)), r"tree\.parents: expected -1 or an earlier node .*, got 3 at \[0, 2\]"),
    (STAR, star_step(star(parents=NEITHER - 1)), r"tree\.parents: expected .*, got -2 at \[0, 0\]"),
    (STAR, star_step(star(visits=np.full((2, 4), -1))),
     r"tree\.visits: expected counts >= 0, got -1 at \[0, 0\] \(.*\)\."),
    (STAR, star_step(None, np.array([0, 2])),
     r"leaves: expected a node in use, or -1 for none, got 2 at \[1\] \(.*\)\. Pass"),
    (STAR, star_step(None, np.array([0, 4])), r"leaves: expected a node in use, or -1 for none, got 4 at \[1\]"),
    (STAR, star_step(None, np.array([0])), r"leaves: expected shape \(2,\), got \(1,\)\. Match tree\.parents"),
    (STAR, star_step(None, None, np.zeros(2)), r"rollout_values: expected leaves too, got None for them\. Pass leaves"),
    (STAR, star_step(None, TWO, np.zeros(3)), r"rollout_values: expected shape \(2,\), got \(3,\)"),
    (STAR, star_step(None, None, None, np.array([-2, 0])), r"starts: expected a node in use, or -1 .*, got -2"),
    (STAR, star_step(None, None, None, None, np.array([0, -1])), r"roots: expected a node in use, got -1 at \[1\]"),
    (STAR, star_step(c=-1), "c: expected a number >= 0, got -1"),
    (STAR, star_step(alpha=1.5), "alpha: expected a number >= 0 and <= 1, got 1.5"),
    (STAR, star_step(unvisited_bonus=-0.1), "unvisited_bonus: expected a number >= 0, got -0.1"),
    (STAR, star_step(end_gate=float("nan")), "end_gate: expected a number, got nan"),
    (STAR, star_step(max_depth=-1), "max_depth: expected an integer >= 0, got -1"),
    (STAR, star_step(seed=-1), "seed: expected an integer >= 0 and <= 18446744073709551615, got -1"),
    (STAR, star_step(offset=-1), "offset: expected an integer >= 0 and <= 18446744073709551615, got -1"),
    (PUCT, puct_step(puct(logps=np.zeros((1, 4)))), r"tree\.logps: expected shape \(2, 4\), got \(1, 4\)"),
    (PUCT, puct_step(puct(parents=NEITHER)), r"tree\.parents: expected -1 or an earlier node .*, got 3 at \[0, 2\]"),
    (PUCT, puct_step(puct(visits=np.full((2, 4), -1))),
     r"tree\.visits: expected counts >= 0, got -1 at \[0, 0\]"),
    (PUCT, puct_step(puct(lengths=np.zeros((2, 4), int))), r"tree\.lengths: expected at least one token per node, got "
     r"0 at \[0, 1\] \(.*\)\. Correct it first"),
    (PUCT, puct_step(None, np.array([0, 2])),
     r"leaves: expected a node in use, or -1 for none, got 2 at \[1\]"),
    (PUCT, puct_step(None, None, np.array([9, 0])), r"starts: expected a node in use, or -1 for none, got 9 at \[0\]"),
    (PUCT, puct_step(None, None, None, np.array([0, 3])), r"roots: expected a node in use, got 3 at \[1\]"),
    (PUCT, puct_step(c_puct=-1), "c_puct: expected a number >= 0, got -1"),
    (PUCT, puct_step(gamma=1.1), "gamma: expected a number >= 0 and <= 1, got 1.1"),
    (PUCT, puct_step(length_penalty=-1), "length_penalty: expected a number >= 0, got -1"),
    (PUCT, puct_step(max_depth=-1), "max_depth: expected an integer >= 0, got -1"),
    (BACK, backtrack(p_unconfident=np.zeros(2)), r"p_unconfident: expected 2 dimension\(s\), got shape \(2,\)"),
    (BACK, backtrack(p_unconfident=np.full((2, 2), 1.5)), r"p_unconfident: expected probabilities from 0 to 1, got "
     r"1\.5 at \[0, 0\] \(.*\)\. Correct it first"),
    (BACK, backtrack(p_unconfident=np.full((2, 2), np.nan)), r"p_unconfident: expected probabilities .*, got nan at"),
    (BACK, backtrack(span_ends=np.zeros((2, 3), int)), r"span_ends: expected shape \(2, 2\), got \(2, 3\)\. Match"),
    (BACK, backtrack(span_ends=np.array([[5, 5], [3, -1]])), r"span_ends: expected rising positions inside the chunk, "
     r"then -1, got 5 at \[0, 1\]"),
    (BACK, backtrack(span_ends=np.array([[5, 8], [3, -1]])), r"span_ends: expected rising .*, got 8 at \[0, 1\]"),
    (BACK, backtrack(span_ends=np.array([[2, 5], [-1, 3]])), r"span_ends: expected rising .*, got 3 at \[1, 1\]"),
    (BACK, backtrack(span_ends=np.array([[2, 5], [3, -2]])), r"span_ends: expected rising .*, got -2 at \[1, 1\]"),
    (BACK, backtrack(chunk_lengths=np.array([8])), r"chunk_lengths: expected shape \(2,\), got \(1,\)"),
    (BACK, backtrack(chunk_lengths=np.array([8, -8]), span_ends=np.array([[2, 5], [-1, -1]])),
     r"chunk_lengths: expected counts of tokens >= 0, got -8 at \[1\]"),
    (BACK, backtrack(prefix_lengths=np.array([4, -1])), r"prefix_lengths: expected counts of tokens >= 0, got -1 at"),
    (BACK, backtrack(sentence_lengths=np.array([5, 0])), r"sentence_lengths: expected 0 to prefix_lengths, got 5"),
    (BACK, backtrack(state=BacktrackState.start(3)), r"state\.local_attempts: expected shape \(2,\), got \(3,\)"),
    (BACK, backtrack(tau=1.5), "tau: expected a number >= 0 and <= 1, got 1.5"),
    (BACK, backtrack(temperature=-1), "temperature: expected a number >= 0, got -1"),
    (BACK, backtrack(temperature_step=-1), "temperature_step: expected a number >= 0, got -1"),
    (BACK, backtrack(temperature_rise=-1), "temperature_rise: expected a number >= 0, got -1"),
    (BACK, backtrack(max_local_attempts=0), "max_local_attempts: expected an integer >= 1, got 0"),
    (BACK, backtrack(max_total_attempts=0), "max_total_attempts: expected an integer >= 1, got 0"),
    (BACK, lambda: BacktrackState.start(1, temperature=-1.0), "temperature: expected a number >= 0, got -1"),
    (VQ, table(np.zeros(3)), r"codebook: expected 2 dimension\(s\), got shape \(3,\)"),
    (VQ, table(np.full((3, 2), np.nan)),
     r"codebook: expected finite numbers below 1e150, got nan at \[0, 0\] \(.*\)\."),
    (VQ, table(np.full((3, 2), 1e160)), r"codebook: expected finite numbers below 1e150, got 1e\+160 at \[0, 0\]"),
    (VQ, table(np.zeros((3, 2)), k=3), "k: expected an integer >= 1 and <= 2, got 3"),
    (VQ, table(np.zeros((3, 2)), k=0), "k: expected an integer >= 1 and <= 2, got 0"),
]  # fmt: skip

TYPES: list[tuple[str, Callable[[], Any], str]] = [
    (BEAM, beams(Z.tolist()), r"logits: expected a NumPy, torch or CuPy array, got list\. Use numpy\.asarray"),
    (BEAM, beams(Z.astype(int)), r"logits: expected dtype float32, .*, got int64\. Convert it first"),
    (BEAM, beams(state=tuple(START)), r"state: expected BeamState, got tuple\. Use BeamState\.start"),
    (BEAM, beams(state=START._replace(scores=Z[:, :, 0])), r"state\.scores: expected dtype float64, got float32"),
    (BEAM, beams(torch.from_numpy(Z)), r"state\.scores: expected a torch array like logits, got numpy\. Convert"),
    (BEAM, beams(ref=Z.astype(np.float64)), r"ref_logits: expected dtype float32, got float64"),
    (BEAM, beams(eos_token_ids=1.5), r"eos_token_ids: expected an integer, got float"),
    (BEAM, lambda: BeamState.start(1, like=3), r"like: expected a NumPy, torch or CuPy array, got int"),
    (BEAM, lambda: BeamState.start(1.0), r"batch: expected an integer, got float"),  # type: ignore[arg-type]
    (STAR, star_step(tuple(star())), r"tree: expected StarTree, got tuple\. Use StarTree"),
    (STAR, star_step(star(parents=np.zeros((2, 4)))), r"tree\.parents: expected dtype int64, int32, got float64"),
    (STAR, star_step(star(values=np.zeros((2, 4), np.float16))), r"tree\.values: expected dtype float32, float64, got"),
    (STAR, star_step(star(visits=torch.zeros(2, 4, dtype=torch.int64))), r"tree\.visits: expected a numpy array like"),
    (STAR, star_step(None, [0, 1]), r"leaves: expected a NumPy, torch or CuPy array, got list"),
    (STAR, star_step(None, TWO.astype(float)), r"leaves: expected dtype int64, int32, got float64"),
    (STAR, star_step(None, TWO, TWO), r"rollout_values: expected dtype float32, .*, got int64"),
    (STAR, star_step(c="1"), r"c: expected a number >= 0, got str\. Pass a float"),
    (STAR, star_step(seed=1.0), r"seed: expected an integer, got float"),
    (PUCT, puct_step(star()), r"tree: expected PuctTree, got StarTree\. Use"),
    (PUCT, puct_step(puct(lengths=np.ones((2, 4)))), r"tree\.lengths: expected dtype int64, int32, got float64"),
    (PUCT, puct_step(max_depth=1.5), r"max_depth: expected an integer, got float"),
    (BACK, backtrack(p_unconfident=np.zeros((2, 2), int)), r"p_unconfident: expected dtype float32, .*, got int64"),
    (BACK, backtrack(span_ends=np.zeros((2, 2))), r"span_ends: expected dtype int64, int32, got float64"),
    (BACK, backtrack(state=3), r"state: expected BacktrackState, got int\. Use BacktrackState\.start"),
    (BACK, backtrack(sentence_lengths=torch.zeros(2).long()), r"sentence_lengths: expected a numpy array like p_un"),
    (VQ, table(np.zeros((3, 2), int)), r"codebook: expected dtype float32, .*, got int64"),
    (VQ, table(np.zeros((3, 2)), k=1.0), r"k: expected an integer, got float"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "call", "text"), VALUES)
def test_values(op: str, call: Callable[[], Any], text: str) -> None:
    with pytest.raises(ValueError, match=rf"^\[{op}\] {text}"):
        call()


@pytest.mark.parametrize(("op", "call", "text"), TYPES)
def test_types(op: str, call: Callable[[], Any], text: str) -> None:
    with pytest.raises(TypeError, match=rf"^\[{op}\] {text}"):
        call()


def test_arrays_that_cannot_be_updated() -> None:
    fixed = np.zeros((2, 4))
    fixed.flags.writeable = False
    with pytest.raises(
        ValueError,
        match=r"tree\.values: expected a writable array, got a read-only one\. Pass a copy",
    ):
        s.mcts_star_step(star(values=fixed))
    tree = star(values=torch.zeros(1, 4).expand(2, 4), visits=torch.zeros(2, 4).long())
    with pytest.raises(
        ValueError,
        match=r"tree\.values: expected every element to have its own memory, got an expanded array\. Pass",
    ):
        s.mcts_star_step(tree._replace(parents=torch.from_numpy(tree.parents)))


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_a_refused_call_changes_nothing(impl: str) -> None:
    for call, tree in ((s.mcts_star_step, star()), (s.puct_select_backup, puct())):
        before = [x.copy() for x in tree]
        with pytest.raises(ValueError, match="leaves"):
            call(tree, np.array([3, 3]), impl=impl)  # the first tree has a node 3
        for x, y in zip(tree, before):
            assert np.array_equal(x, y)


@pytest.mark.parametrize(
    "call",
    [
        lambda i: s.likelihood_beam_search(Z, START, impl=i),
        lambda i: s.mcts_star_step(star(), impl=i),
        lambda i: s.puct_select_backup(puct(), impl=i),
        lambda i: s.retrospective_backtrack(**chunk(), impl=i),
        lambda i: s.vq_neighbor_table(np.zeros((3, 2)), impl=i),
    ],
)
def test_an_impl_that_cannot_run_lists_every_reason(call: Callable[[str], Any]) -> None:
    with pytest.raises(NotImplementedError) as caught:
        call("cuda")
    text = str(caught.value)
    assert "float" in text or "int64" in text
    assert 'reference  available; pass impl="reference" to use it' in text
    assert "cuda       refused: this op has none" in text


def test_arrays_on_another_device_are_refused() -> None:
    meta: dict[str, Any] = {"device": "meta"}
    state = BeamState(*(torch.from_numpy(x).to("meta") for x in START))
    tree = StarTree(*(torch.from_numpy(x).to("meta") for x in star()))
    many = PuctTree(*(torch.from_numpy(x).to("meta") for x in puct()))
    parts = {k: torch.from_numpy(v).to("meta") for k, v in chunk().items() if k != "state"}
    counters = BacktrackState(*(torch.from_numpy(x).to("meta") for x in BacktrackState.start(2)))
    leaves = torch.zeros(2, dtype=torch.int64, **meta)
    for call in (
        lambda: s.likelihood_beam_search(torch.zeros(2, 3, 8, **meta), state),
        lambda: s.mcts_star_step(tree, leaves),
        lambda: s.puct_select_backup(many, leaves),
        lambda: s.retrospective_backtrack(**parts, state=counters),
        lambda: s.vq_neighbor_table(torch.zeros(3, 2, **meta)),
    ):
        with pytest.raises(NotImplementedError, match="cpu        refused: device meta"):
            call()
    with pytest.raises(
        ValueError, match=r"leaves: expected device cpu like tree\.parents, got meta\. Move it"
    ):
        s.mcts_star_step(StarTree(*(torch.from_numpy(x) for x in star())), leaves)


def test_checks_look_at_every_element_when_they_are_on(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = Z.copy()
    bad[1, 2, 3] = np.nan
    trees = star(values=np.full((2, 4), np.inf)), puct(logps=np.full((2, 4), np.nan))
    calls: list[tuple[Callable[[], Any], str]] = [
        (
            beams(bad),
            r"logits: expected logits below \+inf, got nan at \[1, 2, 3\] \(.*\)\. Unset HOTLOOP_CHECK to let it pass",
        ),
        (beams(Z, ref=bad), r"ref_logits: expected logits below \+inf, got nan at \[1, 2, 3\]"),
        (
            star_step(trees[0]),
            r"tree\.values: expected finite values, got inf at \[0, 0\] \(.*\)\. Unset HOTLOOP_CHECK",
        ),
        (puct_step(trees[1]), r"tree\.logps: expected finite values, got nan at \[0, 0\]"),
    ]
    for call, _ in calls:
        call()
    monkeypatch.setenv("HOTLOOP_CHECK", "1")
    for call, text in calls:
        with pytest.raises(ValueError, match=text):
            call()
