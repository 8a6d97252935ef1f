# SPDX-License-Identifier: Apache-2.0
"""Hugging Face generation with hotloop's sampler and hotloop's acceptance of drafted tokens, in batches.

``generate`` is a loop of its own; ``hotloop_speculative_sampling`` puts the acceptance into ``model.generate``.
Importing this module also enters the experts implementation "hotloop" into transformers' register, for
``model.set_experts_implementation("hotloop")``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

try:
    import transformers.generation.utils as _upstream
    from transformers import GenerationConfig
except ImportError as error:
    raise ImportError(
        "[hotloop] integrations.transformers: expected transformers >= 5 to be installed, found none. "
        "Install it with `pip install transformers`."
    ) from error

import torch
from torch import Tensor

from ..decode import (
    Logits,
    Probs,
    block_speculative_sampling,
    chain_speculative_sampling,
    greedy_speculative_accept,
    sample,
)
from ..front.check import array, choice, instance
from ..front.impl import Impl
from ..front.keywords import known
from . import _transformers_experts
from . import _transformers_settings as _settings
from ._transformers_decoder import Decoder, check_model, embedded
from ._transformers_keywords import hints

_transformers_experts.register()

__all__ = ["Generated", "generate", "hotloop_speculative_sampling"]

Verification = Literal["token", "block"]
VERIFICATIONS = get_args(Verification)
Stop = Callable[[Tensor, Any], Any]
_VERIFY: dict[str, Callable[..., Any]] = {
    "token": chain_speculative_sampling,
    "block": block_speculative_sampling,
}


class Generated(NamedTuple):
    """Generated sequences, R = B * num_return_sequences of them, and what they cost.

    ``sequences`` (R, P+N) int64: the prompt as it was given, then the new tokens, then padding.
    ``num_generated`` (R,) int64: new tokens of each, an end-of-text token included.
    ``logprobs`` (R, N) float32: log-probability of each new token under the law it follows (the target's, after
    temperature and truncation; 0 throughout if greedy), nats; 0 after them.
    ``target_calls`` (R,) int64: forward passes of the target that served the row, the prompt's included.
    ``num_drafted`` (R,) int64: draft tokens verified. ``num_accepted`` (R,) int64: those that are in the output.
    The counts are on the CPU.
    """

    sequences: Tensor
    num_generated: Tensor
    logprobs: Tensor
    target_calls: Tensor
    num_drafted: Tensor
    num_accepted: Tensor

    @property
    def tokens_per_call(self) -> float:
        """New tokens per forward pass of the target, over all rows; 1 without a draft."""
        return float(self.num_generated.sum()) / max(1, int(self.target_calls.sum()))

    @property
    def acceptance_rate(self) -> float:
        """Share of the draft tokens that are in the output, over all rows; 0 without a draft."""
        return float(self.num_accepted.sum()) / max(1, int(self.num_drafted.sum()))


@known(hints("Set it in generation_config: GenerationConfig({}={!r})."))
def generate(
    model: Any,
    input_ids: Tensor,
    generation_config: GenerationConfig | None = None,
    *,
    attention_mask: Tensor | None = None,
    assistant_model: Any = None,
    num_assistant_tokens: int | None = None,
    max_new_tokens: Any = None,
    verification: Verification = "token",
    stopping_criteria: Stop | Sequence[Stop] = (),
    seed: Any = None,
    impl: Impl = "auto",
) -> Generated:
    """Generate as ``model.generate`` does, greedily or by sampling, in batches, with a draft model too.

    Each step the draft proposes K tokens per row, the target looks at all of them in one forward pass, and every row
    keeps its own number of them. The law of what is generated is the target's, whatever the draft is. It differs from
    ``model.generate`` in the random numbers, in ties at a truncation threshold (all kept), and in that batches may be
    speculative. Rows that ended leave the batch. Only tokens that go into the output are looked at by
    ``stopping_criteria``, one by one, as without a draft.

    Args:
        model: a decoder of transformers (>= 5) whose forward takes a 2-D attention_mask, position_ids and
            past_key_values, with full or sliding attention in every layer; ``torch.compile(model)`` too. In evaluation
            mode for the call.
        input_ids: prompts (B, P), int64, padded on the left.
        generation_config: do_sample, temperature, top_k, top_p, min_p, max_new_tokens or max_length, eos_token_id,
            pad_token_id, num_return_sequences, num_assistant_tokens. What it leaves open is taken from
            ``model.generation_config``, then from the defaults of transformers: greedy, 20 new tokens, and, when
            sampling, top_k = 50. Anything else it asks for (beams, penalties, forbidden words) is refused.
        attention_mask: (B, P), 0 where a prompt is padded. None: inferred from pad_token_id as transformers does.
        assistant_model: the draft, same tokenizer, its law cut by the same numbers; None for plain decoding. Its
            vocabulary may have another size: missing tokens are never drafted, surplus ones neither.
        num_assistant_tokens: K >= 1 drafted per step. None: of generation_config, else of the draft's, else 4.
        max_new_tokens: an integer or (B,) int64, in place of the one in ``generation_config``.
        verification: "token" (chain_speculative_sampling) or "block" (block_speculative_sampling: at least as many
            tokens per call). Default "token".
        stopping_criteria: functions (input_ids (1, n), None) -> true to stop, such as those of transformers.
        seed: None: every call draws seeds from torch's CPU generator, so that ``torch.manual_seed`` rules them. A
            torch.Generator, from which it draws them instead; 0 to 2^64 - 1; or (B,) int64, one for each prompt: a
            request's draws then do not depend on the batch it is in. (Its logits do in their last digits: matrix
            products of another batch size round differently, which changes a token once in a long while.) They do
            depend on K, and, near the end, on max_new_tokens, beyond which nothing is drafted. Default None.
        impl: "auto", "cuda", "cpu" or "reference", for the ops of ``hotloop.decode``.

    Returns:
        ``Generated``: ``sequences`` (B * num_return_sequences, P+N) on the device of ``input_ids``, and counts.

    Raises:
        TypeError, ValueError: an argument of another type, dtype or shape, a keyword of ``model.generate`` that has
            another place here, padding on the right, a row of logits without a finite one, a token that the target
            has no embedding for.
        NotImplementedError: a model or a setting that cannot be served, named in the text; a forced ``impl`` that
            cannot run.

    Examples:
        >>> import torch
        >>> from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel
        >>> small = dict(vocab_size=16, n_positions=32, n_embd=8, n_head=2, bos_token_id=0, eos_token_id=None)
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, **small))
        >>> draft = GPT2LMHeadModel(GPT2Config(n_layer=1, **small))
        >>> settings = GenerationConfig(do_sample=True, temperature=0.8, top_k=8, max_new_tokens=5)
        >>> prompts = torch.tensor([[1, 2, 3], [4, 5, 6]])
        >>> done = generate(model, prompts, settings, assistant_model=draft, seed=torch.tensor([7, 8]))
        >>> done.sequences.shape, done.num_generated.tolist()
        (torch.Size([2, 8]), [5, 5])
        >>> alone = generate(model, prompts[1:], settings, assistant_model=draft, seed=torch.tensor([8]))
        >>> bool((alone.sequences == done.sequences[1:]).all())
        True

    Reference:
        Leviathan et al. 2023, arXiv:2211.17192, algorithm 1; Sun et al. 2024, arXiv:2403.10444 ("block").
    """
    op = "generate"
    choice(op, "verification", verification, VERIFICATIONS)
    check_model(op, "model", model)
    if assistant_model is not None:
        check_model(op, "assistant_model", assistant_model)
    _check_ids(op, input_ids, embedded(model))
    settings = _settings.read(
        op,
        model,
        generation_config,
        input_ids,
        max_new_tokens,
        assistant_model,
        num_assistant_tokens,
    )
    stops = [stopping_criteria] if callable(stopping_criteria) else list(stopping_criteria)
    if settings.pad is None and (stops or len(set(settings.limit.tolist())) > 1):
        raise ValueError(
            f"[{op}] generation_config.pad_token_id: expected one, for rows may end at different lengths, got None. "
            "Set it to tokenizer.pad_token_id."
        )
    pad = _settings.attention(op, input_ids, attention_mask, settings)
    seeds = _settings.row_seeds(op, seed, len(input_ids), settings.copies)
    prompts, pad = (x.repeat_interleave(settings.copies, 0) for x in (input_ids, pad))
    batch = _Batch(op, prompts, seeds, settings, stops, verification, impl)
    models = {"model": model, "assistant_model": assistant_model}
    given = {name: each for name, each in models.items() if each is not None}
    if len(prompts):
        with torch.no_grad(), _evaluating(list(given.values())):
            batch.run(*(Decoder(op, *each, input_ids.device, pad) for each in given.items()))
    return batch.done()


class _Batch:
    """The requests of a call. Book-keeping is on the CPU: a step brings its tokens there once."""

    def __init__(
        self,
        op: str,
        prompts: Tensor,
        seeds: Tensor,
        settings: _settings.Settings,
        stops: list[Stop],
        verification: Verification,
        impl: Impl,
    ) -> None:
        rows = len(prompts)
        self.op, self.prompts, self.seeds, self.settings = op, prompts, seeds, settings
        self.stops, self.verification, self.impl = stops, verification, impl
        longest = int(settings.limit.max()) if rows else 0
        self.tokens = torch.full((rows, longest), settings.pad or 0, device="cpu")
        self.logprobs = torch.zeros(rows, longest, dtype=torch.float32, device="cpu")
        self.count, self.calls, self.drafted, self.accepted = torch.zeros(
            4, rows, dtype=torch.int64, device="cpu"
        )

    def run(self, target: Decoder, draft: Decoder | None = None) -> None:
        device = self.prompts.device
        most = self.settings.assistant_tokens
        rows = torch.arange(len(self.prompts), device="cpu")  # of the requests still running
        fed = ahead = self.prompts  # what target and draft have not seen yet
        seeds = self.seeds.to(device)
        while True:
            lengths = (self.settings.limit - self.count)[rows].sub_(1).clamp_(max=most)
            k = int(lengths.max())
            # A block is rejected in view of all its draws: the next one must not meet any of them again. Token by
            # token, what follows a rejection was never looked at, and draws belong to positions.
            block = self.verification == "block"
            drawn = self.calls[rows] * (most + 1) if block else self.count[rows]
            draws = {"seed": seeds, "offset": drawn.to(device), "impl": self.impl}
            ids, laws = self._propose(draft, ahead, k, target.vocabulary, draws)
            logits = target.forward(torch.cat([fed, ids], 1), k + 1)
            if laws is not None:
                laws = self._as_wide(laws, logits)
            if draft is None:
                drew = sample(self.settings.law(logits), **draws)
                out, logps, kept = drew.token_ids, drew.logprobs, torch.zeros_like(rows)
            else:
                done = self._verify(laws, ids, logits, lengths, draws)
                out, logps, kept = done.output_token_ids, done.logprobs, done.num_accepted.cpu()
            going = self._store(rows, out.cpu(), logps.cpu(), kept, lengths)
            if len(going) == 0:
                return
            kept = kept[going]
            target.keep(going, k - kept)
            # The last two tokens of each row go to the draft: it has not seen the last one it proposed.
            seen = torch.cat([fed[:, -1:], out], 1)[going.to(device)]
            at = kept.to(device)[:, None]
            fed = seen.gather(1, at + 1)
            ahead = torch.cat([seen.gather(1, at), fed], 1)
            if draft is not None:
                draft.keep(going, k - kept)
            rows, seeds = rows[going], seeds[going.to(device)]

    def _as_wide(self, laws: Tensor, logits: Tensor) -> Tensor:
        """The draft's laws over the target's tokens, of which a padded lm_head has more than its configuration says."""
        if laws.shape[-1] > logits.shape[-1]:
            raise NotImplementedError(
                f"[{self.op}] model: expected logits of config.vocab_size = {laws.shape[-1]} tokens or more, got "
                f"{logits.shape[-1]}. Correct config.vocab_size."
            )
        return _fitted(laws, int(logits.shape[-1]))

    def _propose(
        self, draft: Decoder | None, ahead: Tensor, k: int, v: int, draws: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """Draft k tokens for every row: ids (R, k) and the logits they were drawn from, (R, k, V)."""
        ids, laws = [ahead[:, :0]], []
        for i in range(k if draft is not None else 0):
            assert draft is not None
            logits = _fitted(draft.forward(ahead, 1)[:, -1], v)
            drew = sample(self.settings.law(logits), **{**draws, "offset": draws["offset"] + i})
            ahead = drew.token_ids[:, None]
            ids.append(ahead)
            laws.append(logits)
        return torch.cat(ids, 1), torch.stack(laws, 1) if laws else None

    def _verify(
        self,
        laws: Tensor | None,
        ids: Tensor,
        logits: Tensor,
        lengths: Tensor,
        draws: dict[str, Any],
    ) -> Any:
        lengths, law = lengths.to(ids.device), self.settings.law
        if not self.settings.sampled:
            return greedy_speculative_accept(ids, logits, num_draft_tokens=lengths, impl=self.impl)
        proposed = None if laws is None else law(laws)
        verify = _VERIFY[self.verification]
        return verify(proposed, ids, law(logits), num_draft_tokens=lengths, **draws)

    def _store(
        self, rows: Tensor, out: Tensor, logps: Tensor, kept: Tensor, lengths: Tensor
    ) -> Tensor:
        """Append what each row emitted, up to where it ends; which rows go on, as indices into ``rows``."""
        lost = (out.gather(1, kept[:, None]) < 0).nonzero()
        if len(lost):
            row = int(rows[lost[0, 0]])
            raise ValueError(
                f"[{self.op}] model: expected a finite logit everywhere, got NaN, +inf or only -inf in row {row} "
                f"after {int(self.count[row])} new tokens. Look for NaN in the weights, or overflow of a half type."
            )
        columns = torch.arange(out.shape[1], device="cpu")
        emitted = kept + 1
        ends = torch.isin(out, self.settings.eos) & (columns < emitted[:, None])
        for i in range(len(rows)) if self.stops else ():
            stop = self._stopped(int(rows[i]), out[i, : int(emitted[i])])
            if stop is not None:
                ends[i, stop] = True
        ended = ends.any(1)
        emitted = torch.where(ended, ends.long().argmax(1) + 1, emitted)
        new = columns < emitted[:, None]
        into = (rows[:, None].expand_as(new)[new], (self.count[rows][:, None] + columns)[new])
        self.tokens[into] = out[new]
        self.logprobs[into] = logps[new]
        self.count[rows] += emitted
        self.calls[rows] += 1
        self.drafted[rows] += lengths
        self.accepted[rows] += torch.minimum(kept, emitted)
        going: Tensor = (~ended & (self.count[rows] < self.settings.limit[rows])).nonzero()[:, 0]
        return going

    def _stopped(self, row: int, tokens: Tensor) -> int | None:
        """Index of the first of these tokens after which a criterion stops the row."""
        before = self.tokens[row, : int(self.count[row])]
        text = torch.cat([self.prompts[row], torch.cat([before, tokens]).to(self.prompts.device)])
        start = len(text) - len(tokens) + 1
        for i in range(len(tokens)):
            # Criteria of transformers answer for every row of a batch; here it has one.
            if any(
                bool(torch.as_tensor(s(text[None, : start + i], None), device="cpu").any())
                for s in self.stops
            ):
                return i
        return None

    def done(self) -> Generated:
        device = self.prompts.device
        longest = int(self.count.max()) if len(self.count) else 0
        return Generated(
            torch.cat([self.prompts, self.tokens[:, :longest].to(device)], 1),
            self.count,
            self.logprobs[:, :longest].to(device),
            self.calls,
            self.drafted,
            self.accepted,
        )


def _check_ids(op: str, input_ids: Any, v: int) -> None:
    hint = "Pass tokenizer(..., return_tensors='pt').input_ids."
    instance(op, "input_ids", input_ids, Tensor, hint=hint)
    array(op, "input_ids", input_ids, ("int64",))
    if input_ids.ndim != 2 or input_ids.shape[1] < 1:
        raise ValueError(
            f"[{op}] input_ids: expected shape (B, P) with P >= 1, got {tuple(input_ids.shape)}."
        )
    if len(input_ids):
        low, high = (int(x) for x in input_ids.aminmax())
        if low < 0 or high >= v:
            raise ValueError(
                f"[{op}] input_ids: expected token ids from 0 to {v - 1}, got {low if low < 0 else high}."
            )


def _fitted(logits: Tensor, v: int) -> Tensor:
    """A draft's logits over the target's v tokens."""
    if logits.shape[-1] >= v:
        return logits[..., :v]
    return torch.nn.functional.pad(logits, (0, v - logits.shape[-1]), value=-torch.inf)


@contextmanager
def _evaluating(models: list[Any]) -> Iterator[None]:
    training = [m for model in models for m in model.modules() if m.training]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for m in training:
            m.training = True


_UPSTREAM = (
    "candidate_input_ids",
    "candidate_logits",
    "candidate_length",
    "new_logits",
    "assistant_ensemble_weight",
)


@known(hints("Pass it to model.generate, inside the block."))
@contextmanager
def hotloop_speculative_sampling(
    *, seed: Any = None, verification: Verification = "token", impl: Impl = "auto"
) -> Iterator[None]:
    """Let ``model.generate(assistant_model=...)`` accept drafted tokens with hotloop, inside a ``with`` block.

    While the block runs, ``transformers.generation.utils._speculative_sampling`` is ours; afterwards it is what it was.
    That function serves ``do_sample=True`` with an assistant that returns logits; everything else in ``generate``,
    drafting included, stays that of transformers, and so do its limits: one prompt at a time, and drafts drawn from
    torch's global generator (``torch.manual_seed``). The swap is one for the process: not for two threads at a time.

    Args:
        seed: 0 to 2^64 - 1, or None or a torch.Generator: drawn once when the block is entered, from torch's CPU
            generator or from the one given. Every verification in the block takes new draws, in order. Default None.
        verification: "token" or "block", as in ``generate``. Default "token".
        impl: "auto", "cuda", "cpu" or "reference", for the ops of ``hotloop.decode``.

    Raises:
        TypeError, ValueError: a seed or a verification out of range; inside the block, logits without a finite one.
        NotImplementedError: a version of transformers whose function takes other arguments.

    Examples:
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> small = dict(vocab_size=16, n_positions=32, n_embd=8, n_head=2, bos_token_id=0, eos_token_id=None)
        >>> model, draft = (GPT2LMHeadModel(GPT2Config(n_layer=n, **small)).eval() for n in (2, 1))
        >>> with hotloop_speculative_sampling(seed=1, verification="block"):
        ...     ids = model.generate(torch.tensor([[1, 2]]), assistant_model=draft, do_sample=True, max_new_tokens=6)
        >>> ids.shape
        torch.Size([1, 8])

    Reference:
        As ``generate``; assistant_ensemble_weight w, where set, makes the target's law w p + (1 - w) q
        (arXiv:2604.07622).
    """
    op = "hotloop_speculative_sampling"
    choice(op, "verification", verification, VERIFICATIONS)
    seed = _settings.one_seed(op, seed)
    theirs: Any = getattr(_upstream, "_speculative_sampling", None)
    found = tuple(inspect.signature(theirs).parameters) if callable(theirs) else None
    if found != _UPSTREAM:
        raise NotImplementedError(
            f"[{op}] transformers: expected generation.utils._speculative_sampling({', '.join(_UPSTREAM)}), got "
            f"{'no such function' if found is None else found}. Use hotloop.integrations.transformers.generate."
        )
    verify, drawn = _VERIFY[verification], 0

    def _speculative_sampling(
        candidate_input_ids: Tensor,
        candidate_logits: Tensor,
        candidate_length: int,
        new_logits: Tensor,
        assistant_ensemble_weight: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        nonlocal drawn
        target: Logits | Probs = Logits(new_logits)
        if assistant_ensemble_weight is not None:
            p, q = new_logits.softmax(-1), candidate_logits.softmax(-1)
            p[:, :-1] += (1.0 - assistant_ensemble_weight) * (q - p[:, :-1])
            target = Probs(p)
        done = verify(
            Logits(candidate_logits),
            candidate_input_ids[:, candidate_input_ids.shape[1] - candidate_length :],
            target,
            seed=seed,
            offset=drawn,
            impl=impl,
        )
        drawn += candidate_length + 1
        tokens = done.output_token_ids[:, : int(done.num_accepted[0]) + 1]
        if int(tokens[0, -1]) < 0:
            raise ValueError(
                f"[{op}] new_logits: expected a finite logit everywhere, got NaN, +inf or only -inf. "
                "Look for NaN in the weights, or overflow of a half type."
            )
        return tokens, done.num_accepted[0]

    _upstream._speculative_sampling = _speculative_sampling
    try:
        yield
    finally:
        _upstream._speculative_sampling = theirs
