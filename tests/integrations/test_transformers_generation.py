# SPDX-License-Identifier: Apache-2.0
"""Generation with transformers: the law of plain sampling, the tokens of plain greedy decoding, in ragged batches."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs the peers extra")

from hotloop import decode  # noqa: E402
from hotloop.integrations import transformers as ours  # noqa: E402
from hotloop.integrations.transformers import generate  # noqa: E402
from transformers import GenerationConfig  # noqa: E402
from transformers_cases import (  # noqa: E402
    FALSE_ALARM,
    NEW,
    PEER,
    PROMPT,
    ROWS,
    SAMPLING,
    V,
    continuations,
    cut,
    exact_law,
    p_value,
    ragged,
    sampling,
)

pytestmark = PEER


@pytest.mark.parametrize("name", SAMPLING)
@pytest.mark.parametrize(
    "how",
    [
        {"assistant_model": None},
        {"verification": "token"},
        {"verification": "block"},
        # Several steps for three tokens: what a step learns of its draws must not reach the next one.
        {"verification": "block", "num_assistant_tokens": 3, "max_new_tokens": 6},
    ],
    ids=["sample", "token", "block", "long-block"],
)
def test_the_law_is_that_of_plain_sampling(models, name, how):
    config = sampling(name)
    tokens = continuations(models, config, seed=11, **how)
    assert p_value(tokens, exact_law(models[0], config)) > FALSE_ALARM


@pytest.fixture
def wrong_draft_law(monkeypatch: pytest.MonkeyPatch) -> None:
    """The verifier is told of a draft that sampled at another temperature than it did."""
    right = decode.chain_speculative_sampling

    def wrong(draft: Any, *args: Any, **kwargs: Any) -> Any:
        return right(draft and replace(draft, temperature=1.4), *args, **kwargs)

    monkeypatch.setitem(ours._VERIFY, "token", wrong)


def test_a_wrong_draft_law_is_found_out(models, wrong_draft_law):
    config = sampling("plain")
    assert p_value(continuations(models, config, seed=11), exact_law(models[0], config)) < 1e-12


def three_token_model(seed: int) -> Any:
    """Random laws over three tokens: a draft of another seed is right about half of the time."""
    config = transformers.GPT2Config(
        vocab_size=3,
        n_positions=32,
        n_embd=16,
        n_layer=1,
        n_head=2,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
        model.transformer.wpe.weight.zero_()
    return model


@pytest.mark.parametrize("draws", ["new", "met twice"])
def test_a_block_takes_new_draws(monkeypatch, draws):
    """Were a block's draws those of its positions, the next block would meet draws that the last one failed by."""
    target, draft = three_token_model(0), three_token_model(1)
    config, prompt, new = sampling("plain"), torch.tensor([[0, 2, 1]]), 4
    verification = "block"
    if draws == "met twice":
        monkeypatch.setitem(ours._VERIFY, "token", decode.block_speculative_sampling)
        verification = "token"
    done = generate(
        target,
        prompt.expand(ROWS, -1),
        config,
        assistant_model=draft,
        num_assistant_tokens=5,
        max_new_tokens=new + 5,
        verification=verification,
        seed=11,
    )
    p = p_value(done.sequences[:, 3 : 3 + new], exact_law(target, config, prompt, new), v=3)
    assert p > FALSE_ALARM if draws == "new" else p < 1e-12


def test_another_temperature_is_found_out(models):
    tokens = continuations(models, sampling("plain"), seed=11)
    warmer = exact_law(models[0], GenerationConfig(temperature=1.1))
    assert p_value(tokens, warmer) < 1e-12


@pytest.mark.parametrize("k", [1, 4, 7])
@pytest.mark.parametrize("rows", [1, 5])
def test_greedy_is_plain_greedy(models, rows, k):
    target, draft = models
    ids, mask = ragged(rows)
    plain = target.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=24, pad_token_id=0
    )
    how = {"attention_mask": mask, "max_new_tokens": 24}
    assert torch.equal(generate(target, ids, **how).sequences, plain)
    done = generate(target, ids, **how, assistant_model=draft, num_assistant_tokens=k)
    assert torch.equal(done.sequences, plain)
    assert done.num_generated.tolist() == [24] * rows


def random_model(kind: str, seed: int) -> Any:
    """Large random weights, so that no two logits are close, and a draft that is wrong most of the time."""
    common = {
        "vocab_size": V,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    layers = ["sliding_attention", "full_attention"]
    configs = {
        "llama": lambda: transformers.LlamaConfig(**common),
        "mistral": lambda: transformers.MistralConfig(**common, sliding_window=5),
        "gemma3": lambda: transformers.Gemma3TextConfig(
            **common, sliding_window=5, layer_types=layers
        ),
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(configs[kind]())
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(4 if p.ndim > 1 else 1)
    return model.eval()


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3"])
def test_greedy_with_rotary_positions_and_sliding_windows(kind):
    """Windows of five tokens, shorter than the text: a rejected token must not push one out."""
    target, draft = random_model(kind, 1), random_model(kind, 2)
    nearly = copy.deepcopy(target)
    with torch.no_grad():
        for p in nearly.parameters():
            p.add_(0.03 * torch.randn(p.shape, generator=torch.Generator().manual_seed(4)))
    ids, mask = ragged()
    plain = target.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=20)
    for assistant in (draft, nearly):
        done = generate(
            target, ids, attention_mask=mask, max_new_tokens=20, assistant_model=assistant
        )
        assert torch.equal(done.sequences, plain)
    assert len(set(done.target_calls.tolist())) > 1  # the rows did not go in step


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gpt2", "mistral"])
def test_both_caches_hold_the_text_after_rejections(models, monkeypatch, kind):
    """The logits that reach the verifier are those of the whole text without a cache, the draft's too."""
    target, draft = models if kind == "gpt2" else (random_model(kind, 1), random_model(kind, 2))
    right, calls = decode.chain_speculative_sampling, []

    def recorded(law: Any, ids: Any, target_law: Any, **how: Any) -> Any:
        done = right(law, ids, target_law, **how)
        for row, seed in enumerate(how["seed"].tolist()):
            rows = (law.values[row], ids[row], target_law.values[row]) if law else None
            calls.append((seed, int(how["offset"][row]), rows))
        return done

    monkeypatch.setitem(ours._VERIFY, "token", recorded)
    ids, mask = ragged()
    done = generate(
        target,
        ids,
        sampling("plain", max_new_tokens=24),
        attention_mask=mask,
        assistant_model=draft,
        seed=torch.arange(5),
    )
    assert len(set(done.target_calls.tolist())) > 1  # the rows did not go in step
    assert len(calls) == int(done.target_calls.sum())
    for row, offset, values in calls:
        if values is None:
            continue
        before = done.sequences[row, int((1 - mask[row]).sum()) : 6 + offset]
        law, drafted, target_law = values
        text = torch.cat([before, drafted])[None]
        k = len(drafted)
        torch.testing.assert_close(
            law, draft(input_ids=text).logits[0, -k - 1 : -1], rtol=1e-3, atol=1e-3
        )
        torch.testing.assert_close(
            target_law, target(input_ids=text).logits[0, -k - 1 :], rtol=1e-3, atol=1e-3
        )


@pytest.mark.gpu
def test_on_a_gpu_the_same_law(models):
    """Not the same tokens: logits of another device differ in their last digits, which moves a draw now and then."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    ids, mask = ragged()
    target, draft = (copy.deepcopy(m).cuda() for m in models)
    here = generate(models[0], ids, attention_mask=mask, assistant_model=models[1])
    there = generate(target, ids.cuda(), attention_mask=mask.cuda(), assistant_model=draft)
    assert torch.equal(here.sequences, there.sequences.cpu())
    config = sampling("cut")
    drawn = generate(
        target,
        PROMPT.cuda().expand(ROWS, -1),
        config,
        assistant_model=draft,
        num_assistant_tokens=2,
        max_new_tokens=NEW,
        seed=3,
    )
    tokens = drawn.sequences[:, PROMPT.shape[1] :].cpu()
    assert p_value(tokens, exact_law(models[0], config)) > FALSE_ALARM


@pytest.mark.parametrize("verification", ["token", "block"])
def test_fewer_target_calls_than_tokens(models, verification):
    target, draft = models
    ids, mask = ragged(32)
    done = generate(
        target,
        ids,
        sampling("plain", max_new_tokens=40),
        attention_mask=mask,
        assistant_model=draft,
        verification=verification,
        seed=2,
    )
    assert done.tokens_per_call > 3
    assert 0.6 < done.acceptance_rate < 1
    # Every call adds the tokens it accepted and one of the target's own.
    assert torch.equal(done.num_generated, done.num_accepted + done.target_calls)
    assert bool((done.num_drafted <= 4 * done.target_calls).all())


def test_a_draft_that_is_the_target_is_accepted_whole(models):
    target, _ = models
    done = generate(target, PROMPT, max_new_tokens=20, assistant_model=target)
    assert done.target_calls.tolist() == [4]
    assert done.num_accepted.tolist() == [16]


@pytest.mark.parametrize("assisted", [False, True], ids=["plain", "assisted"])
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
def test_rows_end_at_the_first_end_of_text(models, assisted, do_sample):
    target, draft = models
    ids, mask = ragged(8)
    how = {
        "attention_mask": mask,
        "assistant_model": draft if assisted else None,
        "seed": torch.arange(8),
    }
    common = {"do_sample": do_sample, "top_k": 0, "max_new_tokens": 16}
    whole = generate(target, ids, GenerationConfig(**common), **how)
    new = whole.sequences[:, ids.shape[1] :]
    eos = [int(new[0, 5]), int(new[3, 2])]
    done = generate(
        target, ids, GenerationConfig(**common, eos_token_id=eos, pad_token_id=0), **how
    )
    for row, tokens in enumerate(new.tolist()):
        ends = [i for i, t in enumerate(tokens) if t in eos]
        n = ends[0] + 1 if ends else 16
        assert int(done.num_generated[row]) == n
        found = done.sequences[row, ids.shape[1] :].tolist()
        assert found == tokens[:n] + [0] * (len(found) - n)
        assert bool((done.logprobs[row, n:] == 0).all())
    assert done.sequences.shape[1] == ids.shape[1] + int(done.num_generated.max())
    if not do_sample:
        theirs = target.generate(
            ids, attention_mask=mask, max_new_tokens=16, eos_token_id=eos, pad_token_id=0
        )
        assert torch.equal(done.sequences, theirs)


def test_logprobs_are_those_of_the_law(models):
    target, draft = models
    config = sampling("cut", max_new_tokens=12)
    ids, mask = ragged()
    for assistant in (None, draft):
        done = generate(target, ids, config, attention_mask=mask, assistant_model=assistant, seed=5)
        for row in range(len(ids)):
            text = done.sequences[row][int((1 - mask[row]).sum()) :][None]
            with torch.no_grad():
                law = cut(target(input_ids=text).logits[0, :-1], config).log()
            expected = law.gather(1, text[0, 1:, None])[-12:, 0]
            torch.testing.assert_close(done.logprobs[row].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("verification", ["token", "block"])
def test_a_request_is_its_seed_and_nothing_else(models, verification):
    target, draft = models
    ids, mask = ragged()
    seeds = torch.tensor([5, 1, 2**62, 7, -3])
    how = {
        "generation_config": sampling("cut", max_new_tokens=16),
        "assistant_model": draft,
        "verification": verification,
    }
    together = generate(target, ids, attention_mask=mask, seed=seeds, **how).sequences
    order = torch.tensor([3, 0, 4, 2, 1])
    moved = generate(target, ids[order], attention_mask=mask[order], seed=seeds[order], **how)
    assert torch.equal(moved.sequences, together[order])
    for row in range(5):
        start = int((1 - mask[row]).sum())
        alone = generate(target, ids[row : row + 1, start:], seed=seeds[row : row + 1], **how)
        assert torch.equal(alone.sequences[0], together[row, start:])
    again = generate(target, ids, attention_mask=mask, seed=seeds.numpy(), **how).sequences
    assert torch.equal(again, together)
    other = generate(target, ids, attention_mask=mask, seed=seeds + 1, **how).sequences
    assert not torch.equal(other, together)


def test_lengths_of_each_row(models):
    target, draft = models
    ids, mask = ragged()
    config = sampling("plain", pad_token_id=0)
    how = {"attention_mask": mask, "assistant_model": draft, "seed": torch.arange(5)}
    lengths = torch.tensor([1, 9, 4, 2, 16])
    done = generate(target, ids, config, max_new_tokens=lengths, **how)
    full = generate(target, ids, config, max_new_tokens=16, **how)
    assert done.num_generated.tolist() == lengths.tolist()
    for row, n in enumerate(lengths.tolist()):
        # Nothing is drafted for a row's last token, which is then another draw of the same law.
        assert torch.equal(done.sequences[row, : 5 + n], full.sequences[row, : 5 + n])
        assert not done.sequences[row, 6 + n :].any()


def test_stopping_criteria_see_one_token_after_the_other(models):
    target, draft = models
    ids, mask = ragged()
    config = sampling("plain", max_new_tokens=16, pad_token_id=0)
    how = {"attention_mask": mask, "assistant_model": draft, "seed": 9}
    full = generate(target, ids, config, **how).sequences[:, 6:]

    class SumReached(transformers.StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return input_ids[:, 6:].sum(1) >= 30

    done = generate(target, ids, config, stopping_criteria=[SumReached()], **how)
    for row in range(5):
        n = int((full[row].cumsum(0) < 30).sum()) + 1
        assert int(done.num_generated[row]) == min(n, 16)
        assert torch.equal(done.sequences[row, 6 : 6 + n], full[row, :n])
    at_once = generate(target, ids, config, stopping_criteria=lambda ids, scores: True, **how)
    assert at_once.num_generated.tolist() == [1] * 5


def test_several_sequences_of_each_prompt(models):
    target, draft = models
    ids, mask = ragged(2)
    config = sampling("plain", num_return_sequences=3, max_new_tokens=12)
    how = {"attention_mask": mask, "assistant_model": draft}
    one = generate(target, ids, config, seed=4, **how).sequences
    assert one.shape == (6, 18)
    assert torch.equal(one[:, :6], ids.repeat_interleave(3, 0))
    assert len({tuple(row) for row in one[:, 6:].tolist()}) == 6
    each = generate(target, ids, config, seed=torch.tensor([4, 5]), **how).sequences
    swapped = generate(
        target, ids.flip(0), config, seed=torch.tensor([5, 4]),
        attention_mask=mask.flip(0), assistant_model=draft,
    ).sequences  # fmt: skip
    assert torch.equal(swapped[3:], each[:3])


def test_settings_of_the_model_are_honoured(models):
    target, draft = (copy.deepcopy(m) for m in models)
    target.generation_config = GenerationConfig(
        do_sample=True, temperature=0.5, top_k=2, max_new_tokens=7, pad_token_id=0
    )
    draft.generation_config.num_assistant_tokens = 2
    done = generate(target, PROMPT, assistant_model=draft, seed=1)
    same = GenerationConfig(do_sample=True, temperature=0.5, top_k=2, num_assistant_tokens=2)
    explicit = generate(
        models[0], PROMPT, same, max_new_tokens=7, assistant_model=models[1], seed=1
    )
    assert torch.equal(done.sequences, explicit.sequences)
    assert torch.equal(done.num_drafted, explicit.num_drafted)
    greedy = generate(target, PROMPT, GenerationConfig(do_sample=False))
    assert torch.equal(greedy.sequences, target.generate(PROMPT, do_sample=False))
    # The default of transformers: twenty new tokens; max_length counts the prompt.
    assert generate(models[0], PROMPT).num_generated.tolist() == [20]
    assert generate(models[0], PROMPT, GenerationConfig(max_length=9)).num_generated.tolist() == [6]


def test_padding_is_inferred_where_transformers_infers_it(models):
    target, draft = models
    ids, mask = ragged()
    for eos in (None, 15):
        config = GenerationConfig(max_new_tokens=10, pad_token_id=0, eos_token_id=eos)
        masked = generate(target, ids, config, attention_mask=mask, assistant_model=draft)
        assert torch.equal(generate(target, ids, config).sequences, masked.sequences)
    unmasked = GenerationConfig(max_new_tokens=10, pad_token_id=0, eos_token_id=0)
    assert torch.equal(
        generate(target, ids, unmasked).sequences,
        target.generate(ids, max_new_tokens=10, pad_token_id=0, eos_token_id=0),
    )


@pytest.mark.parametrize("size", [12, 20])
def test_a_draft_of_another_vocabulary(models, size):
    """Tokens the draft does not know are never drafted, those the target does not know neither."""
    draft = copy.deepcopy(models[1])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draft.resize_token_embeddings(size)
    config = sampling("plain")
    tokens = continuations((models[0], draft), config, seed=11)
    assert p_value(tokens, exact_law(models[0], config)) > FALSE_ALARM


def test_half_precision_and_another_dtype_of_the_draft(models):
    target, draft = copy.deepcopy(models[0]).bfloat16(), models[1]
    ids, mask = ragged()
    how = {"attention_mask": mask, "max_new_tokens": 12, "assistant_model": draft, "seed": 1}
    done = generate(target, ids, sampling("cut"), **how)
    assert bool((done.sequences < V).all()) and bool((done.sequences >= 0).all())
    assert done.tokens_per_call > 1


def test_every_implementation_generates_the_same(models):
    target, draft = models
    ids, mask = ragged(3)
    how = {"attention_mask": mask, "assistant_model": draft, "seed": 3}
    config = sampling("cut", max_new_tokens=8)
    for verification in ours.VERIFICATIONS:
        runs = [
            generate(target, ids, config, verification=verification, impl=impl, **how).sequences
            for impl in ("cpu", "reference")
        ]
        assert torch.equal(*runs)


def test_modules_are_left_as_they_were(models):
    target, draft = (copy.deepcopy(m) for m in models)
    target.train()
    target.transformer.h[0].eval()
    before = [m.training for m in target.modules()]
    done = generate(target, PROMPT, max_new_tokens=6, assistant_model=draft)
    assert [m.training for m in target.modules()] == before
    assert torch.equal(done.sequences, models[0].generate(PROMPT, max_new_tokens=6))
    assert not done.logprobs.requires_grad
    assert all(p.grad is None for p in target.parameters() if p.requires_grad)


def test_an_empty_batch(models):
    done = generate(models[0], PROMPT[:0], assistant_model=models[1])
    assert done.sequences.shape == (0, 3)
    assert (done.tokens_per_call, done.acceptance_rate) == (0.0, 0.0)
