"""Valid calls of the ops of this room."""

from catalog_cases import Arguments, Call, D, V, normal, some_ignored, tokens


def head(n: int) -> Arguments:
    weight = normal(V, D, leaf=True)
    return {"hidden": normal(n, D, leaf=True), "weight": weight, "labels": some_ignored(n)}


def two_heads(n: int) -> Arguments:
    return {
        "student_hidden": normal(n, D, leaf=True), "student_weight": normal(V, D, leaf=True),
        "teacher_hidden": normal(n, D + 1), "teacher_weight": normal(V, D + 1), "labels": some_ignored(n),
    }  # fmt: skip


def two_logits(n: int) -> Arguments:
    return {"student_logits": normal(n, V, leaf=True), "teacher_logits": normal(n, V + 1)[:, :V]}


CALLS = [
    Call("linear_logprob", head),
    Call("token_logprob", lambda n: {"logits": normal(n, V, leaf=True), "labels": some_ignored(n)}),
    Call("linear_cross_entropy", head),
    Call("linear_kl", two_heads),
    Call("linear_jsd", two_heads),
    Call("linear_distill", two_heads),
    Call("forward_kl_distill", two_logits),
    Call("reverse_kl_distill", two_logits),
    Call("generalized_jsd_distill", two_logits),
    Call("balanced_divergence_kd", two_logits),
    Call("log_cosh_logit_distill", two_logits),
    Call(
        "bonsai_synthesis_loss",
        lambda n: {"head_logits": normal(2, n, V, leaf=True), "pseudo_labels": tokens(2, n)},
    ),
    Call(
        "mi_alpha_bound",
        lambda n: {"scores": normal(n, n, leaf=True), "log_baseline": normal(n, leaf=True)},
    ),
]
