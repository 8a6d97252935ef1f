# SPDX-License-Identifier: Apache-2.0
"""``model.generate`` of transformers with our acceptance swapped in: its law, and that it is swapped out again."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs the peers extra")

from hotloop.integrations.transformers import hotloop_speculative_sampling  # noqa: E402
from processes import printed  # noqa: E402
from transformers import GenerationConfig  # noqa: E402
from transformers_cases import FALSE_ALARM, NEW, PEER, PROMPT, V, exact_law, p_value, sampling  # noqa: E402

pytestmark = PEER


def assisted(models: tuple[Any, Any], seed: int, **how: Any) -> torch.Tensor:
    target, draft = models
    torch.manual_seed(seed)
    return target.generate(
        PROMPT, assistant_model=draft, do_sample=True, top_k=0, max_new_tokens=NEW, **how
    )[0, 3:]


@pytest.fixture
def three_tokens(models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models[1].generation_config, "num_assistant_tokens", 3)


@pytest.mark.parametrize("verification", ["token", "block"])
def test_generate_of_transformers_keeps_its_law(models, three_tokens, verification):
    with hotloop_speculative_sampling(seed=5, verification=verification):
        tokens = torch.stack([assisted(models, i) for i in range(300)])
    # One call at a time: few enough that only the law of single tokens is worth a test.
    law = exact_law(models[0], sampling("plain")).reshape(V, V, V)
    warmer = exact_law(models[0], GenerationConfig(temperature=2.0)).reshape(V, V, V)
    for at, others in enumerate([(1, 2), (0, 2), (0, 1)]):
        assert p_value(tokens[:, at : at + 1], law.sum(others)) > FALSE_ALARM
    assert p_value(tokens[:, :1], warmer.sum((1, 2))) < 1e-6


@pytest.mark.parametrize("verification", ["token", "block"])
@pytest.mark.parametrize("told", ["right", "wrong"])
def test_the_swapped_function_keeps_the_law(verification, told):
    """Two drafted tokens of a chain, many times; what it leaves open is filled from the target's law."""
    draws = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 3, 3, generator=draws) * 1.5  # logits after each token
    new, n = [], 8192
    drafts = torch.zeros(n, 3, dtype=torch.long)
    for i in range(2):
        drafts[:, i + 1] = torch.multinomial(q[drafts[:, i]].softmax(-1), 1, generator=draws)[:, 0]
    rest = torch.multinomial(p.softmax(-1), n, replacement=True, generator=draws).T.tolist()
    said = q if told == "right" else q.flip(1)
    with hotloop_speculative_sampling(seed=5, verification=verification):
        verify = transformers.generation.utils._speculative_sampling
        for row, ids in enumerate(drafts[:, None]):
            tokens, kept = verify(ids, said[ids[:, :2]], 2, p[ids])
            assert tokens.shape == (1, int(kept) + 1)
            first, *more = tokens[0].tolist()
            new.append([first, *more, rest[row][first]][:2])
    step = p.double().softmax(-1)
    law = (step[0][:, None] * step).reshape(-1).numpy()
    found = p_value(torch.tensor(new), law, v=3)
    assert found > FALSE_ALARM if told == "right" else found < 1e-12


def test_generate_of_transformers_is_reproducible_and_restored(models, three_tokens):
    upstream = transformers.generation.utils
    theirs = upstream._speculative_sampling
    runs = []
    for _ in range(2):
        with hotloop_speculative_sampling(seed=5):
            assert upstream._speculative_sampling is not theirs
            runs.append([assisted(models, i).tolist() for i in range(8)])
        assert upstream._speculative_sampling is theirs
    assert runs[0] == runs[1]
    with pytest.raises(RuntimeError, match="mine"), hotloop_speculative_sampling():
        raise RuntimeError("mine")
    assert upstream._speculative_sampling is theirs


def test_each_verification_takes_new_draws(models):
    p = torch.full((1, 2, V), 0.0)
    q, ids = p[:, :1], torch.tensor([[3, 9]])
    with hotloop_speculative_sampling(seed=5):
        verify = transformers.generation.utils._speculative_sampling
        drawn = {int(verify(ids, q, 1, p)[0][0, -1]) for _ in range(64)}
    assert len(drawn) > 8


def test_ensemble_weight_moves_the_law(models):
    """w p + (1 - w) q where there is a draft, p after it."""
    z, w = torch.linspace(-2, 2, V).repeat(1, 2, 1), 0.25
    q = z[:, :1].flip(2)
    draft_ids = torch.multinomial(
        q[0].softmax(-1).expand(4000, -1), 1, generator=torch.Generator().manual_seed(0)
    )
    with hotloop_speculative_sampling(seed=5):
        verify = transformers.generation.utils._speculative_sampling
        first = [int(verify(x[None], q, 1, z.clone(), w)[0][0, 0]) for x in draft_ids]
    seen = np.bincount(first, minlength=V)
    law = 4000 * (w * z[0, 0].softmax(-1) + (1 - w) * q[0, 0].softmax(-1)).numpy()
    assert ((seen - law) ** 2 / law).sum() < 15 + 6 * math.sqrt(30)


def test_another_signature_is_refused(monkeypatch):
    monkeypatch.setattr(
        transformers.generation.utils, "_speculative_sampling", lambda candidate_input_ids: None
    )
    with (
        pytest.raises(NotImplementedError, match=r"transformers: expected generation\.utils"),
        hotloop_speculative_sampling(),
    ):
        pass


def test_logits_without_a_law():
    with hotloop_speculative_sampling():
        verify = transformers.generation.utils._speculative_sampling
        nan = torch.full((1, 2, V), torch.nan)
        with pytest.raises(
            ValueError, match=r"\[hotloop_speculative_sampling\] new_logits: expected"
        ):
            verify(torch.tensor([[1, 2]]), torch.zeros(1, 1, V), 1, nan)


def test_importing_changes_nothing():
    code = """
import transformers.generation.utils as u
before = dict(vars(u))
import hotloop.integrations.transformers
assert {k: v for k, v in vars(u).items() if before.get(k) is not v} == {}
"""
    printed(code, PYTHONWARNINGS="ignore")


def test_without_transformers_the_cure_is_named():
    code = """
import sys
sys.modules["transformers"] = None
try:
    import hotloop.integrations.transformers
except ImportError as error:
    print(error)
"""
    assert "expected transformers >= 5 to be installed, found none" in printed(code)


@pytest.mark.parametrize(
    ("how", "error", "text"),
    [
        ({"seed": -1}, ValueError, "seed: expected an integer >= 0"),
        ({"seed": "a"}, TypeError, "seed: expected an integer, got str"),
        ({"verification": "tree"}, ValueError, "verification: expected one of token, block"),
    ],
)
def test_errors_of_the_context(how, error, text):
    with pytest.raises(error, match=text), hotloop_speculative_sampling(**how):
        pass
