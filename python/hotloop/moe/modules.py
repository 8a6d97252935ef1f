# SPDX-License-Identifier: Apache-2.0
"""``MoE``: a router, its experts and a shared expert as one ``nn.Module`` in the place of a feed-forward layer."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from ..front import check
from ..front.autocast import as_linear_takes
from ..front.impl import Impl
from ..reference.moe.experts import activate
from . import balance, router
from ._experts_arguments import activation_of
from .balance import Convention
from .experts import expert_mlp, expert_rows
from .results import Activation, Routing
from .router import Drop, GroupScore, Order, Scoring


class Losses(NamedTuple):
    """The auxiliary losses of one routing."""

    aux_loss: Tensor
    load_balance: Tensor | None
    z: Tensor | None
    routing: Routing


class MoEOutput(NamedTuple):
    """What a layer of experts returns."""

    output: Tensor
    """(..., D), the dtype of the input."""
    aux_loss: Tensor
    """(): the weighted sum of the losses below; add it to the loss of the model. 0 if both weights are 0."""
    load_balance: Tensor | None
    """(): the load-balance loss without its weight. None if the weight is 0."""
    z: Tensor | None
    """(): the router z-loss without its weight. None if the weight is 0."""
    routing: Routing
    """Of the T tokens of the input, flattened. Losses over several layers take a list of them."""


class Experts(nn.Module):
    """Parameters of E feed-forward experts, in the layout and under the names of transformers."""

    down_proj: nn.Parameter

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        gated: bool,
        bias: bool,
        device: Any,
        dtype: Any,
    ) -> None:
        super().__init__()
        self.gated = gated
        up = "gate_up_proj" if gated else "up_proj"
        columns = 2 * hidden_dim if gated else hidden_dim
        shapes: dict[str, tuple[int, ...]] = {
            up: (num_experts, columns, dim),
            "down_proj": (num_experts, dim, hidden_dim),
        }
        if bias:
            shapes |= {f"{up}_bias": (num_experts, columns), "down_proj_bias": (num_experts, dim)}
        for name, shape in shapes.items():
            self.register_parameter(
                name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            )

    @property
    def up(self) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias of the first product."""
        name = "gate_up_proj" if self.gated else "up_proj"
        return getattr(self, name), getattr(self, f"{name}_bias", None)

    @property
    def down(self) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias of the second product."""
        return self.down_proj, getattr(self, "down_proj_bias", None)

    def reset_parameters(self) -> None:
        """Every expert as an ``nn.Linear`` starts."""
        for weight, bias in (self.up, self.down):
            bound = 1 / math.sqrt(max(1, weight.shape[2]))
            nn.init.uniform_(weight, -bound, bound)
            if bias is not None:
                nn.init.uniform_(bias, -bound, bound)


class Router(nn.Module):
    """Logits of the experts, x W^T, in float32 or wider if asked for.

    No ``nn.Linear``: what replaces those in a model (adapters, quantization) would take its float32.
    """

    def __init__(self, dim: int, num_experts: int, wide: bool, device: Any, dtype: Any) -> None:
        super().__init__()
        self.wide = wide
        self.weight = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As an ``nn.Linear`` starts."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        if not self.wide:
            return functional.linear(x, self.weight)
        wide = torch.promote_types(torch.promote_types(x.dtype, self.weight.dtype), torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return functional.linear(x.to(wide), self.weight.to(wide))


class MoE(nn.Module):
    """A sparse mixture of experts in the place of a feed-forward layer.

    logits = x W_r^T; the router chooses top_k of E experts for every token (``route``); y = sum_j g_j E_j(x) over the
    chosen, plus the shared expert's S(x) where there is one. An expert is down(act(gate(x)) * up(x)), or
    down(act(up(x))) for an activation without a gate.

    The auxiliary losses are in the result, not in an attribute: so they pass through activation checkpoints,
    ``torch.compile`` and DDP, and a copy of the layer holds no graph.

    Args:
        dim: D, >= 1.
        hidden_dim: I, inner numbers of an expert, >= 1.
        num_experts: E, 1 to 4096.
        top_k: experts of a token, 1 to min(E, 128).
        activation: of the experts: an ``Activation`` or its kind. Default "swiglu".
        bias: whether the products of the experts have biases. Default False.
        shared_hidden_dim: inner numbers of an expert that every token visits with weight 1; 0 for none. Default 0.
        scoring, order, renormalize, n_group, topk_group, group_score, routed_scale: of the router, as in ``route``.
        bias_rate: step of the auxiliary-loss-free balance, > 0 (DeepSeek-V3: 1e-3): the layer has a ``routing_bias``
            that ``update_bias`` moves. None: no such bias. Default None.
        load_balance_weight: >= 0; 0.01 in the Switch paper. Default 0.
        z_loss_weight: >= 0; 1e-3 in ST-MoE. Default 0.
        convention: of the load-balance loss, "switch", "mixtral" or "fastmoe". Default "switch".
        capacity_factor: every expert takes at most ceil(capacity_factor * T * top_k / E) tokens, > 0. None: all of
            them. Default None.
        drop: which tokens beyond the capacity are dropped, the last ("position") or those of the smallest weight
            ("weight"). Default "position".
        router_float32: compute the logits in float32 (float64 for float64 input) whatever the dtype of the layer and
            of autocast. Default True.
        impl: as in the ops. Default "auto".
        device, dtype: of the parameters.

    Shape:
        x (..., D) to output (..., D); ``token_mask`` (...) says which tokens count, None for all. Padding tokens are
        read as 0, visit no routed expert and enter no loss.

    Examples:
        >>> import torch
        >>> layer = MoE(16, 32, num_experts=8, top_k=2, load_balance_weight=0.01)
        >>> found = layer(torch.randn(4, 10, 16))
        >>> found.output.shape, int(found.routing.expert_counts.sum())
        (torch.Size([4, 10, 16]), 80)

    Reference:
        Shazeer et al. 2017, arXiv:1701.06538; load balance: Fedus et al. 2021, arXiv:2101.03961; z-loss: Zoph et al.
        2022, arXiv:2202.08906; shared experts, bias: DeepSeek-AI 2024, arXiv:2412.19437.
    """

    routing_bias: Tensor | None
    pending_counts: Tensor | None

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        top_k: int,
        *,
        activation: str | Activation = "swiglu",
        bias: bool = False,
        shared_hidden_dim: int = 0,
        scoring: Scoring = "softmax",
        order: Order = "softmax_then_topk",
        renormalize: bool = True,
        n_group: int = 1,
        topk_group: int | None = None,
        group_score: GroupScore = "top2",
        routed_scale: float = 1.0,
        bias_rate: float | None = None,
        load_balance_weight: float = 0.0,
        z_loss_weight: float = 0.0,
        convention: Convention = "switch",
        capacity_factor: float | None = None,
        drop: Drop = "position",
        router_float32: bool = True,
        impl: Impl = "auto",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        self.dim = check.integer(op, "dim", dim, at_least=1)
        self.hidden_dim = check.integer(op, "hidden_dim", hidden_dim, at_least=1)
        self.num_experts = check.integer(op, "num_experts", num_experts, at_least=1, at_most=4096)
        most = min(self.num_experts, 128)
        self.top_k = check.integer(op, "top_k", top_k, at_least=1, at_most=most)
        router.select(
            op, torch.zeros((0, self.num_experts), device="cpu", dtype=torch.float32), top_k, scoring, order,
            renormalize, n_group, topk_group, group_score, routed_scale,
        )  # fmt: skip
        shared_hidden_dim = check.integer(op, "shared_hidden_dim", shared_hidden_dim, at_least=0)
        self.bias_rate = None if bias_rate is None else check.number(op, "bias_rate", bias_rate, above=0)  # fmt: skip
        self.load_balance_weight = check.number(op, "load_balance_weight", load_balance_weight, at_least=0)  # fmt: skip
        self.z_loss_weight = check.number(op, "z_loss_weight", z_loss_weight, at_least=0)
        check.choice(op, "convention", convention, ("switch", "mixtral", "fastmoe"))
        check.choice(op, "drop", drop, ("position", "weight"))
        if capacity_factor is not None:
            capacity_factor = check.number(op, "capacity_factor", capacity_factor, above=0)
        self.convention, self.drop, self.capacity_factor = convention, drop, capacity_factor
        self.router_float32 = check.flag(op, "router_float32", router_float32)
        self.activation = activation_of(op, activation)
        self.scoring, self.order, self.renormalize = scoring, order, renormalize
        self.n_group, self.topk_group, self.group_score = n_group, topk_group, group_score
        self.routed_scale, self.impl = routed_scale, impl
        options = (self.activation.gated, check.flag(op, "bias", bias), device, dtype)
        self.router = Router(dim, num_experts, self.router_float32, device, dtype)
        self.experts = Experts(dim, hidden_dim, num_experts, *options)
        self.shared = None
        if shared_hidden_dim:
            self.shared = Experts(dim, shared_hidden_dim, 1, *options)
        self.register_buffer("routing_bias", None)
        # No buffer: DistributedDataParallel makes those of all ranks those of the first one in every forward pass, so
        # what other ranks counted since the last update would be lost.
        self.pending_counts = None
        if self.bias_rate is not None:
            zeros = torch.zeros(num_experts, device=device, dtype=torch.float32)
            self.routing_bias, self.pending_counts = zeros, zeros.long()
        self.experts.reset_parameters()
        if self.shared is not None:
            self.shared.reset_parameters()

    def reset_parameters(self) -> None:
        """Start anew: router and experts as an ``nn.Linear`` starts, the bias of the routing at 0."""
        self.router.reset_parameters()
        self.experts.reset_parameters()
        if self.shared is not None:
            self.shared.reset_parameters()
        if self.routing_bias is not None and self.pending_counts is not None:
            self.routing_bias.zero_()
            self.pending_counts.zero_()

    @torch.no_grad()
    def load_dense(
        self,
        gate_up: Tensor,
        down: Tensor,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> None:
        """Make every expert, and the shared one, a copy of a feed-forward layer that is already trained.

        The router stays as it is. The shared expert is left alone if it has another size.

        Args:
            gate_up: of the layer, (2 I, D): all gates, then all values; (I, D) for an activation without a gate.
            down: (D, I).
            gate_up_bias: (2 I,) or (I,), where the experts have biases.
            down_bias: (D,).
        """
        op = type(self).__name__
        given = {
            "gate_up": gate_up,
            "down": down,
            "gate_up_bias": gate_up_bias,
            "down_bias": down_bias,
        }
        (up, up_bias), (back, back_bias) = self.experts.up, self.experts.down
        wanted = dict(zip(given, (up, back, up_bias, back_bias)))
        for name, value in given.items():
            target = wanted[name]
            if (value is None) != (target is None):
                raise ValueError(
                    f"[{op}] {name}: expected {'None' if target is None else 'a tensor'} in a layer with "
                    f"bias={up_bias is not None}, got {type(value).__name__}."
                )
            if value is not None and target is not None:
                check.float_tensor(op, name, value)
                check.shape(op, name, value, tuple(target.shape[1:]), "of one expert")
        for part in (self.experts, self.shared):
            if part is None or part.down_proj.shape[1:] != down.shape:
                continue
            for target, value in zip(
                (*part.up, *part.down), (gate_up, gate_up_bias, down, down_bias)
            ):
                if target is not None and value is not None:
                    target.copy_(value)

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> MoEOutput:
        flat = self._read(x, token_mask)
        routing = self.route(flat, token_mask)
        assert routing.dispatch is not None
        read, options = self._experts(flat)
        out = expert_mlp(
            read, topk_weights=routing.topk_weights, dispatch=routing.dispatch, shared=self._shared_rows(read),
            **options,
        )  # fmt: skip
        losses = self.losses(routing)
        shown = out.to(x.dtype).view(x.shape)
        return MoEOutput(shown, losses.aux_loss, losses.load_balance, losses.z, routing)

    def expert_rows(
        self, x: Tensor, token_mask: Tensor | None = None
    ) -> tuple[Tensor, Routing, Tensor | None]:
        """What the experts make of tokens, before it is added up: for ops that do so in a pass of their own.

        Args:
            x: as in ``forward``, (..., D) of T tokens.
            token_mask: as in ``forward``.

        Returns:
            Rows of the experts (R, D) in the order of routing.dispatch, the routing, and the rows of the shared expert
            (T, D), or None.
        """
        flat = self._read(x, token_mask)
        routing = self.route(flat, token_mask)
        assert routing.dispatch is not None
        read, options = self._experts(flat)
        rows = expert_rows(read, dispatch=routing.dispatch, **options)
        return rows, routing, self._shared_rows(read)

    def route(self, x: Tensor, token_mask: Tensor | None = None) -> Routing:
        """The routing of tokens (T, D), with the order of their expert rows. In training it counts for the bias."""
        mask = None if token_mask is None else token_mask.reshape(-1) != 0
        routing = router.route(
            self.router(x), self.top_k, scoring=self.scoring, order=self.order, renormalize=self.renormalize,
            n_group=self.n_group, topk_group=self.topk_group, group_score=self.group_score, bias=self.routing_bias,
            routed_scale=self.routed_scale, token_mask=mask, dispatch=self.capacity_factor is None, impl=self.impl,
        )  # fmt: skip
        if self.capacity_factor is not None:
            share = self.capacity_factor * x.shape[0] * self.top_k / self.num_experts
            routing = routing._replace(dispatch=router.dispatch(
                routing.topk_ids, self.num_experts, capacity=max(1, math.ceil(share)), drop=self.drop,
                topk_weights=routing.topk_weights if self.drop == "weight" else None, impl=self.impl,
            ))  # fmt: skip
        if self.training and self.pending_counts is not None:
            if self.pending_counts.device != x.device:
                # FSDP moves parameters and buffers, and no other tensor.
                self.pending_counts = self.pending_counts.to(x.device)
            _count(self.pending_counts, routing.expert_counts)
        return routing

    def losses(self, routing: Routing) -> Losses:
        """The auxiliary losses of a routing of this layer."""
        total = routing.prob_sums.new_zeros(())
        load = z = None
        if self.load_balance_weight:
            load = balance.load_balance_loss(routing, self.convention)
            total = total + self.load_balance_weight * load
        if self.z_loss_weight:
            z = balance.router_z_loss(routing)
            total = total + self.z_loss_weight * z
        return Losses(total, load, z, routing)

    @torch.no_grad()
    def update_bias(self, group: Any = None) -> None:
        """Move ``routing_bias`` by ``bias_rate`` towards balance, from the counts since the last call; forget them.

        Once per optimizer step. Where torch.distributed is initialised the counts are first summed over ``group``.
        """
        if self.routing_bias is None or self.pending_counts is None or self.bias_rate is None:
            raise ValueError(
                f"[{type(self).__name__}] bias_rate: expected a rate for a bias to update, got None. "
                "Pass bias_rate=1e-3 when the layer is made."
            )
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(self.pending_counts, group=group)
        balance.update_routing_bias(self.routing_bias, self.pending_counts, self.bias_rate)
        self.pending_counts.zero_()

    def extra_repr(self) -> str:
        shown = ("dim", "hidden_dim", "num_experts", "top_k", "scoring")
        sizes = ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)
        return f"{sizes}, activation={self.activation.kind!r}"

    def _read(self, x: Any, token_mask: Any) -> Tensor:
        """Check x (..., D) and its mask; return tokens (T, D), those that do not count as 0."""
        op = type(self).__name__
        check.float_tensor(op, "x", x)
        if x.ndim < 1 or x.shape[-1] != self.dim:
            raise ValueError(
                f"[{op}] x: expected shape (..., {self.dim}), got {tuple(x.shape)}. {self.dim} is dim."
            )
        check.same_place(op, "x", x, "the parameters", self.experts.down_proj)
        flat: Tensor = x.reshape(-1, self.dim)
        if token_mask is None:
            return flat
        check.tensor(op, "token_mask", token_mask)
        check.shape(
            op, "token_mask", token_mask, tuple(x.shape[:-1]), "like x", "Pass one per token."
        )
        # Else a NaN there would make the gradient of the router NaN: 0 times it.
        return torch.where(token_mask.reshape(-1, 1) != 0, flat, 0.0)

    def _experts(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Tokens and parameters in the dtype of the products, the latter by keyword."""
        (up, up_bias), (down, down_bias) = self.experts.up, self.experts.down
        read, *narrow = as_linear_takes(x, up, down, up_bias, down_bias)
        names = ("gate_up", "down", "gate_up_bias", "down_bias")
        options = {"activation": self.activation, "impl": self.impl}
        return read, {**dict(zip(names, narrow)), **options}

    def _shared_rows(self, x: Tensor) -> Tensor | None:
        if self.shared is None:
            return None
        up, down = (
            (w[0], None if b is None else b[0]) for w, b in (self.shared.up, self.shared.down)
        )
        return functional.linear(activate(functional.linear(x, *up), self.activation), *down)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        bias, counts = self.routing_bias, self.pending_counts
        found = super()._apply(fn, recurse)
        moved = self.routing_bias
        if bias is None or moved is None or counts is None:
            return found
        if moved.dtype != bias.dtype:
            # It stays float32 in a layer of bfloat16, where steps of 1e-3 would be lost.
            self.routing_bias = (
                torch.empty_like(moved, dtype=bias.dtype) if bias.is_meta else bias.to(moved.device)
            )
        # Not by fn, which may leave memory as it is (``to_empty``): counts are in no file that would fill it.
        self.pending_counts = (
            torch.zeros_like(counts, device=moved.device)
            if counts.is_meta
            else counts.to(moved.device)
        )
        return found


@torch.library.custom_op("hotloop::moe_count", mutates_args=("pending",))
def _count(pending: Tensor, counts: Tensor) -> None:
    """Add counts to those of the bias, but for a forward pass that a backward computes again for a checkpoint.

    An operator, since a compiled graph cannot ask; it may itself lie inside a checkpoint.
    """
    if torch._C._current_graph_task_id() == -1:
        pending.add_(counts)


@_count.register_fake
def _(pending: Tensor, counts: Tensor) -> None:
    return None
