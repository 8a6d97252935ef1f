# SPDX-License-Identifier: Apache-2.0
"""``HashEmbedding`` and ``HashEmbeddingBag``: ``nn.Embedding`` and ``nn.EmbeddingBag`` over any 64-bit ids."""

from __future__ import annotations

from ..front.needs import torch_for

torch_for("table.modules")

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.rules import RowOptimizer
from ..front import check
from . import _answers, _convert, _export, _kept, _lookups
from ._kept import KeptGradients
from .files import state_dict
from .filters import CountFilter, ProbabilisticFilter
from .initializers import Initializer
from .results import Rows
from .table import Table

if TYPE_CHECKING:
    from typing_extensions import Self

MODES = ("sum", "mean", "max")
_SETTINGS = {
    name: parameter.default
    for name, parameter in inspect.signature(Table).parameters.items()
    if name not in ("dim", "optimizer")
}


class _HashModule(nn.Module):
    _mode = "sum"

    def __init__(self, given: dict[str, Any]) -> None:
        """``given``: the arguments of the module by name."""
        super().__init__()
        op = type(self).__name__
        embedding_dim, table, optimizer, padding_idx, update = (
            given[name] for name in ("embedding_dim", "table", "optimizer", "padding_idx", "update")
        )
        settings = {name: given[name] for name in _SETTINGS}
        check.choice(op, "update", update, ("backward", "step"))
        check.instance(op, "table", table, Table, type(None))
        if table is None:
            try:
                table = Table(embedding_dim, optimizer=optimizer, **settings)
            except (TypeError, ValueError, NotImplementedError) as error:
                raise _answers.renamed(op, error) from None
        elif optimizer is not None or any(v != _SETTINGS[k] for k, v in settings.items()):
            raise ValueError(f"[{op}] table: expected a table or its settings, got both.")
        if table.dim != embedding_dim:
            raise ValueError(
                f"[{op}] table: expected dim {embedding_dim} like embedding_dim, got {table.dim}."
            )
        if table.evict_strategy == "custom" and table.optimizer is not None:
            raise ValueError(
                f"[{op}] table: expected an evict_strategy whose scores follow from use, got 'custom', for which a "
                "training lookup has none. Take 'lru', 'lfu' or an epoch strategy, or train with Table.update."
            )
        self.table = table
        self.embedding_dim = embedding_dim
        if padding_idx is not None:
            most = 2**63 - 1
            padding_idx = check.integer(
                op, "padding_idx", padding_idx, at_least=-most - 1, at_most=most
            )
        self.padding_idx = padding_idx
        self.update = update
        self._held = _lookups.Held(table, self._mode)
        self._held.fused = update == "backward"
        self.sharded = False
        """Whether every rank of a DDP model holds ids of its own, divided in another way than by salted_hash_bucket."""
        self.rows_in_state_dict = True
        """False leaves rows out of ``state_dict``, for formats that hold tensors only or of known shapes: save them by
        ``table.save``."""
        self._told = [False, False]  # that nothing is learnt; that DDP reduces nothing

    def _look_up(self, ids: Tensor, offsets: Tensor | None, weights: Tensor | None) -> Tensor:
        if torch._C._get_tracing_state() is not None:
            raise _answers.stays_here(type(self).__name__, "torch.jit.trace")
        number = self._held.number
        training = (
            self.training and self.table.optimizer is not None and self._held.anchor.requires_grad
        )
        anchor = self._held.anchor if training else self._held.anchor.detach()
        of_weights = weights is not None and weights.requires_grad
        learns = (training or of_weights) and torch.is_grad_enabled()
        args = (ids, offsets, weights, number, training, of_weights and learns)
        if self.training and not torch.compiler.is_compiling():
            self._warn(ids, training)
        if torch.compiler.is_compiling():
            if getattr(torch.compiler, "is_exporting", bool)():
                raise _answers.stays_here(type(self).__name__, "torch.export")
            looked: Tensor = _lookups.lookup_op(anchor, *args)[0]
            return looked
        if not learns:
            return _lookups.forward(*args)[0]
        out: Tensor = _lookups.Direct.apply(anchor, *args)
        return out

    def _warn(self, ids: Tensor, training: bool) -> None:
        op, told = type(self).__name__, self._told
        if training:
            told[1] = told[1] or self.sharded or _answers.warn_unreduced(op, ids)
        elif not told[0] and self.table.optimizer is None and self.table.dtype != "int8":
            if self._held.anchor.requires_grad and torch.is_grad_enabled():
                told[0] = True
                _answers.warn_untaught(op)

    @property
    def time(self) -> int | None:
        """Second of the uses that follow, for ``table.expire`` on the data's own clock; None is now (the default)."""
        return self._held.time

    @time.setter
    def time(self, second: int | None) -> None:
        self._held.time = self._moment("time", second)

    @property
    def epoch(self) -> int | None:
        """Epoch of the uses that follow, for the epoch strategies; None (the default): the last the table was given."""
        return self._held.epoch

    @epoch.setter
    def epoch(self, epoch: int | None) -> None:
        self._held.epoch = self._moment("epoch", epoch)

    def _moment(self, name: str, value: int | None) -> int | None:
        if value is None:
            return None
        return check.integer(type(self).__name__, name, value, at_least=0, at_most=2**32 - 1)

    def step(self, *, optimizer: RowOptimizer | None = None, summed: bool = False) -> int:
        """Apply the gradients kept since the last step (``update="step"``); ``zero_grad`` drops them instead.

        Args:
            optimizer: another learning rate or decay for this step; the same state. Default: the table's, or the
                parameter group of a ``TableOptimizer``.
            summed: sum all that was kept, so that every row moves once, as torch's optimizers do; False moves rows
                lookup by lookup, in order. Default False.

        Returns:
            How many gradients found no row.
        Raises:
            ValueError: a gradient is NaN or infinite. Nothing was written, and all stay kept.
        """
        return _lookups.step(f"{type(self).__name__}.step", [self._held], optimizer, summed)

    def kept_gradients(self) -> KeptGradients:
        """Return what ``step`` would apply, summed per id as the gradient of a dense table: (ids (U,), grads (U, dim)).

        A copy. To clip in a way of your own, give ``table.update`` what you make of it and call ``zero_grad``.
        """
        return _kept.summed([self._held])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients kept for ``step``."""
        super().zero_grad(set_to_none)
        self._held.drop()

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Freeze the rows, or train them again: frozen, lookups are those of ``eval()``.

        A model's ``requires_grad_`` reaches parameters only, and rows are none: call that of each hash module.
        """
        super().requires_grad_(requires_grad)
        self._held.anchor.requires_grad_(requires_grad)
        return self

    def __prepare_scriptable__(self) -> Any:
        raise _answers.stays_here(type(self).__name__, "torch.jit.script")

    def _replicate_for_data_parallel(self) -> Any:
        raise NotImplementedError(
            f"[{type(self).__name__}] module: expected one process per device, got nn.DataParallel, which copies "
            "modules and not tables. Use DistributedDataParallel and exchange ids as docs/table.md shows."
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Rows stay where they are and of their type, whatever ``to``, ``half`` or ``cuda`` do to parameters."""
        if getattr(fn, "__qualname__", "").startswith("Module.share_memory"):
            raise NotImplementedError(
                f"[{type(self).__name__}] share_memory: expected rows to stay in one process, got a module to share: "
                "each process would train its own. Train in threads, or exchange ids as docs/table.md shows."
            )
        super()._apply(fn, recurse)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.rows_in_state_dict:
            del destination[prefix + "_extra_state"]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *others)
        _, _, missing_keys, *_ = others
        if not self.rows_in_state_dict and prefix + "_extra_state" in missing_keys:
            missing_keys.remove(prefix + "_extra_state")

    def get_extra_state(self) -> dict[str, Any]:
        """All rows and the filter, for ``state_dict``; large tables are better saved by ``table.save``."""
        if not self.rows_in_state_dict:
            return {}
        rows, table = self.table.export(), self.table
        state: dict[str, Any] = {
            name: torch.from_numpy(_plain(getattr(rows, name))) for name in rows._fields
        }
        return {**state, **state_dict.continued(table)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over all rows, and go on as if never stopped; settings are the module's own.

        The filter's sightings come with the rows, and so do the counts that "lru" and ``ProbabilisticFilter`` go by. A
        table whose rule keeps no state, or without one, leaves that of the rows behind; one without a filter that of
        the filter; of a state without one, the filter stays as it is.

        Raises:
            ValueError: the state is that of another rule, of another filter or of other shapes. Nothing is changed.
        """
        op, table = f"{type(self).__name__}.load_state_dict", self.table
        check.entries(op, state, Rows._fields)
        block: dict[str, Any] = {
            name: check.tensor(op, name, state[name]).detach().cpu().contiguous().numpy()
            for name in Rows._fields
        }
        values = _convert.stored(op, block["values"], block["keys"], table)
        block["values"] = _export.filed(values, table)
        if block["last_use"].dtype == np.int32:
            block["last_use"] = block["last_use"].view(np.uint32)
        rule = None if table.optimizer is None else type(table.optimizer).__name__
        if table.state_width and state.get("optimizer", rule) != rule:
            raise ValueError(
                f"[{op}] state: expected that of {table.optimizer!r}, got the state of {state['optimizer']}. "
                "Make a module with the optimizer of the one saved."
            )
        n, columns = _export.fitting(op, table, block, ValueError)
        if table.evict_strategy == "none" and n > (table.max_capacity or n):
            raise ValueError(
                f"[{op}] keys: expected at most max_capacity = {table.max_capacity} rows, got {n}."
            )
        counts = state_dict.counts_of(op, state)
        # All of it or none; the last that may be refused.
        state_dict.take_over_admission(op, table, state)
        self._held.drop()  # gradients of rows that are about to go
        table.clear()
        if n:
            table._native.import_rows(n, columns, True)
            table._native.trim()  # the rows with the highest scores stay
        if counts is not None:
            table._native.tick, table._epoch, table._step = counts

    def extra_repr(self) -> str:
        rule = self.table.optimizer
        return f"{self.embedding_dim}, rows={len(self.table)}, optimizer={rule!r}, update={self.update!r}"


def _plain(x: Any) -> Any:
    return x.view("int32") if x.dtype == "uint32" else x


def _ids(op: str, name: str, value: Any, at: str, *ndims: int) -> Tensor:
    if not isinstance(value, Tensor) or value.dtype not in (torch.int64, torch.int32):
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"[{op}] {name}: expected an int64 or int32 tensor, got {got}.")
    if ndims and value.ndim not in ndims:
        raise ValueError(
            f"[{op}] {name}: expected {' or '.join(map(str, ndims))} dimension(s), got shape {tuple(value.shape)}."
        )
    if str(value.device) != at:
        if at != "cpu":
            raise ValueError(
                f"[{op}] {name}: expected a tensor on {at} like the table, got {value.device}. Move it first."
            )
        raise NotImplementedError(
            f"[{op}] {name}: expected a tensor on the CPU, got {value.device}."
        )
    return value.long()


class HashEmbedding(_HashModule):
    """``nn.Embedding`` over a dynamic table: any 64-bit id has a row of its own, made when training first meets it.

    ``forward(input)``: (...) int64 or int32 -> (..., embedding_dim). In ``train()`` unknown ids get rows (if
    ``admission`` lets them) and backward applies the row optimizer; in ``eval()``, and without an optimizer, nothing
    changes; ``no_grad`` alone does not keep rows from being made. Ids without a row, and ``padding_idx``, give zeros
    and take no gradient. The rows are no ``Parameter``: other optimizers do not see them, a model's ``zero_grad`` does
    not drop what ``update="step"`` keeps (the module's own does), DDP does not reduce them; under DDP give every rank a
    shard of the ids, as docs/table.md shows. With ``track="use"``, set ``module.time`` to the second of the data that
    follow, with an epoch strategy ``module.epoch``; "custom" scores have no place in a training lookup. ``deepcopy``
    and ``pickle`` copy the table too, as a table of its own.

    Rows move when a backward is through, so all of its lookups, those of checkpoints too, see the rows of forward; a
    backward that raises moves none, and neither does ``torch.autograd.grad`` with respect to other tensors (in a
    compiled graph it does). Every lookup of a graph is a step of the row optimizer. ``create_graph=True`` is refused.

    ``to``, ``half`` and ``cuda`` leave rows where and as they are; ``torch.export``, ``torch.jit``, ``nn.DataParallel``
    and ``share_memory`` are refused. ``module.rows_in_state_dict = False`` leaves rows out of ``state_dict`` for
    torch.distributed.checkpoint and safetensors: save them by ``table.save``. A warning says once where rows learn
    nothing for want of an optimizer, and where ranks under DDP share ids.

    Args:
        embedding_dim: width of a row.
        table: an existing ``Table``, or None to make one of the settings.
        optimizer: row optimizer, e.g. ``RowwiseAdagrad(lr=0.02)``.
        padding_idx: id that gives zeros. Default None.
        update: "backward" applies gradients in backward, fused; "step" keeps them until ``step()``, for clipping, loss
            scaling or accumulation: see ``TableOptimizer``. Default "backward".
        capacity, max_capacity, evict_strategy, admission, dtype, initializer, track, device, hash_seed: of the
            ``Table`` that is made where none is given.

    Examples:
        >>> import torch
        >>> from hotloop.table import SGD
        >>> layer = HashEmbedding(4, optimizer=SGD(lr=0.1))
        >>> layer(torch.tensor([[5, -3], [2**62, 5]])).shape
        torch.Size([2, 2, 4])

    Reference:
        Liu et al. 2022, "Monolith", arXiv:2209.07663.
    """

    @_answers.answers
    def __init__(
        self,
        embedding_dim: int,
        *,
        table: Table | None = None,
        optimizer: RowOptimizer | None = None,
        padding_idx: int | None = None,
        update: str = "backward",
        capacity: int | None = None,
        max_capacity: int | None = None,
        evict_strategy: str = "none",
        admission: CountFilter | ProbabilisticFilter | None = None,
        dtype: str = "float32",
        initializer: Initializer | None = None,
        track: Sequence[str] = (),
        device: Any = None,
        hash_seed: int | None = None,
    ) -> None:
        super().__init__(locals())

    def forward(self, input: Tensor) -> Tensor:
        ids = _ids("HashEmbedding", "input", input, self.table.device)
        flat = ids.reshape(-1)
        if self.padding_idx is None:
            out = self._look_up(flat.contiguous(), None, None)
        else:  # bags of one or none
            keep = flat != self.padding_idx
            offsets = nn.functional.pad(keep.cumsum(0), (1, 0))
            out = self._look_up(flat[keep], offsets, None)
        return out.reshape(*ids.shape, self.embedding_dim)


class HashEmbeddingBag(_HashModule):
    """``nn.EmbeddingBag`` over a dynamic table; see ``HashEmbedding`` for what training does.

    ``forward(input, offsets=None, per_sample_weights=None)``: input (B, N), or (n,) with offsets (B,) (or (B + 1,) with
    ``include_last_offset``) -> (B, embedding_dim). Lookup, pooling, gradient and update are fused: there is
    no (n, dim) array, but where ``per_sample_weights`` require a gradient: forward keeps the rows for it. Ids without a
    row and ``padding_idx`` are left out, of the count of a mean too.

    Args:
        embedding_dim, table, optimizer, padding_idx, update, and settings of a table: as in ``HashEmbedding``.
        mode: "sum", "mean" or "max". Default "mean", as in torch.
        include_last_offset: offsets end with n. Default False.

    Examples:
        >>> import torch
        >>> from hotloop.table import SGD
        >>> layer = HashEmbeddingBag(4, mode="sum", optimizer=SGD(lr=0.1))
        >>> layer(torch.tensor([5, 7, 5]), torch.tensor([0, 2])).shape
        torch.Size([2, 4])
    """

    @_answers.answers
    def __init__(
        self,
        embedding_dim: int,
        *,
        mode: str = "mean",
        table: Table | None = None,
        optimizer: RowOptimizer | None = None,
        padding_idx: int | None = None,
        include_last_offset: bool = False,
        update: str = "backward",
        capacity: int | None = None,
        max_capacity: int | None = None,
        evict_strategy: str = "none",
        admission: CountFilter | ProbabilisticFilter | None = None,
        dtype: str = "float32",
        initializer: Initializer | None = None,
        track: Sequence[str] = (),
        device: Any = None,
        hash_seed: int | None = None,
    ) -> None:
        check.choice("HashEmbeddingBag", "mode", mode, MODES)
        self._mode = mode
        super().__init__(locals())
        self.mode = mode
        self.include_last_offset = include_last_offset

    def forward(
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        op = "HashEmbeddingBag"
        ids = _ids(op, "input", input, self.table.device, 1, 2)
        weights = self._weights(per_sample_weights, input)
        if ids.ndim == 2:
            if offsets is not None:
                raise ValueError(f"[{op}] offsets: expected None with a two-dimensional input.")
            bags, per_bag = ids.shape
            bounds = torch.arange(bags + 1, device=ids.device) * per_bag
        else:
            bounds = self._bounds(offsets, ids)
        flat = ids.reshape(-1).contiguous()
        if self.padding_idx is not None:
            keep = flat != self.padding_idx
            kept = nn.functional.pad(keep.cumsum(0), (1, 0))
            bounds, flat = kept[bounds], flat[keep]
            weights = None if weights is None else weights[keep]
        return self._look_up(flat, bounds, weights)

    def _weights(self, weights: Tensor | None, input: Tensor) -> Tensor | None:
        op = "HashEmbeddingBag"
        if weights is None:
            return None
        if self.mode != "sum":
            raise ValueError(
                f'[{op}] per_sample_weights: expected mode "sum", got "{self.mode}". torch has the same rule.'
            )
        if not isinstance(weights, Tensor) or not weights.is_floating_point():
            got = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
            raise TypeError(f"[{op}] per_sample_weights: expected a tensor of floats, got {got}.")
        check.shape(op, "per_sample_weights", weights, tuple(input.shape), "like input")
        return weights.reshape(-1).float().contiguous()

    def _bounds(self, offsets: Tensor | None, ids: Tensor) -> Tensor:
        op = "HashEmbeddingBag"
        if offsets is None:
            raise ValueError(
                f"[{op}] offsets: expected where the bags of a one-dimensional input begin, got None."
            )
        offsets = _ids(op, "offsets", offsets, self.table.device, 1)
        n = ids.shape[0]
        if not self.include_last_offset:
            offsets = nn.functional.pad(offsets, (0, 1), value=n)
        if not torch.compiler.is_compiling():
            steps = offsets.diff()
            if (
                offsets.numel() == 0
                or int(offsets[0]) != 0
                or int(offsets[-1]) != n
                or bool((steps < 0).any())
            ):
                raise ValueError(
                    f"[{op}] offsets: expected 0 first, then no decrease, at most {n}, got {offsets.tolist()[:8]}."
                )
        return offsets.contiguous()
