# SPDX-License-Identifier: Apache-2.0
"""linear_preference_loss: every loss from hidden states equals the loss of plainly computed log-probabilities."""

import inspect
import re

import pytest
import torch
from catalog_cases import everything
from hotloop.preference import LOSSES, dpo_loss, linear_preference_loss, preference_metrics
from hotloop.preference.linear import ELSEWHERE, FORMS

N, T, D, V = 4, 6, 8, 50


def options_of(name):
    """Those of the valid call of this loss."""
    (call,) = (call for call in everything() if call.id == f"linear-{name}")
    return call.arguments(N)["options"] or {}


def batch(name="dpo", dtype=torch.float64, seed=0):
    form = FORMS[name]
    answers = len(form.roles) * N + (N if name == "hypo" else 0)
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(answers, T, D, generator=g, dtype=dtype)
    weight = torch.randn(V, D, generator=g, dtype=dtype)
    ref_hidden = hidden + 0.1 * torch.randn(answers, T, D, generator=g, dtype=dtype)
    labels = torch.randint(0, V, (answers, T), generator=g)
    labels[:, :2] = -100  # the prompt
    labels[::3, -1] = -100  # padding
    return hidden, weight, ref_hidden, labels


def token_logps(hidden, weight, labels):
    logps = torch.log_softmax(hidden @ weight.T, -1)
    rows = logps.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(labels >= 0, rows, 0.0)


def expected(name, hidden, weight, ref_hidden, labels):
    """The loss by its public function, with every argument named by hand from plain log-probabilities."""
    form = FORMS[name]
    policy, ref = (
        token_logps(hidden, weight, labels),
        token_logps(ref_hidden, weight.detach(), labels),
    )
    lengths = (labels >= 0).sum(-1).to(policy.dtype)
    if not form.tokens:
        policy, ref = policy.sum(-1), ref.sum(-1)
    else:
        policy, ref = policy[:, 2:], ref[:, 2:]  # the prompt is as long in every row
        policy, ref = (torch.nn.functional.pad(x, (0, 2)) for x in (policy, ref))
    sizes = [N] * len(form.roles)
    sizes[-1] += N if name == "hypo" else 0
    p, r, n = policy.split(sizes), ref.split(sizes), lengths.split(sizes)
    extra = dict(options_of(name))
    normalized = extra.pop("length_normalized", False)
    pair = {
        "policy_chosen_logps": p[0], "policy_rejected_logps": p[-1] if len(p) == 1 else p[1],
        "ref_chosen_logps": r[0], "ref_rejected_logps": r[-1] if len(r) == 1 else r[1],
    }  # fmt: skip
    nll = (-p[0].sum() / n[0].sum()).expand(N) if not form.tokens else None
    if name in ("simpo", "cpo", "orpo"):
        pair = {k: v for k, v in pair.items() if k.startswith("policy")}
    by_name = {
        "orpo": lambda: {
            "policy_chosen_logps": p[0] / n[0], "policy_rejected_logps": p[1] / n[1], "chosen_nll": nll,
        },
        "cpo": lambda: {**pair, "chosen_nll": nll},
        "simpo": lambda: {**pair, "chosen_lengths": n[0], "rejected_lengths": n[1]},
        "dpo_norm": lambda: {**pair, "chosen_lengths": n[0], "rejected_lengths": n[1]},
        "rpo_sft": lambda: {**pair, "chosen_lengths": n[0]},
        "ipo": lambda: {**pair, **({"chosen_lengths": n[0], "rejected_lengths": n[1]} if normalized else {})},
        "selm": lambda: {**pair, "policy_generated_logps": p[2], "ref_generated_logps": r[2]},
        "vpo": lambda: {**pair, "policy_calibration_logps": p[2], "ref_calibration_logps": r[2]},
        "xpo": lambda: {**pair, "policy_ref_sample_logps": p[2]},
        "hypo": lambda: {**pair, "policy_online_logps": p[2], "ref_online_logps": r[2]},
        "drift_iterative_dpo": lambda: {
            "policy_fresh_logps": p[0], "policy_dissatisfied_logps": p[1], "ref_fresh_logps": r[0],
            "ref_dissatisfied_logps": r[1],
        },
        "cpl": lambda: {
            "segment_logps_1": p[0], "segment_logps_2": p[1], "ref_logps_1": r[0], "ref_logps_2": r[1],
        },
    }  # fmt: skip
    for numbered in ("dno", "online_ipo"):
        by_name[numbered] = lambda: {
            "policy_logps_1": p[0], "policy_logps_2": p[1], "ref_logps_1": r[0], "ref_logps_2": r[1],
        }  # fmt: skip
    for single in ("kto", "bco", "sppo", "npo"):
        by_name[single] = lambda: {"policy_logps": p[0], "ref_logps": r[0]}
    for ratios in ("srpo", "opa_dpo"):
        by_name[ratios] = lambda: {
            f"{role}_logratios": a - b for role, a, b in zip(form.roles, p, r)
        }
    arguments = by_name.get(name, lambda: pair)()
    return form.function(**arguments, **extra, impl="reference")


@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_loss_of_plain_log_probabilities(name):
    hidden, weight, ref_hidden, labels = batch(name)
    results = []
    for fused in (False, True):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if fused:
            loss, metrics = linear_preference_loss(
                h, w, labels, loss=name, ref_hidden=ref_hidden, options=options_of(name)
            )
            assert all(m.ndim == 0 and not m.requires_grad for m in metrics.values())
        else:
            loss = expected(name, h, w, ref_hidden, labels)
        loss.backward()
        results.append((loss.detach(), h.grad, w.grad))
    # cpo's NLL and the like are sums of the same float64 numbers in another order.
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-11)


def test_every_loss_of_the_room_has_a_form():
    import hotloop

    public = {n.removesuffix("_loss") for n in hotloop.preference.__all__ if n.endswith("_loss")}
    public |= {"npo"}
    assert set(LOSSES) == public - {"linear_preference", "cpl_dense"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_close(dtype):
    hidden, weight, ref_hidden, labels = batch()
    truth, _ = linear_preference_loss(
        hidden, weight, labels, ref_hidden=ref_hidden, impl="reference"
    )
    ours, _ = linear_preference_loss(
        *(x.to(dtype) for x in (hidden, weight)), labels, ref_hidden=ref_hidden.to(dtype)
    )
    plain, _ = linear_preference_loss(
        *(x.to(dtype) for x in (hidden, weight)),
        labels,
        ref_hidden=ref_hidden.to(dtype),
        impl="reference",
    )
    assert abs(ours - truth) <= 2 * abs(plain - truth) + 1e-6


def test_packed_answers_equal_padded_ones():
    hidden, weight, ref_hidden, labels = batch()
    keep = [slice(0, T - (i % 3)) for i in range(len(labels))]
    cu = torch.tensor([0, *[s.stop for s in keep]]).cumsum(0)
    packed = [
        torch.cat([x[i, s] for i, s in enumerate(keep)]) for x in (hidden, ref_hidden, labels)
    ]
    padded = labels.clone()
    for i, s in enumerate(keep):
        padded[i, s.stop :] = -100
    a, ma = linear_preference_loss(hidden, weight, padded, ref_hidden=ref_hidden)
    b, mb = linear_preference_loss(
        packed[0], weight, packed[2], ref_hidden=packed[1], cu_seqlens=cu
    )
    torch.testing.assert_close(a, b)
    for name in ma:
        torch.testing.assert_close(ma[name], mb[name])


def test_reference_given_per_answer_per_token_or_as_hidden_states():
    hidden, weight, ref_hidden, labels = batch()
    tokens = token_logps(ref_hidden, weight, labels)
    losses = [
        linear_preference_loss(hidden, weight, labels, ref_hidden=ref_hidden)[0],
        linear_preference_loss(hidden, weight, labels, ref_logps=tokens.sum(-1))[0],
        linear_preference_loss(hidden, weight, labels, ref_logps=tokens)[0],
        linear_preference_loss(
            hidden, weight, labels, ref_hidden=ref_hidden, ref_weight=weight.clone()
        )[0],
    ]
    for other in losses[1:]:
        torch.testing.assert_close(losses[0], other)


def test_packed_answers_take_a_reference_per_token():
    """Three tokens in two answers; the numbers of the reference, of which one is not to be read."""
    hidden = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]], dtype=torch.float64)
    weight = torch.arange(20, dtype=torch.float64).reshape(5, 4) / 10
    labels, cu = torch.tensor([1, -100, 3]), torch.tensor([0, 2, 3])
    per_token = torch.tensor([-1.0, torch.nan, -3.0], dtype=torch.float64)
    found, _ = linear_preference_loss(hidden, weight, labels, cu_seqlens=cu, ref_logps=per_token)
    logps = torch.log_softmax(hidden @ weight.T, -1)
    margin = (logps[0, 1] - -1.0) - (logps[2, 3] - -3.0)
    torch.testing.assert_close(found, torch.nn.functional.softplus(-0.1 * margin))
    per_answer = torch.tensor([-1.0, -3.0], dtype=torch.float64)
    other, _ = linear_preference_loss(hidden, weight, labels, cu_seqlens=cu, ref_logps=per_answer)
    assert found == other
    text = r"ref_logps: expected shape \(2,\), one per answer, or \(3,\), one per label, got \(4,\)"
    with pytest.raises(ValueError, match=text):
        linear_preference_loss(
            hidden, weight, labels, cu_seqlens=cu, ref_logps=torch.zeros(4, dtype=torch.float64)
        )


def test_as_many_packed_tokens_as_answers_is_one_per_answer():
    hidden, weight = torch.eye(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    labels, cu = torch.tensor([0, 1]), torch.tensor([0, 2, 2])
    ref = torch.tensor([-1.0, -3.0], dtype=torch.float64)
    found, _ = linear_preference_loss(hidden, weight, labels, cu_seqlens=cu, ref_logps=ref)
    chosen = torch.log_softmax(hidden, -1).diagonal().sum()
    margin = (chosen + 1.0) - (0.0 + 3.0)
    torch.testing.assert_close(found, torch.nn.functional.softplus(-0.1 * margin))


@pytest.mark.parametrize("packed", [False, True])
def test_labels_that_are_not_shifted(packed):
    """The same loss as from labels shifted by hand, references included."""
    hidden, weight, ref_hidden, labels = batch()
    moved = torch.full_like(labels, -100)
    moved[:, :-1] = labels[:, 1:]
    truth, _ = linear_preference_loss(hidden, weight, moved, ref_hidden=ref_hidden)
    if packed:
        cu = torch.arange(0, labels.numel() + 1, T)
        found, _ = linear_preference_loss(
            hidden.reshape(-1, D), weight, labels.reshape(-1), ref_hidden=ref_hidden.reshape(-1, D),
            cu_seqlens=cu, shift_labels=True,
        )  # fmt: skip
    else:
        found, _ = linear_preference_loss(
            hidden, weight, labels, ref_hidden=ref_hidden, shift_labels=True
        )
    torch.testing.assert_close(found, truth)
    tokens = token_logps(ref_hidden, weight, moved)
    given, _ = linear_preference_loss(hidden, weight, labels, ref_logps=tokens, shift_labels=True)
    torch.testing.assert_close(given, truth)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("sigmoid", 'Pass loss="dpo"'),
        ("hinge", 'Pass loss="slic_hinge"'),
        ("nca_pair", 'Pass loss="nca"'),
        ("robust", 'Pass loss="robust_dpo"'),
        ("sigmoid_norm", 'Pass loss="dpo_norm"'),
        ("aot_unpaired", 'Pass loss="aot" with options={"paired": False}'),
        ("apo_zero", 'Pass loss="apo"'),
        ("apo_down", 'Pass loss="apo" with options={"variant": "down"}'),
        ("apo_zero_unpaired", 'Pass loss="kto" with options={"kl": 0.0'),
        ("sft", "Use hotloop.logprob.linear_cross_entropy"),
        ("dpo_loss", 'Pass loss="dpo"'),
    ],
)
def test_names_of_other_libraries_are_answered_with_ours(theirs, ours):
    hidden, weight, _, labels = batch()
    with pytest.raises(ValueError, match=re.escape(f"got {theirs!r}. {ours}")):
        linear_preference_loss(hidden, weight, labels, loss=theirs)


def test_what_is_suggested_exists():
    for name, hint in ELSEWHERE.items():
        assert name not in LOSSES
        found = re.match(r'loss="(\w+)"(?: with options=(\{.*\}))?$', hint)
        if found is None:
            assert "loss=" not in hint
            continue
        assert found[1] in LOSSES
        for option in re.findall(r'"(\w+)":', found[2] or ""):
            assert option in (*FORMS[found[1]].parameters, "length_normalized")


@pytest.mark.peer
def test_every_loss_type_of_trl_is_ours_or_is_answered():
    trainer = pytest.importorskip("trl.trainer.dpo_trainer")
    types = set(re.findall(r'loss_type == "(\w+)"', inspect.getsource(trainer)))
    assert {"sigmoid", "hinge", "ipo"} <= types
    assert {t for t in types if t not in LOSSES and t not in ELSEWHERE} == set()


@pytest.mark.parametrize(
    ("keyword", "text"),
    [
        ({"beta": 0.2}, "beta: .*Arguments of the loss go into options: options={'beta': ...}"),
        ({"label_smoothing": 0.1}, "label_smoothing: .*options={'label_smoothing': ...}"),
        ({"loss_type": "sigmoid"}, "loss_type: .*Pass it as loss"),
        ({"reduction": "sum"}, "reduction: .*The loss is a mean over the answers"),
        ({"ref_hiden": None}, r"ref_hiden: .*Did you mean ref_hidden\?"),
        ({"shift": True}, "shift: .*Pass shift_labels=True"),
    ],
)
def test_keywords_it_does_not_take(keyword, text):
    hidden, weight, ref_hidden, labels = batch()
    with pytest.raises(TypeError, match=rf"^\[linear_preference_loss\] {text}"):
        linear_preference_loss(hidden, weight, labels, ref_hidden=ref_hidden, **keyword)


def test_a_module_where_a_tensor_is_expected():
    hidden, weight, ref_hidden, labels = batch(dtype=torch.float32)
    layer = torch.nn.Linear(D, V, bias=False)
    with pytest.raises(TypeError, match=r"weight: .*got Linear\. Pass its \.weight\."):
        linear_preference_loss(hidden, layer, labels, ref_hidden=ref_hidden)
    with pytest.raises(TypeError, match=r"ref_weight: .*got Linear\. Pass its \.weight\."):
        linear_preference_loss(hidden, weight, labels, ref_hidden=ref_hidden, ref_weight=layer)


def test_metrics_are_those_of_preference_metrics():
    hidden, weight, ref_hidden, labels = batch()
    p, r = (
        token_logps(hidden, weight, labels).sum(-1),
        token_logps(ref_hidden, weight, labels).sum(-1),
    )
    _, metrics = linear_preference_loss(
        hidden, weight, labels, ref_hidden=ref_hidden, options={"beta": 0.3}
    )
    truth = preference_metrics(p[:N], p[N:], r[:N], r[N:], beta=0.3)
    assert metrics.keys() == truth.keys()
    for name, value in truth.items():
        torch.testing.assert_close(metrics[name], value)


def test_a_head_of_your_own_keeps_the_fused_head():
    hidden, weight, ref_hidden, labels = batch()
    h = hidden.clone().requires_grad_()

    def mine(chosen, rejected, ref_chosen, ref_rejected):
        return torch.nn.functional.softplus(
            -0.1 * ((chosen - ref_chosen) - (rejected - ref_rejected))
        )

    loss, _ = linear_preference_loss(h, weight, labels, loss=mine, ref_hidden=ref_hidden)
    loss.backward()
    named, _ = linear_preference_loss(hidden, weight, labels, loss="dpo", ref_hidden=ref_hidden)
    torch.testing.assert_close(loss.detach(), named)
    assert h.grad.abs().sum() > 0
    without, _ = linear_preference_loss(
        hidden, weight, labels, loss=lambda a, b, c, d: (a - b).sum()
    )
    assert without.ndim == 0


def test_prompt_and_padding_have_exactly_zero_gradient_and_may_hold_nan():
    hidden, weight, ref_hidden, labels = batch(dtype=torch.float32)
    hidden[labels == -100] = torch.nan
    ref_hidden[labels == -100] = torch.nan
    h = hidden.clone().requires_grad_()
    loss, _ = linear_preference_loss(h, weight, labels, ref_hidden=ref_hidden)
    loss.backward()
    assert torch.isfinite(loss)
    assert bool((h.grad[labels == -100] == 0).all())
    assert torch.isfinite(h.grad).all()


ERRORS = {
    r"\[linear_preference_loss\] loss: expected a function or one of .*dpo, .*got 'ppo'": {
        "loss": "ppo"
    },
    "hidden: expected a number of answers divisible by 2": {
        "hidden": torch.zeros(3, T, D),
        "labels": torch.zeros(3, T, dtype=torch.int64),
    },
    r"hidden: expected shape \(answers, tokens, width\)": {"hidden": torch.zeros(8, D)},
    "ref_logps: expected the reference's log-probabilities for loss 'dpo', got none": {
        "ref_hidden": None
    },
    "ref_hidden: expected None beside ref_logps, got both": {"ref_logps": torch.zeros(8)},
    r"ref_logps: expected shape \(8,\), one per answer, or \(8, 6\), one per label, got \(5,\)": {
        "ref_hidden": None,
        "ref_logps": torch.zeros(5),
    },
    "options: dpo takes beta, .*got bta": {"options": {"bta": 1.0}},
    r"\[dpo_loss\] beta: expected a number > 0": {"options": {"beta": -1.0}},
    "options: expected Mapping, got str. Name the arguments": {"options": "beta"},
    "options: dpo takes beta, .*got 1": {"options": {1: 1.0}},
    "options: expected None beside a loss of your own, got beta. Use functools.partial": {
        "loss": lambda chosen, rejected, *refs: rejected - chosen,
        "options": {"beta": 0.5},
    },
    "loss: expected a torch.Tensor, got NoneType": {"loss": lambda *logps: None},
    "ref_weight: expected None without ref_hidden, got a value": {
        "ref_hidden": None,
        "ref_logps": torch.zeros(8),
        "ref_weight": torch.zeros(V, D),
    },
    "ref_bias: expected None without ref_hidden, got a value": {
        "ref_hidden": None,
        "ref_logps": torch.zeros(8),
        "ref_bias": torch.zeros(V),
    },
}


@pytest.mark.parametrize("text", ERRORS)
def test_errors(text):
    names = ("hidden", "weight", "ref_hidden", "labels")
    arguments = dict(zip(names, batch(dtype=torch.float32))) | ERRORS[text]
    with pytest.raises((ValueError, TypeError), match=text):
        linear_preference_loss(**arguments)


def test_signature_of_the_default_loss_is_what_the_readme_shows():
    assert "beta" in inspect.signature(dpo_loss).parameters
