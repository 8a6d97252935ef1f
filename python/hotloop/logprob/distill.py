# SPDX-License-Identifier: Apache-2.0
"""Distillation losses between a teacher p and a student q over one vocabulary.

The ``linear_`` forms start from hidden states and two lm_heads and never hold the logits; the others take logits.
Gradients go to the student only.
"""

from __future__ import annotations

from torch import Tensor

from ..front import check
from ..front.impl import Impl
from ..front.keywords import known
from . import _arguments
from ._divergence import of_heads, of_logits, options
from .lm_head import HINTS, IGNORE_INDEX, token_logprob

DIRECTIONS = ("forward", "reverse")


@known(HINTS)
@_arguments.described
def linear_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    labels: Tensor | None = None,
    direction: str = "forward",
    temperature: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    shift_labels: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """Kullback-Leibler divergence between two lm_heads, with a bounded part of the logits in memory.

    forward: sum_v p_v (log p_v - log q_v); reverse: sum_v q_v (log q_v - log p_v), with p = softmax(teacher / T)
    and q = softmax(student / T). No factor T^2: multiply by temperature^2 for Hinton's scale.

    Args:
        direction: "forward" or "reverse". Default "forward".

    Examples:
        >>> import torch
        >>> h, w = torch.ones(2, 3), torch.ones(5, 3)
        >>> float(linear_kl(h, w, h, w))
        0.0

    Reference:
        Hinton et al. 2015, arXiv:1503.02531 (forward); Gu et al. 2023, arXiv:2306.08543 (reverse).
    """
    op = "linear_kl"
    check.choice(op, "direction", direction, DIRECTIONS)
    d = options(op, f"{direction}_kl", 0.5, 2.0, temperature, reduction)
    student = (student_hidden, student_weight, student_bias)
    teacher = (teacher_hidden, teacher_weight, teacher_bias)
    labels = _arguments.shifted(op, labels, ignore_index, shift_labels)
    return of_heads(op, student, teacher, labels, d, ignore_index, reduction, impl)


@known(HINTS)
@_arguments.described
def linear_jsd(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    shift_labels: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """Generalised Jensen-Shannon divergence between two lm_heads, with a bounded part of the logits in memory.

    beta KL(p || M) + (1 - beta) KL(q || M), M = beta p + (1 - beta) q. At beta = 0 it is KL(p || q) and at
    beta = 1 KL(q || p) by definition (TRL's convention), which is not the limit of the formula: that is 0.

    Args:
        temperature: > 0 (1e-18 to 1e3, in float64 to 1e7), of both. Default 1 (the paper uses 0.9 to 1).

    Examples:
        >>> import torch
        >>> h, w = torch.ones(2, 3), torch.ones(5, 3)
        >>> abs(float(linear_jsd(h, w, h, w))) < 1e-6
        True

    Reference:
        Agarwal et al. 2023 (GKD), arXiv:2306.13649, section 3.
    """
    op = "linear_jsd"
    d = options(op, "jsd", beta, 2.0, temperature, reduction)
    student = (student_hidden, student_weight, student_bias)
    teacher = (teacher_hidden, teacher_weight, teacher_bias)
    labels = _arguments.shifted(op, labels, ignore_index, shift_labels)
    return of_heads(op, student, teacher, labels, d, ignore_index, reduction, impl)


@known(HINTS)
@_arguments.described
def linear_distill(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    divergence_kind: str = "forward_kl",
    labels: Tensor | None = None,
    beta: float = 0.5,
    delta: float = 2.0,
    temperature: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    shift_labels: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """Any divergence of this room between two lm_heads, with a bounded part of the logits in memory.

    Args:
        divergence_kind: "forward_kl", "reverse_kl", "jsd" (see ``generalized_jsd_distill``), "balanced" (see
            ``balanced_divergence_kd``) or "log_cosh" (see ``log_cosh_logit_distill``). Default "forward_kl".
        beta: of "jsd". Default 0.5.
        delta: of "balanced". Default 2.
        impl: "auto", "cpu", "triton" or "reference"; "log_cosh" has no Triton kernel. Default "auto".

    Examples:
        >>> import torch
        >>> h, w = torch.ones(2, 3), torch.ones(5, 3)
        >>> float(linear_distill(h, w, h, w, divergence_kind="balanced"))
        0.0

    Reference:
        See the functions named above.
    """
    op = "linear_distill"
    d = options(op, divergence_kind, beta, delta, temperature, reduction)
    labels = _arguments.shifted(op, labels, ignore_index, shift_labels)
    return of_heads(
        op, (student_hidden, student_weight, None), (teacher_hidden, teacher_weight, None), labels, d,
        ignore_index, reduction, impl,
    )  # fmt: skip


@known(HINTS)
@_arguments.described
def forward_kl_distill(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    labels: Tensor | None = None,
    temperature: float = 1.0,
    scale_by_temperature: bool = True,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    shift_labels: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """Hinton's distillation: T^2 * KL(p || q), p = softmax(teacher / T), q = softmax(student / T).

    Args:
        temperature: T > 0 (1e-18 to 1e3, in float64 to 1e7); 2 to 4 in vision, 1 for language models. Default 1.
        scale_by_temperature: multiply by T^2, as Hinton does; language-model code often does not. Default True.

    Examples:
        >>> import torch
        >>> float(forward_kl_distill(torch.zeros(1, 4), torch.zeros(1, 4)))
        0.0

    Reference:
        Hinton et al. 2015, arXiv:1503.02531.
    """
    op = "forward_kl_distill"
    d = options(op, "forward_kl", 0.5, 2.0, temperature, reduction)
    logits = (student_logits, teacher_logits)
    labels = _arguments.shifted(op, labels, ignore_index, shift_labels)
    loss = of_logits(op, *logits, labels, d, ignore_index, reduction, impl)
    return loss * temperature**2 if scale_by_temperature and temperature != 1 else loss


@known(HINTS)
@_arguments.described
def reverse_kl_distill(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    labels: Tensor | None = None,
    temperature: float = 1.0,
    scale_by_temperature: bool = False,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    shift_labels: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """Mode-seeking distillation: KL(q || p) of student q and teacher p.

    Infinite where the student has mass and a teacher logit is -inf: mask with a large negative number instead.

    Args:
        scale_by_temperature: multiply by T^2. Default False.

    Examples:
        >>> import torch
        >>> float(reverse_kl_distill(torch.zeros(1, 4), torch.zeros(1, 4)))
        0.0

    Reference:
        Gu et al. 2023 (MiniLLM), arXiv:2306.08543.
    """
    op = "reverse_kl_distill"
    d = options(op, "reverse_kl", 0.5, 2.0, temperature, reduction)
    logits = (student_logits, teacher_logits)
    labels = _arguments.shifted(op, labels, ignore_index, shift_labels)
    loss = of_logits(op, *logits, labels, d, ignore_index, reduction, impl)
    return loss * temperature**2 if scale_by_temperature and temperature != 1 else loss


@known(HINTS)
@_arguments.described
def generalized_jsd_distill(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    shift_labels: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """Generalised Jensen-Shannon divergence: beta KL(p || M) + (1 - beta) KL(q || M), M = beta p + (1 - beta) q.

    beta = 0 is KL(p || q) and beta = 1 KL(q || p) by definition; the formula itself tends to 0 there.

    Returns:
        Scalar, or shape (...) for "none", nats; at most log 2 for beta = 0.5.

    Examples:
        >>> import torch
        >>> abs(float(generalized_jsd_distill(torch.zeros(1, 4), torch.zeros(1, 4)))) < 1e-6
        True

    Reference:
        Agarwal et al. 2023 (GKD), arXiv:2306.13649.
    """
    op = "generalized_jsd_distill"
    d = options(op, "jsd", beta, 2.0, temperature, reduction)
    logits = (student_logits, teacher_logits)
    labels = _arguments.shifted(op, labels, ignore_index, shift_labels)
    return of_logits(op, *logits, labels, d, ignore_index, reduction, impl)


@known(HINTS)
@_arguments.described
def balanced_divergence_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    labels: Tensor | None = None,
    delta: float = 2.0,
    temperature: float = 4.0,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    shift_labels: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """T^2 * [ a_i KL(p || q) + b_i KL(q || p) ], the weights chosen per row by who is the more certain.

    Where the student's entropy is below the teacher's (it is over-confident) a_i = delta, b_i = 1; else a_i = 1,
    b_i = delta. Weights carry no gradient. The direction of the rule was derived and tested numerically, and the
    paper's values of delta and T are not confirmed. Add the cross-entropy of the student yourself; the teacher's
    own loss of the paper is ``reverse_kl_distill`` with the two swapped and scale_by_temperature=True.

    Examples:
        >>> import torch
        >>> float(balanced_divergence_kd(torch.zeros(1, 4), torch.zeros(1, 4)))
        0.0

    Reference:
        Amara et al. 2022 (BD-KD), arXiv:2212.12965.
    """
    op = "balanced_divergence_kd"
    d = options(op, "balanced", 0.5, delta, temperature, reduction)
    logits = (student_logits, teacher_logits)
    labels = _arguments.shifted(op, labels, ignore_index, shift_labels)
    return of_logits(op, *logits, labels, d, ignore_index, reduction, impl)


@known(HINTS)
@_arguments.described
def log_cosh_logit_distill(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    labels: Tensor | None = None,
    temperature: float = 2.0,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    shift_labels: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """Logit matching of an auxiliary head: T^2 * sum_v log cosh((s_v - t_v) / (2 T)), summed over the vocabulary.

    The same as the two binary divergences KL(1/2 || sigma(d)) + KL(1/2 || 1 - sigma(d)), d = (s - t) / T, of the
    paper, without its clamp at 1e-8. Grows with the vocabulary.

    Args:
        impl: "auto", "cpu" or "reference". Default "auto".

    Examples:
        >>> import torch
        >>> float(log_cosh_logit_distill(torch.zeros(1, 4), torch.zeros(1, 4)))
        0.0

    Reference:
        Yang et al. 2024 (DHKD), arXiv:2411.08937.
    """
    op = "log_cosh_logit_distill"
    d = options(op, "log_cosh", 0.5, 2.0, temperature, reduction)
    logits = (student_logits, teacher_logits)
    labels = _arguments.shifted(op, labels, ignore_index, shift_labels)
    return of_logits(op, *logits, labels, d, ignore_index, reduction, impl)


@known(HINTS)
@_arguments.described
def bonsai_synthesis_loss(
    head_logits: Tensor,
    pseudo_labels: Tensor,
    *,
    reduction: str = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """Hard-label distillation of K discovered predictors into K heads of one backbone.

    L = sum_k mean_b CE(head_logits[k, b], pseudo_labels[k, b]); with reduction "none" the [K, B] terms.

    Args:
        head_logits: shape (K, B, C). Differentiable.
        pseudo_labels: argmax of the k-th predictor, shape (K, B), int64 or int32; -100 leaves a sample out.
        reduction: "mean" (over samples, summed over heads), "sum" or "none". Default "mean".

    Returns:
        Scalar, or shape (K, B) for "none".

    Examples:
        >>> import torch
        >>> logits, labels = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)
        >>> round(float(bonsai_synthesis_loss(logits, labels)), 4)
        2.7726

    Reference:
        Zhang et al. 2022 (Bonsai), arXiv:2203.15516.
    """
    op = "bonsai_synthesis_loss"
    check.choice(op, "reduction", reduction, check.REDUCTIONS)
    check.float_tensor(op, "head_logits", head_logits, ndim=3)
    losses = -token_logprob(head_logits, pseudo_labels, impl=impl).logps
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    counts = (pseudo_labels != IGNORE_INDEX).sum(1).clamp(min=1)  # a head without samples adds 0
    return (losses.sum(1) / counts).sum()
