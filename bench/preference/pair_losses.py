"""Losses on pairs of log-probabilities, one thread: many pairs, and the eight of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hotloop.reference import preference as reference
from torch import Tensor

from .._case import Bench, Case, Cost, Inputs, Target
from .._options import Options
from ..contenders import ours, pairs, plain

MANY, FEW = 2**20, 8

_MANY_TARGETS = (
    Target("pair.eager", "torch", 1 / 8),
    Target("pair.compile", "torch.compile", 1 / 1.5),
)
_FEW_TARGETS = (Target("pair.few", "torch", 1.0),)

_POLICY = ("pc", "pr")
_REF = ("rc", "rr")
_LENGTHS = ("nc", "nr")


@dataclass(frozen=True)
class Loss:
    """A loss of the room, its arguments by name of input, and the same in eager torch."""

    name: str
    eager: Callable[..., Tensor]
    policy: tuple[str, ...]
    rest: tuple[str, ...]
    keywords: dict[str, Any]
    eager_numbers: tuple[float, ...]
    eager_rest: tuple[str, ...] | None = None

    @property
    def formula(self) -> str:
        """float32 rows read once, and one gradient row written per policy row."""
        rows = 2 * len(self.policy) + len(self.rest)
        return f"{rows}*n*4"


LOSSES = (
    Loss("dpo_loss", pairs.dpo, _POLICY, _REF, {"beta": 0.1}, (0.1,)),
    Loss("ipo_loss", pairs.ipo, _POLICY, (*_REF, *_LENGTHS), {"tau": 0.1}, (0.1,)),
    Loss("simpo_loss", pairs.simpo, _POLICY, _LENGTHS, {"beta": 2.5, "gamma": 1.25}, (2.5, 1.25)),
    Loss("orpo_loss", pairs.orpo, ("mc", "mr", "nll"), (), {"beta": 0.1}, (0.1,)),
    Loss(
        "kto_loss",
        pairs.kto,
        ("pc",),
        ("rc", "good", "kl", "ref_kl"),
        {"beta": 0.1},
        (0.1,),
        eager_rest=("rc", "chosen", "rejected", "kl", "ref_kl"),
    ),
    Loss(
        "robust_dpo_loss",
        pairs.robust_dpo,
        _POLICY,
        _REF,
        {"beta": 0.1, "label_smoothing": 0.1},
        (0.1, 0.1),
    ),
    Loss(
        "exo_pair_loss",
        pairs.exo_pair,
        _POLICY,
        _REF,
        {"beta": 0.1, "label_smoothing": 1e-3},
        (0.1, 1e-3),
    ),
    Loss("nca_loss", pairs.nca, _POLICY, _REF, {"beta": 0.1}, (0.1,)),
    Loss("sppo_hard_loss", pairs.sppo_hard, _POLICY, _REF, {"beta": 0.01}, (0.01,)),
    Loss("apo_loss", pairs.apo_zero, _POLICY, _REF, {"beta": 0.1, "variant": "zero"}, (0.1,)),
)
_QUICK = ("dpo_loss", "orpo_loss", "kto_loss")


def _inputs(seed: int, n: int, device: str, loss: Loss) -> Inputs:
    """Answers of 20 to 400 tokens at about one nat each; the reference differs by a few nats."""
    g = torch.Generator(device).manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(n, generator=g, device=device) * (high - low) + low

    def normal(scale: float) -> Tensor:
        return torch.randn(n, generator=g, device=device) * scale

    nc, nr = uniform(20, 400).round(), uniform(20, 400).round()
    pc, pr = -nc * uniform(0.5, 1.5), -nr * uniform(0.5, 1.5)
    order = torch.randperm(n, generator=g, device=device)
    chosen, rejected = order[: n // 2].sort().values, order[n // 2 :].sort().values
    kl = -uniform(20, 400)
    made = {
        "pc": pc, "pr": pr, "rc": pc + normal(5), "rr": pr + normal(5), "nc": nc, "nr": nr,
        "mc": pc / nc, "mr": pr / nr, "nll": -pc / nc,
        "kl": kl, "ref_kl": kl - normal(5) - 1, "chosen": chosen, "rejected": rejected,
        "good": torch.zeros(n, device=device).index_fill_(0, chosen, 1.0),
    }  # fmt: skip
    used = {*loss.policy, *loss.rest, *(loss.eager_rest or ())}
    for name in loss.policy:
        made[name] = made[name].requires_grad_()
    return Inputs({name: x for name, x in made.items() if name in used}, loss.policy)


def case(loss: Loss, n: int, device: str, targets: tuple[Target, ...]) -> Case:
    arguments = (*loss.policy, *loss.rest)
    eager = (*loss.policy, *(loss.rest if loss.eager_rest is None else loss.eager_rest))

    def forward(function: ours.Function, x: Inputs) -> Tensor:
        return function(*(x[a] for a in arguments), **loss.keywords)  # type: ignore[no-any-return]

    def truth(x: Inputs) -> list[Tensor]:
        wide = {a: x[a].detach().double() for a in arguments}
        leaves = [wide[a].requires_grad_() for a in loss.policy]
        value = getattr(reference, loss.name)(*(wide[a] for a in arguments), **loss.keywords)
        return [value, *torch.autograd.grad(value, leaves)]

    cost = Cost("bytes", loss.formula, {"n": n})
    # On a GPU the sets together have to be larger than its last cache; eight pairs never are.
    many = 12 if device == "cuda" else 3
    return Case(
        op=f"preference.{loss.name}",
        mode="fwd+bwd",
        label="",
        shape=(n,),
        dtype="float32",
        device=device,
        make_inputs=lambda seed: _inputs(seed, n, device, loss),
        truth=truth,
        contenders=(
            *ours.contenders("hotloop.preference", loss.name, ours.pair_impls(device), forward),
            *plain.eager_and_compiled(
                loss.eager, lambda x: (*(x[a] for a in eager), *loss.eager_numbers)
            ),
        ),
        cost=cost,
        roof=_copy(int(cost.amount), device) if n >= 2**14 else None,
        roof_amount=cost.amount,
        targets=targets,
        sets=many,
        threads=1,
    )


def _copy(nbytes: int, device: str) -> Callable[[], Callable[[], object]]:
    """A plain copy that reads half the bytes and writes the other half."""

    def allocate() -> Callable[[], object]:
        source, to = (torch.ones(nbytes // 8, device=device) for _ in range(2))
        return lambda: to.copy_(source)

    return allocate


def _cases(loss: Loss) -> Callable[[Options], list[Case]]:
    def cases(options: Options) -> list[Case]:
        if options.quick:
            return (
                [case(loss, n, options.device, ()) for n in (2**12, FEW)]
                if loss.name in _QUICK
                else []
            )
        on_cpu = options.device == "cpu"
        found = [
            case(loss, MANY, options.device, _MANY_TARGETS if on_cpu else ()),
            case(loss, FEW, options.device, _FEW_TARGETS if on_cpu else ()),
        ]
        if options.device == "cuda":
            found.append(case(loss, 2**24, "cuda", ()))
        if options.sweep:
            found += [case(loss, 2**k, options.device, ()) for k in (6, 9, 12, 15, 18)]
        return found

    return cases


BENCHES = tuple(
    Bench(f"preference.{loss.name}", f"{loss.name} on summed log-probabilities", _cases(loss))
    for loss in LOSSES
)
