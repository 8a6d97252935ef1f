# SPDX-License-Identifier: Apache-2.0
"""Beams, tree searches, backtracking and neighbours against brute force, hand examples and node-by-node programs."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from decode_calls import both, kinds, make
from helpers import assert_no_worse_than_torch, strided, with_threads
from hotloop.decode import ACTIONS, BacktrackState, BeamState
from hotloop.decode import search as s
from hotloop.decode.search import nearest_codes
from hypothesis import given, settings
from hypothesis import strategies as st

EOS = 0


def same(a: Any, b: Any, tolerance: float = 0.0) -> None:
    """Two results, field by field; floats within a tolerance, infinities in the same places."""
    for x, y in zip(a, b, strict=True):
        if isinstance(x, tuple):
            same(x, y, tolerance)
            continue
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype and x.shape == y.shape
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance)


class Model:
    """Next-token logits that depend on the whole prefix, the same for equal prefixes."""

    def __init__(self, vocabulary: int, seed: int, scale: float = 2.0) -> None:
        self.vocabulary, self.seed, self.scale = vocabulary, seed, scale

    def row(self, prefix: tuple[int, ...], dtype: Any = np.float64) -> np.ndarray:
        rng = np.random.default_rng((self.seed, *prefix))
        return (self.scale * rng.standard_normal(self.vocabulary)).astype(dtype)

    def logits(self, state: BeamState, dtype: Any = np.float64) -> np.ndarray:
        tokens = np.maximum(np.asarray(state.token_ids), 0)
        return np.array(
            [[self.row((b, *map(int, t)), dtype) for t in ids] for b, ids in enumerate(tokens)]
        )

    def logps(self, prefix: tuple[int, ...]) -> np.ndarray:
        z = self.row(prefix)
        return z - z.max() - np.log(np.exp(z - z.max()).sum())


def run(
    model: Any, batch: int, width: int, steps: int, impl: str = "cpu", **options: Any
) -> BeamState:
    state = BeamState.start(batch, width)
    for _ in range(steps):
        state = s.likelihood_beam_search(model.logits(state), state, impl=impl, **options)
    return state


@both
def test_one_beam_is_greedy(impl: str) -> None:
    model = Model(7, 1)
    state = run(model, 3, 1, 6, impl)
    for b in range(3):
        prefix: tuple[int, ...] = ()
        for _ in range(6):
            prefix = (*prefix, int(model.row((b, *prefix)).argmax()))
        assert state.token_ids[b, 0].tolist() == list(prefix)


@both
@pytest.mark.parametrize("seed", range(5))
def test_enough_beams_find_the_most_likely_sequence(impl: str, seed: int) -> None:
    vocabulary, steps, model = 3, 4, Model(3, seed)
    found = run(model, 2, vocabulary ** (steps - 1), steps, impl, eos_token_ids=EOS).best()
    for b in range(2):
        everything = {}
        for length in range(1, steps + 1):
            for ids in itertools.product(range(vocabulary), repeat=length):
                if EOS in ids[:-1] or (length < steps and ids[-1] != EOS):
                    continue
                everything[ids] = sum(model.logps((b, *ids[:t]))[v] for t, v in enumerate(ids))
        ranked = sorted(everything.items(), key=lambda item: -item[1])
        for i in range(5):
            n = int(found.lengths[b, i])
            assert tuple(found.token_ids[b, i, :n].tolist()) == ranked[i][0]
            assert found.scores[b, i] == pytest.approx(ranked[i][1], abs=1e-12)
            assert (found.token_ids[b, i, n:] == -1).all()


@both
def test_ranking_by_likelihood_is_ranking_by_return_and_soft_value(impl: str) -> None:
    """beta * score = sum of (r + beta log pi_ref) + V(s_n) - V(s_0) for the optimal soft policy."""
    vocabulary, horizon, beta = 3, 4, 0.7
    rewards, ref = Model(vocabulary, 5), Model(vocabulary, 6)

    def action_values(prefix: tuple[int, ...]) -> np.ndarray:
        steps = rewards.row(prefix) + beta * ref.logps(prefix)
        return steps + np.array([value((*prefix, a)) for a in range(vocabulary)])

    def value(prefix: tuple[int, ...]) -> float:
        if len(prefix) == horizon + 1:
            return 0.0
        return float(beta * np.log(np.exp(action_values(prefix) / beta).sum()))

    class Optimal(Model):
        def row(self, prefix: tuple[int, ...], dtype: Any = np.float64) -> np.ndarray:
            return action_values(prefix) / beta

    for steps in range(1, horizon + 1):
        state = run(Optimal(vocabulary, 0), 1, 4, steps, impl)
        for score, ids in zip(state.scores[0], state.token_ids[0]):
            path = tuple(int(v) for v in ids)
            if score == -np.inf:
                continue
            gain = sum(
                rewards.row((0, *path[:t]))[a] + beta * ref.logps((0, *path[:t]))[a]
                for t, a in enumerate(path)
            )
            assert beta * score == pytest.approx(gain + value((0, *path)) - value((0,)), abs=1e-9)


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore::Warning")
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("k", [2, 5])
def test_hugging_face_beam_search_without_length_penalty(family: str, k: int) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(k)
    ends = [3, 7]
    common = {"vocab_size": 12, "bos_token_id": 1, "eos_token_id": ends, "pad_token_id": 11}
    if family == "gpt2":
        config = transformers.GPT2Config(
            n_embd=32, n_layer=2, n_head=2, initializer_range=0.6, **common
        )
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            initializer_range=0.6, **common,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    model = model.double().eval()
    prompt = torch.tensor([[5, 9, 2], [8, 8, 4], [1, 6, 10]])
    steps, width = 12, prompt.shape[1]
    with torch.no_grad():
        theirs = model.generate(
            prompt, num_beams=k, do_sample=False, length_penalty=0.0, max_new_tokens=steps, early_stopping=False,
            num_return_sequences=k, return_dict_in_generate=True, output_scores=True, attention_mask=prompt * 0 + 1,
        )  # fmt: skip
        state = BeamState.start(3, k, like=prompt)
        for _ in range(steps):
            tokens = torch.cat(
                (prompt[:, None].expand(3, k, width), state.token_ids.clamp(min=0)), dim=2
            )
            logits = model(tokens.reshape(3 * k, -1)).logits[:, -1].reshape(3, k, -1)
            state = s.likelihood_beam_search(logits, state, eos_token_ids=ends)
            if bool(state.done.all()):
                break
    best = state.best()
    ids, lengths = best.token_ids.reshape(3 * k, -1), best.lengths.reshape(-1)
    for row, n, expected in zip(
        ids.tolist(), lengths.tolist(), theirs.sequences[:, width:].tolist()
    ):
        assert row[:n] == expected[:n] and set(expected[n:]) <= {11}
    torch.testing.assert_close(
        best.scores.reshape(-1).float(), theirs.sequences_scores.float(), rtol=1e-5, atol=1e-5
    )
    assert bool((best.lengths < steps).any()), (
        "no beam ended: the test would not see how ends are treated"
    )


SIZES = [1, 2, 15, 16, 17, 511, 512, 513, 1021, 5000]
"""One token; lanes of 16 and chunks of 512, one less and one more; a prime; several chunks."""


@pytest.mark.parametrize("vocabulary", SIZES)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("with_ref", [False, True])
def test_beams_agree_with_the_reference(vocabulary: int, dtype: str, with_ref: bool) -> None:
    g = torch.Generator().manual_seed(vocabulary)
    ours = theirs = BeamState.start(3, 4, like=torch.empty(0))
    for step in range(4):
        pair = 3 * torch.randn(2, 3, 1 if step == 0 else 4, vocabulary, generator=g)
        logits, ref = pair.to(getattr(torch, dtype))
        ref = ref if with_ref else None
        options: dict[str, Any] = {"eos_token_ids": (0, vocabulary // 2)}
        ours = s.likelihood_beam_search(logits, ours, ref, impl="cpu", **options)
        theirs = s.likelihood_beam_search(logits, theirs, ref, impl="reference", **options)
        same(ours, theirs, 1e-5 if dtype != "float64" else 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scores_are_as_good_as_torchs_log_softmax(dtype: torch.dtype) -> None:
    logits = (5 * torch.randn(8, 1, 3000, generator=torch.Generator().manual_seed(0))).to(dtype)
    found = s.likelihood_beam_search(logits, BeamState.start(8, 50, like=logits))
    at = found.next_token_ids[:, None]
    truth = torch.log_softmax(logits.double(), -1).gather(2, at)[:, 0]
    plain = torch.log_softmax(logits, -1).gather(2, at)[:, 0]
    assert_no_worse_than_torch(found.scores, plain, truth, k=1.0)


@both
def test_laws_of_a_beam_search(impl: str) -> None:
    model = Model(9, 3)
    state = BeamState.start(4, 5)
    for _ in range(6):
        before, logits = state, model.logits(state)
        kept = [np.copy(x) for x in before]
        state = s.likelihood_beam_search(logits, before, eos_token_ids=(0, 4), impl=impl)
        same(tuple(before), tuple(kept))
        shifted = logits + np.linspace(-30, 30, 5)[None, :, None]
        again = s.likelihood_beam_search(shifted, before, eos_token_ids=(0, 4), impl=impl)
        same(state, again, 1e-11)
        assert (np.diff(np.where(np.isinf(state.scores), -1e9, state.scores)) <= 0).all()
        assert (
            np.diff(np.where(np.isinf(state.finished_scores), -1e9, state.finished_scores)) <= 0
        ).all()
        for b in range(4):
            live = [
                tuple(t)
                for t, x in zip(state.token_ids[b].tolist(), state.scores[b])
                if x > -np.inf
            ]
            assert len(set(live)) == len(live)
            assert not any(v in (0, 4) for t in live for v in t)
            if not before.done[b]:
                for i, x in enumerate(state.scores[b]):
                    if x > -np.inf:
                        source = state.beam_indices[b, i]
                        assert x <= before.scores[b, source]
                        assert (
                            state.token_ids[b, i, :-1].tolist()
                            == before.token_ids[b, source].tolist()
                        )
                        assert state.token_ids[b, i, -1] == state.next_token_ids[b, i]


@both
def test_a_request_that_is_done_stays_as_it_is(impl: str) -> None:
    ends = np.log(np.array([[[0.9, 0.06, 0.04]]]))
    state = s.likelihood_beam_search(ends, BeamState.start(1, 1), eos_token_ids=EOS, impl=impl)
    assert bool(state.done[0]) and state.finished_lengths.tolist() == [[1]]
    later = s.likelihood_beam_search(
        np.full((1, 1, 3), np.nan), state, eos_token_ids=EOS, impl=impl
    )
    assert later.best().token_ids.tolist() == [[[0, -1]]]
    same(later.best()[1:], state.best()[1:])
    # Until k beams have ended, or one that lives is still better, the search goes on.
    state = s.likelihood_beam_search(ends, BeamState.start(1, 2), eos_token_ids=EOS, impl=impl)
    assert not bool(state.done[0])
    # Scores with a reference can rise: only the end of all beams is the end.
    state = s.likelihood_beam_search(
        ends, BeamState.start(1, 1), ends * 0, eos_token_ids=EOS, impl=impl
    )
    assert not bool(state.done[0])


@both
def test_rows_without_a_law_have_no_children(impl: str) -> None:
    state = s.likelihood_beam_search(np.zeros((1, 1, 4)), BeamState.start(1, 3), impl=impl)
    assert state.token_ids.tolist() == [[[0], [1], [2]]]  # equal logits: lower ids first
    z = np.zeros((1, 3, 4))
    z[0, 0], z[0, 1, 2] = -np.inf, np.inf
    z[0, 2] = [np.nan, 1.0, -np.inf, 0.0]
    found = s.likelihood_beam_search(z, state, impl=impl)
    assert found.token_ids.tolist() == [[[2, 1], [2, 3], [-1, -1]]]
    assert found.scores[0, 2] == -np.inf and found.next_token_ids[0, 2] == 0
    assert not bool(found.done[0])
    dead = s.likelihood_beam_search(np.full((1, 3, 4), -np.inf), state, impl=impl)
    assert bool(dead.done[0]) and dead.best().lengths.tolist() == [[-1, -1, -1]]


@both
def test_a_token_the_reference_rules_out_is_left_out(impl: str) -> None:
    ref = np.array([[[-np.inf, 0.0, 0.0]]])
    found = s.likelihood_beam_search(np.zeros((1, 1, 3)), BeamState.start(1, 3), ref, impl=impl)
    assert found.token_ids[0, :, 0].tolist() == [1, 2, -1]
    assert found.scores[0, :2] == pytest.approx(math.log(2 / 3))


@kinds
@both
def test_beams_take_any_strides_and_an_empty_batch(kind: str, impl: str) -> None:
    rng = np.random.default_rng(0)
    z = rng.standard_normal((2, 3, 40)).astype(np.float32)
    state = s.likelihood_beam_search(
        make(kind, z[:, :1]), BeamState.start(2, 3, like=make(kind, z)), impl=impl
    )
    plain = s.likelihood_beam_search(make(kind, z), state, impl=impl)
    assert type(plain.scores).__module__.startswith(kind)
    odd = strided(torch.from_numpy(z)) if kind == "torch" else np.repeat(z, 2, axis=2)[:, :, ::2]
    turned = make(kind, z.transpose(2, 1, 0))
    for other in (odd, turned.permute(2, 1, 0) if kind == "torch" else turned.transpose(2, 1, 0)):
        same(s.likelihood_beam_search(other, state, impl=impl), plain)
    none = s.likelihood_beam_search(
        make(kind, z[:0]), BeamState.start(0, 3, like=make(kind, z)), impl=impl
    )
    assert tuple(none.token_ids.shape) == (0, 3, 1)
    assert tuple(none.best().scores.shape) == (0, 3)


def test_threads_do_not_change_beams() -> None:
    z = torch.randn(6, 4, 40000, generator=torch.Generator().manual_seed(0))
    start = BeamState.start(6, 4, like=z)
    one, two = (with_threads(n, lambda: s.likelihood_beam_search(z, start)) for n in (1, 2))
    same(one, two)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 6),
    st.integers(0, 2**32),
    st.booleans(),
    st.booleans(),
)
def test_random_beams_agree_with_the_reference(
    batch: int, width: int, vocabulary: int, seed: int, coarse: bool, with_ref: bool
) -> None:
    """Coarse logits have many exact ties, within a row and across rows."""
    rng = np.random.default_rng(seed)
    ours = theirs = BeamState.start(batch, width)
    for _ in range(3):
        z, ref = rng.standard_normal((2, batch, width, vocabulary)) * 2
        if coarse:
            z, ref = np.round(z), np.round(ref)
        z[rng.random(z.shape) < 0.1] = -np.inf
        eos = (int(rng.integers(vocabulary)),)
        options = {"ref_logits": ref if with_ref else None, "eos_token_ids": eos}
        ours = s.likelihood_beam_search(z, ours, impl="cpu", **options)
        theirs = s.likelihood_beam_search(z, theirs, impl="reference", **options)
        # Sums of exponentials in another order may part scores that are equal: then the tokens may differ.
        np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-12)
        np.testing.assert_allclose(ours.finished_scores, theirs.finished_scores, atol=1e-12)
        theirs = ours


def neighbors_by_brute_force(codebook: np.ndarray, k: int) -> list[list[int]]:
    e = codebook.astype(np.float64)
    found = []
    for i in range(len(e)):
        squared = [
            (sum((a - b) * (a - b) for a, b in zip(e[i].tolist(), x)), j)
            for j, x in enumerate(e.tolist())
        ]
        found.append([j for _, j in sorted(squared) if j != i][:k])
    return found


@kinds
@both
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_neighbors_are_those_of_brute_force(kind: str, impl: str, dtype: str) -> None:
    rng = np.random.default_rng(1)
    codebook = rng.standard_normal((67, 5)).astype(dtype)
    codebook[40:44] = codebook[3]  # codes that died together
    for k in (None, 1, 20, 66):
        table = s.vq_neighbor_table(make(kind, codebook), k=k, impl=impl)
        assert type(table).__module__.startswith(kind) and str(table.dtype).endswith("int32")
        assert table.tolist() == neighbors_by_brute_force(codebook, 66 if k is None else k)
    if kind == "numpy":
        wide = np.repeat(codebook, 2, axis=1)[:, ::2]
        assert s.vq_neighbor_table(wide, impl=impl).tolist() == neighbors_by_brute_force(
            codebook, 66
        )


@pytest.mark.parametrize(
    "case", ["random", "grid", "normalised", "offset", "tiny", "huge", "bfloat16"]
)
def test_many_neighbors_agree_with_the_reference(case: str) -> None:
    """Sizes at which a sample bounds the candidates; grids tie exactly, offsets and scales strain the products."""
    rng = np.random.default_rng(2)
    codebook = rng.standard_normal((2500, 6)).astype(np.float32)
    if case == "grid":
        codebook = np.round(codebook * 2)
    elif case == "normalised":
        codebook /= np.linalg.norm(codebook, axis=1, keepdims=True)
    elif case == "offset":
        codebook += 1000.0
    elif case in ("tiny", "huge"):
        codebook *= np.float32(1e-24 if case == "tiny" else 1e24)
    given: Any = codebook if case != "bfloat16" else torch.from_numpy(codebook).bfloat16()
    theirs = np.asarray(s.vq_neighbor_table(given, k=1000, impl="reference"))
    for k in (1, 64, 1000):
        ours = np.asarray(s.vq_neighbor_table(given, k=k, impl="cpu"))
        assert np.array_equal(ours, theirs[:, :k])
    assert not (ours == np.arange(len(ours))[:, None]).any()
    assert all(len(set(row)) == k for row in ours.tolist())


@both
def test_neighbors_of_few_codes(impl: str) -> None:
    for codes in (0, 1):
        assert s.vq_neighbor_table(np.zeros((codes, 3)), impl=impl).shape == (codes, 0)
    assert s.vq_neighbor_table(np.zeros((3, 0)), impl=impl).tolist() == [[1, 2], [0, 2], [0, 1]]
    assert s.vq_neighbor_table(np.full((1200, 1), 7.0), impl=impl).shape == (1200, 1000)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 40), st.integers(1, 4), st.integers(0, 2**32), st.booleans())
def test_random_neighbors_agree_with_the_reference(
    codes: int, dim: int, seed: int, coarse: bool
) -> None:
    rng = np.random.default_rng(seed)
    codebook = rng.standard_normal((codes, dim)).astype(np.float32)
    codebook = np.round(codebook) if coarse else codebook
    k = int(rng.integers(1, codes))
    ours, theirs = (s.vq_neighbor_table(codebook, k=k, impl=i) for i in ("cpu", "reference"))
    assert np.array_equal(ours, theirs)


def test_products_in_small_tiles_give_the_same_table(monkeypatch: pytest.MonkeyPatch) -> None:
    codebook = np.random.default_rng(3).standard_normal((300, 4))
    whole = s.vq_neighbor_table(codebook, k=9)
    monkeypatch.setattr(nearest_codes, "TILE_BYTES", 7 * 300 * 8)
    assert np.array_equal(s.vq_neighbor_table(codebook, k=9), whole)


class Scripted:
    """The authors' loop around one answer, with phrases that fail as often as the script says."""

    def __init__(self, chunks: list[list[tuple[int, float]]], lengths: list[int]) -> None:
        self.chunks, self.lengths = chunks, lengths

    def run(
        self, tau: float, t0: float, local_limit: int, total_limit: int
    ) -> list[tuple[Any, ...]]:
        kept, correcting, local, temperature, trace = 0, False, 0, t0, []
        for attempt, (chunk, length) in enumerate(zip(self.chunks, self.lengths)):
            if attempt == total_limit:
                break
            temperature = temperature if correcting else t0
            chunk = chunk[:1] if correcting else chunk
            bad = [i for i, (_, p) in enumerate(chunk) if p > tau]
            last = attempt + 1 == total_limit
            if not bad and not correcting:
                trace.append(("accept", kept + length, t0))
                break
            if not bad:
                kept += chunk[0][0] + 1 if chunk else length
                correcting, local, temperature, what = False, 0, t0, "continue"
            else:
                correcting, local = True, local + 1
                temperature = min(temperature + 0.05, t0 + 0.5)
                if local == local_limit:
                    kept, local, what = kept // 2, 0, "cut"  # the scripted sentence ends half-way
                else:
                    kept += chunk[bad[0] - 1][0] + 1 if bad[0] > 0 else 0
                    what = "resample"
            trace.append(("stop" if last else what, kept, temperature))
        return trace


@both
@pytest.mark.parametrize("seed", range(12))
def test_backtracking_follows_the_authors_loop(impl: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    chunks, lengths = [], []
    for _ in range(60):
        ends = np.sort(rng.choice(np.arange(1, 40), size=int(rng.integers(0, 4)), replace=False))
        chunks.append([(int(e), float(rng.random() < 0.6) * 0.5) for e in ends])
        lengths.append(int(ends[-1] + 2 if len(ends) else 3))
    local, total = int(rng.integers(1, 5)), int(rng.integers(1, 40))
    expected = Scripted(chunks, lengths).run(0.1, 0.4, local, total)
    state, kept, got = BacktrackState.start(1, temperature=0.4), 0, []
    names = {v: k for k, v in ACTIONS.items()}
    for chunk, length in zip(chunks, lengths):
        p, ends = np.zeros((1, 4), np.float32), np.full((1, 4), -1)
        for i, (e, x) in enumerate(chunk):
            ends[0, i], p[0, i] = e, x
        done = s.retrospective_backtrack(
            p, ends, np.array([length]), np.array([kept]), np.array([kept // 2]), state, tau=0.1, temperature=0.4,
            max_local_attempts=local, max_total_attempts=total, impl=impl,
        )  # fmt: skip
        state, kept = done.state, int(done.kept_lengths[0])
        got.append((names[int(done.actions[0])], kept, float(state.temperatures[0])))
        if bool(state.done[0]):
            break
    assert got == expected
    n = [np.array([x]) for x in (length, kept, 0)]
    again = s.retrospective_backtrack(p, ends, *n, state, temperature=0.4, impl=impl)
    assert (int(again.actions[0]), int(again.kept_lengths[0])) == (ACTIONS["none"], kept)
    same(again.state, state)


@both
@kinds
def test_thresholds_at_their_ends(impl: str, kind: str) -> None:
    p = make(kind, np.array([[0.2, 1.0], [0.5, 0.5], [0.0, 0.0]]))
    ends = make(kind, np.array([[2, 5], [3, -1], [-1, -1]]))
    n = [make(kind, np.array(x)) for x in ([8, 8, 8], [10, 20, 30], [0, 0, 0])]
    never = s.retrospective_backtrack(
        p, ends, *n, BacktrackState.start(3, like=p), tau=1.0, impl=impl
    )
    assert never.actions.tolist() == [ACTIONS["accept"]] * 3
    assert never.kept_lengths.tolist() == [18, 28, 38]
    always = s.retrospective_backtrack(
        p, ends, *n, BacktrackState.start(3, like=p), tau=0.0, impl=impl
    )
    assert always.flagged.tolist() == [0, 0, -1]
    assert always.kept_lengths.tolist() == [10, 20, 38]
    assert always.state.temperatures.tolist() == [1.05, 1.05, 1.0]
    none = s.retrospective_backtrack(
        p[:0], ends[:0], *(x[:0] for x in n), BacktrackState.start(0, like=p), impl=impl
    )
    assert tuple(none.actions.shape) == (0,)
