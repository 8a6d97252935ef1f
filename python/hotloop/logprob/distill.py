"""Distillation losses between a teacher p and a student q over one vocabulary.

The ``linear_`` forms start from hidden states and two heads and never hold the logits; the others take logits.
Gradients go to the student only.
"""

from __future__ import annotations

from torch import Tensor

from ..front import check
from ..front.impl import Impl
from ..front.keywords import known
from . import _arguments
from . import _divergence as divergence
from .head import HINTS, IGNORE_INDEX, token_logprob

DIRECTIONS = ("forward", "reverse")


@known(HINTS)
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
    """Kullback-Leibler divergence between two language-model heads, with a bounded part of the logits in memory.

    forward: sum_v p_v (log p_v - log q_v); reverse: sum_v q_v (log q_v - log p_v), with p = softmax(teacher / T)
    and q = softmax(student / T). No factor T^2: multiply by temperature^2 for Hinton's scale.

    Args:
        student_hidden: shape (..., D_s). Differentiable.
        student_weight: shape (V, D_s), same dtype. Differentiable.
        teacher_hidden: shape (..., D_t); no gradient.
        teacher_weight: shape (V, D_t), dtype of the student's; no gradient.
        student_bias: shape (V,). Differentiable. Default None.
        teacher_bias: shape (V,). Default None.
        labels: shape (...), only to say which rows count: those that are not ``ignore_index``. Default all.
        direction: "forward" or "reverse". Default "forward".
        temperature: > 0 (1e-18 to 1e3, in float64 to 1e7), of both. Default 1.
        ignore_index: see ``labels``. Default -100.
        reduction: "mean" over the rows that count, "sum" or "none". Default "mean".
        shift_labels: ``labels`` stand beside their own tokens (see ``linear_logprob``). Default False.
        impl: "auto", "cpu", "triton" or "reference". Default "auto".

    Returns:
        Scalar, or shape (...) for "none"; float32 (float64 for float64 input), nats.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype, device or range.
        NotImplementedError: the forced impl cannot run these inputs.

    Example:
        >>> import torch
        >>> h, w = torch.ones(2, 3), torch.ones(5, 3)
        >>> float(linear_kl(h, w, h, w))
        0.0

    Reference:
        Hinton et al. 2015, arXiv:1503.02531 (forward); Gu et al. 2023, arXiv:2306.08543 (reverse).
    """
    op = "linear_kl"
    check.choice(op, "direction", direction, DIRECTIONS)
    d = divergence.options(op, f"{direction}_kl", 0.5, 2.0, temperature, reduction)
    student, teacher = (
        (student_hidden, student_weight, student_bias),
        (teacher_hidden, teacher_weight, teacher_bias),
    )
    labels = _arguments.shifted(op, labels, ignore_index, shift_labels)
    return divergence.of_heads(op, student, teacher, labels, d, ignore_index, reduction, impl)


@known(HINTS)
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
    """Generalised Jensen-Shannon divergence between two heads, with a bounded part of the logits in memory.

    beta KL(p || M) + (1 - beta) KL(q || M), M = beta p + (1 - beta) q. At beta = 0 it is KL(p || q) and at
    beta = 1 KL(q || p) by definition (TRL's convention), which is not the limit of the formula: that is 0.

    Args:
        student_hidden: shape (..., D_s). Differentiable.
        student_weight: shape (V, D_s), same dtype. Differentiable.
        teacher_hidden: shape (..., D_t); no gradient.
        teacher_weight: shape (V, D_t), dtype of the student's; no gradient.
        student_bias: shape (V,). Differentiable. Default None.
        teacher_bias: shape (V,). Default None.
        labels: shape (...), which rows count (see ``linear_kl``). Default all.
        beta: weight of the teacher in the mixture, in [0, 1]. Default 0.5.
        temperature: > 0 (1e-18 to 1e3, in float64 to 1e7), of both. Default 1 (the paper uses 0.9 to 1).
        ignore_index: see ``labels``. Default -100.
        reduction: "mean", "sum" or "none". Default "mean".
        shift_labels: ``labels`` stand beside their own tokens (see ``linear_logprob``). Default False.
        impl: "auto", "cpu", "triton" or "reference". Default "auto".

    Returns:
        Scalar, or shape (...) for "none".

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype, device or range.
        NotImplementedError: the forced impl cannot run these inputs.

    Example:
        >>> import torch
        >>> h, w = torch.ones(2, 3), torch.ones(5, 3)
        >>> abs(float(linear_jsd(h, w, h, w))) < 1e-6
        True

    Reference:
        Agarwal et al. 2023 (GKD), arXiv:2306.13649, section 3.
    """
    op = "linear_jsd"
    d = divergence.options(op, "jsd", beta, 2.0, temperature, reduction)
    student, teacher = (
        (student_hidden, student_weight, student_bias),
        (teacher_hidden, teacher_weight, teacher_bias),
    )
    labels = _arguments.shifted(op, labels, ignore_index, shift_labels)
    return divergence.of_heads(op, student, teacher, labels, d, ignore_index, reduction, impl)


@known(HINTS)
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
    """Any divergence of this room between two heads, with a bounded part of the logits in memory.

    Args:
        student_hidden: shape (..., D_s). Differentiable.
        student_weight: shape (V, D_s). Differentiable.
        teacher_hidden: shape (..., D_t); no gradient.
        teacher_weight: shape (V, D_t); no gradient.
        divergence_kind: "forward_kl", "reverse_kl", "jsd" (see ``generalized_jsd_distill``), "balanced" (see
            ``balanced_divergence_kd``) or "log_cosh" (see ``log_cosh_logit_distill``). Default "forward_kl".
        labels: which rows count (see ``linear_kl``). Default all.
        beta: of "jsd". Default 0.5.
        delta: of "balanced". Default 2.
        temperature: > 0 (1e-18 to 1e3, in float64 to 1e7), of both. Default 1.
        ignore_index: see ``labels``. Default -100.
        reduction: "mean", "sum" or "none". Default "mean".
        shift_labels: ``labels`` stand beside their own tokens (see ``linear_logprob``). Default False.
        impl: "auto", "cpu", "triton" or "reference"; "log_cosh" has no Triton kernel. Default "auto".

    Returns:
        Scalar, or shape (...) for "none".

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype, device or range.
        NotImplementedError: the forced impl cannot run these inputs.

    Example:
        >>> import torch
        >>> h, w = torch.ones(2, 3), torch.ones(5, 3)
        >>> float(linear_distill(h, w, h, w, divergence_kind="balanced"))
        0.0

    Reference:
        See the functions named above.
    """
    op = "linear_distill"
    d = divergence.options(op, divergence_kind, beta, delta, temperature, reduction)
    labels = _arguments.shifted(op, labels, ignore_index, shift_labels)
    return divergence.of_heads(
        op, (student_hidden, student_weight, None), (teacher_hidden, teacher_weight, None), labels, d,
        ignore_index, reduction, impl,
    )  # fmt: skip


@known(HINTS)
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
        student_logits: shape (..., V). Differentiable.
        teacher_logits: shape (..., V), same dtype; no gradient.
        labels: shape (...), which rows count. Default all.
        temperature: T > 0 (1e-18 to 1e3, in float64 to 1e7); 2 to 4 in vision, 1 for language models. Default 1.
        scale_by_temperature: multiply by T^2, as Hinton does; language-model code often does not. Default True.
        ignore_index: label of rows that do not count. Default -100.
        reduction: "mean" over the rows that count, "sum" or "none". Default "mean".
        shift_labels: ``labels`` stand beside their own tokens (see ``linear_logprob``). Default False.
        impl: "auto", "cpu", "triton" or "reference". Default "auto".

    Returns:
        Scalar, or shape (...) for "none", nats.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype, device or range.

    Example:
        >>> import torch
        >>> float(forward_kl_distill(torch.zeros(1, 4), torch.zeros(1, 4)))
        0.0

    Reference:
        Hinton et al. 2015, arXiv:1503.02531.
    """
    op = "forward_kl_distill"
    d = divergence.options(op, "forward_kl", 0.5, 2.0, temperature, reduction)
    labels = _arguments.shifted(op, labels, ignore_index, shift_labels)
    loss = divergence.of_logits(
        op, student_logits, teacher_logits, labels, d, ignore_index, reduction, impl
    )
    return loss * temperature**2 if scale_by_temperature and temperature != 1 else loss


@known(HINTS)
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
        student_logits: shape (..., V). Differentiable.
        teacher_logits: shape (..., V), same dtype; no gradient.
        labels: shape (...), which rows count. Default all.
        temperature: T > 0 (1e-18 to 1e3, in float64 to 1e7). Default 1.
        scale_by_temperature: multiply by T^2. Default False.
        ignore_index: label of rows that do not count. Default -100.
        reduction: "mean", "sum" or "none". Default "mean".
        shift_labels: ``labels`` stand beside their own tokens (see ``linear_logprob``). Default False.
        impl: "auto", "cpu", "triton" or "reference". Default "auto".

    Returns:
        Scalar, or shape (...) for "none", nats.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype, device or range.

    Example:
        >>> import torch
        >>> float(reverse_kl_distill(torch.zeros(1, 4), torch.zeros(1, 4)))
        0.0

    Reference:
        Gu et al. 2023 (MiniLLM), arXiv:2306.08543.
    """
    op = "reverse_kl_distill"
    d = divergence.options(op, "reverse_kl", 0.5, 2.0, temperature, reduction)
    labels = _arguments.shifted(op, labels, ignore_index, shift_labels)
    loss = divergence.of_logits(
        op, student_logits, teacher_logits, labels, d, ignore_index, reduction, impl
    )
    return loss * temperature**2 if scale_by_temperature and temperature != 1 else loss


@known(HINTS)
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

    Args:
        student_logits: shape (..., V). Differentiable.
        teacher_logits: shape (..., V), same dtype; no gradient.
        labels: shape (...), which rows count. Default all.
        beta: in [0, 1]. Default 0.5.
        temperature: > 0 (1e-18 to 1e3, in float64 to 1e7), of both. Default 1.
        ignore_index: label of rows that do not count. Default -100.
        reduction: "mean", "sum" or "none". Default "mean".
        shift_labels: ``labels`` stand beside their own tokens (see ``linear_logprob``). Default False.
        impl: "auto", "cpu", "triton" or "reference". Default "auto".

    Returns:
        Scalar, or shape (...) for "none", nats; at most log 2 for beta = 0.5.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype, device or range.

    Example:
        >>> import torch
        >>> abs(float(generalized_jsd_distill(torch.zeros(1, 4), torch.zeros(1, 4)))) < 1e-6
        True

    Reference:
        Agarwal et al. 2023 (GKD), arXiv:2306.13649.
    """
    op = "generalized_jsd_distill"
    d = divergence.options(op, "jsd", beta, 2.0, temperature, reduction)
    labels = _arguments.shifted(op, labels, ignore_index, shift_labels)
    return divergence.of_logits(
        op, student_logits, teacher_logits, labels, d, ignore_index, reduction, impl
    )


@known(HINTS)
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

    Args:
        student_logits: shape (..., V). Differentiable.
        teacher_logits: shape (..., V), same dtype; no gradient.
        labels: shape (...), which rows count. Default all.
        delta: weight of the emphasised divergence, >= 1. Default 2.
        temperature: T > 0 (1e-18 to 1e3, in float64 to 1e7). Default 4.
        ignore_index: label of rows that do not count. Default -100.
        reduction: "mean", "sum" or "none". Default "mean".
        shift_labels: ``labels`` stand beside their own tokens (see ``linear_logprob``). Default False.
        impl: "auto", "cpu", "triton" or "reference". Default "auto".

    Returns:
        Scalar, or shape (...) for "none".

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype, device or range.

    Example:
        >>> import torch
        >>> float(balanced_divergence_kd(torch.zeros(1, 4), torch.zeros(1, 4)))
        0.0

    Reference:
        Amara et al. 2022 (BD-KD), arXiv:2212.12965.
    """
    op = "balanced_divergence_kd"
    d = divergence.options(op, "balanced", 0.5, delta, temperature, reduction)
    labels = _arguments.shifted(op, labels, ignore_index, shift_labels)
    return divergence.of_logits(
        op, student_logits, teacher_logits, labels, d, ignore_index, reduction, impl
    )


@known(HINTS)
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
        student_logits: shape (..., V). Differentiable.
        teacher_logits: shape (..., V), same dtype; no gradient.
        labels: shape (...), which rows count. Default all.
        temperature: T > 0 (1e-18 to 1e3, in float64 to 1e7). Default 2.
        ignore_index: label of rows that do not count. Default -100.
        reduction: "mean", "sum" or "none". Default "mean".
        shift_labels: ``labels`` stand beside their own tokens (see ``linear_logprob``). Default False.
        impl: "auto", "cpu" or "reference". Default "auto".

    Returns:
        Scalar, or shape (...) for "none".

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype, device or range.

    Example:
        >>> import torch
        >>> float(log_cosh_logit_distill(torch.zeros(1, 4), torch.zeros(1, 4)))
        0.0

    Reference:
        Yang et al. 2024 (DHKD), arXiv:2411.08937.
    """
    op = "log_cosh_logit_distill"
    d = divergence.options(op, "log_cosh", 0.5, 2.0, temperature, reduction)
    labels = _arguments.shifted(op, labels, ignore_index, shift_labels)
    return divergence.of_logits(
        op, student_logits, teacher_logits, labels, d, ignore_index, reduction, impl
    )


@known(HINTS)
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
        impl: "auto", "cpu", "triton" or "reference". Default "auto".

    Returns:
        Scalar, or shape (K, B) for "none".

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype, device or range.

    Example:
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
