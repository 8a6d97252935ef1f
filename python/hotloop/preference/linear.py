# SPDX-License-Identifier: Apache-2.0
"""Every loss of this room in one call from hidden states, over the fused lm_head.

A loss is described by its roles: the answers it compares, in the order in which their rows stand in the batch.
The arguments of a loss function follow from its signature: ``policy_<role>_logps`` is the sum over the tokens of
that answer, ``ref_<role>_logps`` the reference's, ``<role>_lengths`` the number of tokens; everything else comes
from ``options``. A new loss needs a line in ``FORMS`` only if its roles are not (chosen, rejected).
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..front import check
from ..front.declare import OPS, parameters
from ..front.impl import Impl
from ..front.keywords import known
from ..logprob import _arguments, _statistics
from ..logprob._call import LogitMap
from ..logprob.lm_head import IGNORE_INDEX, linear_logprob
from ..unlearn.losses import npo_loss
from . import multi_term, optimistic, pairs, reference_free, squared, unpaired
from .metrics import preference_metrics

PAIR = ("chosen", "rejected")
PLAIN = LogitMap()


@dataclass
class Form:
    """How a loss is fed from a batch of answers."""

    function: Callable[..., Tensor]
    roles: tuple[str, ...] = PAIR
    tokens: bool = False  # wants log-probabilities per token, (rows, tokens), and not their sums
    means: bool = False  # wants means over tokens and not sums
    nll: str = (
        "never"  # chosen_nll, a mean over tokens; or "always", or the option that asks for it
    )
    lengths: str = "required"  # or the option that asks for them
    # Read from the signature once, here: torch.compile cannot take a default that it met in a signature before.
    parameters: tuple[str, ...] = field(init=False)
    required: frozenset[str] = field(init=False)
    beta: float = field(init=False)

    def __post_init__(self) -> None:
        found = inspect.signature(self.function).parameters
        missing = inspect.Parameter.empty
        beta = found["beta"].default if "beta" in found else None
        self.parameters = tuple(found)
        self.required = frozenset(n for n, p in found.items() if p.default is missing)
        self.beta = beta if isinstance(beta, float) else 0.1


# What a loss is fed, where that is not (chosen, rejected) and their sums.
_SPECIAL: dict[str, Form] = {
    "dno": Form(pairs.dno_loss, ("1", "2")),
    "drift_iterative_dpo": Form(pairs.drift_iterative_dpo_loss, ("fresh", "dissatisfied")),
    "ipo": Form(squared.ipo_loss, lengths="length_normalized"),
    "online_ipo": Form(squared.online_ipo_loss, ("1", "2"), lengths="length_normalized"),
    "sppo": Form(squared.sppo_loss, ("",)),
    "srpo": Form(
        squared.srpo_loss,
        (
            "chosen_given_rejected",
            "rejected_given_chosen",
            "rejected_given_rejected",
            "chosen_given_chosen",
            "chosen",
            "rejected",
        ),
    ),
    "kto": Form(unpaired.kto_loss, ("",)),
    "bco": Form(unpaired.bco_loss, ("",)),
    "orpo": Form(reference_free.orpo_loss, means=True, nll="always"),
    "cpo": Form(reference_free.cpo_loss, nll="always", lengths="length_normalized"),
    "simpo": Form(reference_free.simpo_loss, nll="cpo_alpha"),
    "cpl": Form(reference_free.cpl_loss, ("1", "2"), tokens=True),
    "xpo": Form(optimistic.xpo_loss, (*PAIR, "ref_sample")),
    "vpo": Form(optimistic.vpo_loss, (*PAIR, "calibration")),
    "selm": Form(optimistic.selm_loss, (*PAIR, "generated")),
    "hypo": Form(optimistic.hypo_loss, (*PAIR, "online")),
    "rpo_sft": Form(optimistic.rpo_sft_loss, lengths="alpha"),
    "opa_dpo": Form(
        multi_term.opa_dpo_loss,
        ("truth", "revised", "original", "truth_masked", "revised_masked"),
        tokens=True,
    ),
    "npo": Form(npo_loss, ("",), lengths="length_normalized"),
}


def _forms() -> dict[str, Form]:
    """Every declared loss of chosen and rejected answers, and the special ones, by name without ``_loss``."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name != "linear":
            importlib.import_module(f"{__package__}.{module.name}")
    pairs_of_answers = [
        op.function
        for op in OPS.values()
        if op.room == "preference" and "policy_chosen_logps" in parameters(op.function)
    ]
    plain = {f.__name__.removesuffix("_loss"): Form(f) for f in pairs_of_answers}
    return plain | _SPECIAL


FORMS = _forms()
LOSSES = tuple(FORMS)

# Names of other libraries that are not ours.
ELSEWHERE = {
    "sigmoid": 'loss="dpo"',
    "hinge": 'loss="slic_hinge"',
    "kto_pair": 'loss="kto"',
    "nca_pair": 'loss="nca"',
    "robust": 'loss="robust_dpo"',
    "cdpo": 'loss="conservative_dpo"',
    "sigmoid_norm": 'loss="dpo_norm"',
    "aot_pair": 'loss="aot"',
    "aot_unpaired": 'loss="aot" with options={"paired": False}',
    "apo_zero": 'loss="apo"',
    "apo_down": 'loss="apo" with options={"variant": "down"}',
    "apo_zero_unpaired": 'loss="kto" with options={"kl": 0.0, "is_desirable": ...}',
    "alphapo": 'loss="cpo" with options={"alpha": ..., "length_normalized": True}',
    "sft": "hotloop.logprob.linear_cross_entropy",
    "discopop": "a function of your own",
}

_OP = "linear_preference_loss"
_HINTS = {
    "shift": "Pass shift_labels=True for labels as Hugging Face stores them.",
    "loss_type": "Pass it as loss.",
    "reduction": "The loss is a mean over the answers.",
} | {
    name: f"Arguments of the loss go into options: options={{{name!r}: ...}}."
    for form in FORMS.values()
    for name in form.parameters
    if name not in ("reduction", "impl")
}


@known(_HINTS)
def linear_preference_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    loss: str | Callable[..., Tensor] = "dpo",
    bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    logit: LogitMap | None = None,
    options: Mapping[str, Any] | None = None,
    ignore_index: int = IGNORE_INDEX,
    shift_labels: bool = False,
    impl: Impl = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    """A preference loss from hidden states and an lm_head, with a bounded part of the logits in memory.

    Rows of the batch are answers, grouped by role: for a pair loss the n chosen answers first, then the n
    rejected ones. The log-probability of an answer is the sum over its labels that are not ``ignore_index``;
    prompt and padding never reach the matrix product.

    Args:
        hidden: shape (answers, T, D), or (tokens, D) with ``cu_seqlens``. Differentiable.
        weight: the lm_head, shape (V, D). Differentiable.
        labels: shape (answers, T) or (tokens,); ``ignore_index`` on prompt and padding. Labels of Hugging Face are not
            shifted: see ``shift_labels``.
        loss: a name from ``hotloop.preference.LOSSES``, or your own function of (policy_chosen_logps,
            policy_rejected_logps, ref_chosen_logps, ref_rejected_logps), each (n,), that returns a scalar or one
            value per pair; without a reference the last two are None. Default "dpo".
        bias: shape (V,). Differentiable. Default None.
        ref_logps: the reference's log-probability of each answer, shape (answers,), or per token in the shape of
            ``labels``, each at the position of the hidden state that predicts it. Where both shapes are the same
            (as many packed tokens as answers) it is one per answer. Default None.
        ref_hidden: hidden states under the reference, instead of ``ref_logps``; no gradient.
        ref_weight: its lm_head; default ``weight``, without gradient.
        ref_bias: its bias.
        cu_seqlens: offsets (answers + 1,) of packed answers. Default None.
        logit: ``hotloop.logprob.LogitMap`` with temperature, logit_scale and softcap, of policy and reference.
            Default none of them.
        options: further arguments of the loss function by name, such as {"beta": 0.1}.
            {"length_normalized": True} passes lengths to ipo, online_ipo, cpo and npo.
        ignore_index: label of tokens that do not count. Default -100.
        shift_labels: labels stand beside their own tokens, as Hugging Face stores them: position t is asked about
            labels[t + 1], and the last one of every answer about nothing. Default False: already shifted.
        impl: of the lm_head: "auto", "cpu", "triton" or "reference". Default "auto".

    Returns:
        The loss, a scalar, and metrics under TRL's names, detached scalars: logps/chosen, logps/rejected,
        rewards/chosen, rewards/rejected, rewards/margins, rewards/accuracies (docs/metrics.md).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype, device or range, the number of
            answers does not fit the roles, a reference is missing, or an option is unknown.

    Examples:
        >>> import torch
        >>> h, w, y = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 3, dtype=torch.int64)
        >>> loss, metrics = linear_preference_loss(h, w, y, ref_hidden=h)
        >>> round(float(loss), 4), float(metrics["rewards/margins"])
        (0.6931, 0.0)

    Reference:
        Each loss names its paper.
    """
    form = _form(loss)
    extra = _extra(loss, options)
    if logit is None:
        logit = PLAIN
    else:
        hint = "Pass LogitMap(temperature=..., logit_scale=..., softcap=...)."
        check.instance(_OP, "logit", logit, LogitMap, hint=hint)
        _arguments.logit_map(_OP, logit.temperature, logit.logit_scale, logit.softcap)
    if shift_labels is not False:
        offsets = None
        if cu_seqlens is not None:
            shape = check.tensor(_OP, "labels", labels).shape
            offsets = _arguments.cu_seqlens(_OP, cu_seqlens, shape[0], labels.device)
        labels = _arguments.shifted(_OP, labels, ignore_index, shift_labels, offsets)
    answers = functools.partial(
        _answers, labels=labels, cu_seqlens=cu_seqlens, logit=logit, ignore_index=ignore_index, tokens=form.tokens,
        impl=impl,
    )  # fmt: skip
    policy, lengths = answers(hidden, weight, bias)
    counts = _counts(form, policy.shape[0], extra)
    if ref_hidden is None:
        for name, unused in (("ref_weight", ref_weight), ("ref_bias", ref_bias)):
            if unused is not None:
                raise ValueError(
                    f"[{_OP}] {name}: expected None without ref_hidden, got a value. Pass ref_hidden, or leave it out."
                )
        reference = _given(policy, labels, ref_logps, cu_seqlens, ignore_index, form.tokens)
    elif ref_logps is not None:
        raise ValueError(
            f"[{_OP}] ref_hidden: expected None beside ref_logps, got both. Pass one of them."
        )
    else:
        with torch.no_grad():
            head = weight if ref_weight is None else check.tensor(_OP, "ref_weight", ref_weight)
            reference = answers(ref_hidden, head.detach(), ref_bias)[0]
    split = policy.split(counts)
    split_ref = None if reference is None else reference.split(counts)
    split_lengths = lengths.split(counts)
    if callable(loss):
        refs = (None, None) if split_ref is None else (split_ref[0], split_ref[1])
        value = check.tensor(_OP, "loss", loss(split[0], split[1], *refs))
        value = value.mean() if value.ndim else value
    else:
        arguments = _bind(loss, form, split, split_ref, split_lengths, extra)
        value = form.function(**arguments)
    beta = extra.get("beta", form.beta)
    beta = float(beta) if isinstance(beta, (int, float)) else 0.1
    metrics = _metrics(form, split, split_ref, split_lengths, extra, beta)
    return value, metrics


def _form(loss: str | Callable[..., Tensor]) -> Form:
    if callable(loss):
        return FORMS["dpo"]  # fed as a pair
    if not isinstance(loss, str) or loss not in FORMS:
        hint = ""
        if isinstance(loss, str) and loss.removesuffix("_loss") in FORMS:
            hint = f' Pass loss="{loss.removesuffix("_loss")}".'
        elif isinstance(loss, str) and loss in ELSEWHERE:
            verb = "Pass" if "loss=" in ELSEWHERE[loss] else "Use"
            hint = f" {verb} {ELSEWHERE[loss]}."
        raise ValueError(
            f"[{_OP}] loss: expected a function or one of {', '.join(LOSSES)}, got {loss!r}.{hint}"
        )
    return FORMS[loss]


def _counts(form: Form, answers: int, extra: Mapping[str, Any]) -> list[int]:
    """Rows of each role; HyPO's online samples come several per prompt."""
    shares = [1] * len(form.roles)
    if "online" in form.roles:
        shares[-1] = int(extra.get("num_samples", 2))
    if answers % sum(shares):
        names = ", ".join(r or "answers" for r in form.roles)
        raise ValueError(
            f"[{_OP}] hidden: expected a number of answers divisible by {sum(shares)} (roles {names}), got {answers}. "
            "Stack the answers role after role."
        )
    return [answers // sum(shares) * share for share in shares]


def _answers(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    logit: LogitMap,
    ignore_index: int,
    tokens: bool,
    impl: Impl,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the answers, (answers,) or (answers, T), and their lengths (answers,)."""
    if check.tensor(_OP, "hidden", hidden).ndim != (3 if cu_seqlens is None else 2):
        raise ValueError(
            f"[{_OP}] hidden: expected shape (answers, tokens, width), or (tokens, width) with cu_seqlens, got "
            f"{tuple(hidden.shape)}."
        )
    rows = linear_logprob(
        hidden, weight, labels, bias=bias, temperature=logit.temperature, logit_scale=logit.logit_scale,
        softcap=logit.softcap, ignore_index=ignore_index, impl=impl,
    ).logps  # fmt: skip
    valid = labels != ignore_index
    if cu_seqlens is None:
        lengths = valid.sum(-1)
        return (_left_aligned(rows, valid) if tokens else rows.sum(-1)), lengths
    if tokens:
        raise ValueError(
            f"[{_OP}] cu_seqlens: expected padded answers for a loss per token, got packed ones."
        )
    offsets = _arguments.cu_seqlens(_OP, cu_seqlens, rows.shape[0], rows.device)
    return _statistics.sequence_sums(rows, offsets), _statistics.sequence_sums(
        valid.long(), offsets
    )


def _left_aligned(rows: Tensor, valid: Tensor) -> Tensor:
    """Move the tokens that count to the front of their row, so that position 0 is the first of the answer."""
    order = torch.argsort((~valid).to(torch.uint8), dim=-1, stable=True)
    return rows.gather(-1, order)


def _given(
    policy: Tensor,
    labels: Tensor,
    ref_logps: Tensor | None,
    cu_seqlens: Tensor | None,
    ignore_index: int,
    tokens: bool,
) -> Tensor | None:
    """The reference's log-probabilities, passed per answer or per token, in the shape of ``policy``."""
    if ref_logps is None:
        return None
    ref_logps = check.float_tensor(_OP, "ref_logps", ref_logps).detach()
    if ref_logps.shape == policy.shape and not tokens:
        return ref_logps
    if ref_logps.shape != labels.shape:
        per_answer = "" if tokens else f" {tuple(policy.shape)}, one per answer, or"
        raise ValueError(
            f"[{_OP}] ref_logps: expected shape{per_answer} {tuple(labels.shape)}, one per label, got "
            f"{tuple(ref_logps.shape)}."
        )
    valid = labels != ignore_index
    ref_logps = torch.where(valid, ref_logps, 0.0)
    if cu_seqlens is not None:
        return _statistics.sequence_sums(ref_logps, cu_seqlens.long())
    return _left_aligned(ref_logps, valid) if tokens else ref_logps.sum(-1)


def _extra(loss: Any, options: Any) -> dict[str, Any]:
    if options is None:
        return {}
    check.instance(_OP, "options", options, Mapping, hint="Name the arguments of the loss.")
    extra = {str(name): value for name, value in options.items()}
    if extra and callable(loss):
        raise ValueError(
            f"[{_OP}] options: expected None beside a loss of your own, got {', '.join(extra)}. Use functools.partial."
        )
    return extra


def _bind(
    loss: str,
    form: Form,
    policy: tuple[Tensor, ...],
    reference: tuple[Tensor, ...] | None,
    lengths: tuple[Tensor, ...],
    extra: dict[str, Any],
) -> dict[str, Any]:
    """Arguments of the loss function by name."""
    parameters = form.parameters

    def known_as(*names: str) -> str | None:
        return next((name for name in names if name in parameters), None)

    wants_lengths = form.lengths == "required" or bool(extra.get(form.lengths, False))
    extra.pop("length_normalized", None)
    arguments: dict[str, Any] = {}
    for i, role in enumerate(form.roles):
        tail = f"_{role}" if role else ""
        values = policy[i]
        if form.means:
            values = values / lengths[i].clamp(min=1)
        if ratio := known_as(f"{role}_logratios"):
            arguments[ratio] = values - _needed(loss, reference)[i]
        if name := known_as(f"policy{tail}_logps", f"policy_logps{tail}", f"segment_logps{tail}"):
            arguments[name] = values
        if ref_name := known_as(f"ref{tail}_logps", f"ref_logps{tail}"):
            if reference is not None:
                arguments[ref_name] = reference[i]
            elif ref_name in form.required:
                _needed(loss, reference)
        length_name = known_as(f"{role}_lengths", f"lengths{tail}", "sequence_lengths")
        if length_name and wants_lengths:
            arguments[length_name] = lengths[i].to(values.dtype)
    if form.nll == "always" or form.nll in extra:
        # No token that counts is a likelihood of nothing: the term is 0, and so is its gradient.
        mean = -policy[0].sum() / lengths[0].sum().clamp(min=1)
        arguments["chosen_nll"] = mean.expand(policy[0].shape[0])
    options = [name for name in parameters if name not in ("reduction", "impl")]
    unknown = [name for name in extra if name not in options]
    if unknown:
        free = [name for name in options if name not in arguments]
        raise ValueError(
            f"[{_OP}] options: {loss} takes {', '.join(free)}, got {', '.join(unknown)}."
        )
    return {**arguments, **extra}


def _needed(loss: str, reference: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
    if reference is None:
        raise ValueError(
            f"[{_OP}] ref_logps: expected the reference's log-probabilities for loss {loss!r}, got none. "
            "Pass ref_logps, or ref_hidden and ref_weight."
        )
    return reference


@torch.no_grad()
def _metrics(
    form: Form,
    policy: tuple[Tensor, ...],
    reference: tuple[Tensor, ...] | None,
    lengths: tuple[Tensor, ...],
    extra: Mapping[str, Any],
    beta: float,
) -> dict[str, Tensor]:
    sums = [x.detach().sum(-1) if form.tokens else x.detach() for x in policy]
    refs = [torch.zeros_like(x) for x in sums]
    if reference is not None:
        refs = [x.sum(-1) if form.tokens else x for x in reference]
    if len(form.roles) > 1:
        first = form.roles.index("chosen") if "chosen" in form.roles else 0
        second = form.roles.index("rejected") if "rejected" in form.roles else 1
        return preference_metrics(sums[first], sums[second], refs[first], refs[second], beta=beta)
    rewards = beta * (sums[0] - refs[0])
    desirable = extra.get("is_desirable")
    if not isinstance(desirable, Tensor):
        return {"logps/chosen": sums[0].mean(), "rewards/chosen": rewards.mean()}
    up = desirable.to(rewards.dtype)
    n_up, n_down = up.sum().clamp(min=1), (1 - up).sum().clamp(min=1)
    chosen, rejected = (rewards * up).sum() / n_up, (rewards * (1 - up)).sum() / n_down
    return {
        "logps/chosen": (sums[0] * up).sum() / n_up,
        "logps/rejected": (sums[0] * (1 - up)).sum() / n_down,
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
    }
