# SPDX-License-Identifier: Apache-2.0
"""Valid calls of the ops of this room."""

from functools import partial

import torch
from catalog_cases import Arguments, Call, D, V, normal, some_ignored, tokens
from torch import Tensor

STATISTICS = ("entropy", "lse", "sum_p2", "mean_logit", "argmax_hit")


def head(n: int, **options: object) -> Arguments:
    weight, bias = normal(V, D, leaf=True), normal(V, leaf=True)
    labels = some_ignored(n)
    return {
        "hidden": normal(n, D, leaf=True),
        "weight": weight,
        "labels": labels,
        "bias": bias,
        **options,
    }


def two_heads(n: int, **options: object) -> Arguments:
    return {
        "student_hidden": normal(n, D, leaf=True), "student_weight": normal(V, D, leaf=True),
        "teacher_hidden": normal(n, D + 1), "teacher_weight": normal(V, D + 1), "labels": some_ignored(n), **options,
    }  # fmt: skip


def with_biases(n: int) -> Arguments:
    return two_heads(n, student_bias=normal(V, leaf=True), teacher_bias=normal(V + 1)[:V])


def two_logits(n: int) -> Arguments:
    """NaN in the rows that do not count: it must not come out in their gradient."""
    labels = some_ignored(n)
    student: Tensor = torch.where(labels.eq(-100)[:, None], torch.nan, normal(n, V))
    teacher = normal(n, V + 1)[:, :V]
    return {"student_logits": student.requires_grad_(), "teacher_logits": teacher, "labels": labels}


def logits(n: int) -> Arguments:
    return {"logits": normal(n, V, leaf=True), "labels": some_ignored(n), "statistics": STATISTICS}


def scores(n: int) -> Arguments:
    m = max(n, 2)
    return {"scores": normal(m, m, leaf=True), "log_baseline": normal(m, leaf=True)}


CALLS = [
    Call("linear_logprob", partial(head, softcap=5.0, statistics=STATISTICS)),
    Call("token_logprob", logits),
    Call("linear_cross_entropy", partial(head, label_smoothing=0.1, z_loss=1e-3)),
    Call("linear_cross_entropy", partial(head, reduction="none"), "linear_cross_entropy-none"),
    Call("linear_kl", with_biases),
    Call("linear_jsd", two_heads),
    Call("linear_distill", partial(two_heads, divergence_kind="balanced")),
    *(
        Call("linear_distill", partial(two_heads, divergence_kind=kind), f"linear_distill-{kind}")
        for kind in ("forward_kl", "reverse_kl", "jsd", "log_cosh")
    ),
    Call("forward_kl_distill", two_logits),
    Call("reverse_kl_distill", two_logits),
    Call("generalized_jsd_distill", two_logits),
    Call("balanced_divergence_kd", two_logits),
    Call("log_cosh_logit_distill", two_logits),
    Call(
        "bonsai_synthesis_loss",
        lambda n: {"head_logits": normal(2, n, V, leaf=True), "pseudo_labels": tokens(2, n)},
    ),
    Call("mi_alpha_bound", scores),
]
