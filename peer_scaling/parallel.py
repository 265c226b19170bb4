"""A model on the ranks of a run: whose gradient goes where before an update.

Every rank has its share of each forward pass and the mean loss over it; the mean over ranks of
their gradients is the gradient of the step's mean loss. Dense parameters are left to PyTorch:
DistributedDataParallel (`ddp`: each rank has the whole model) or FSDP2 (`fsdp`: each rank keeps a
part of every block and of its optimiser state). Tables whose gradient comes as rows are whole on
every rank in both, and their rows are exchanged once per step:

    R (4 + b D) bytes from every rank to every other one, per table,

with R the rows that the rank with most of them picked in the step, D the table's width, b the bytes
of a number, 4 those of a row's number; and 8 bytes to say how many they are. With W ranks, a rank
sends (W - 1) times as much. All-reducing the table of N rows would send 2 (W - 1) / W N b D: rows
are less while R < 2 N / W, nearly, and no table-sized tensor is made.

Shape suffixes: B sequences, T time, N table rows, R rows of one rank's gradient, U rows of the
merged one, D width.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, cast, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from peer_scaling.adamw import coalesced
from peer_scaling.distributed import ALONE, World
from peer_scaling.ffw.base import FFW, Routing
from peer_scaling.kernels.segments import RowGradient
from peer_scaling.shards import is_sharded, local

PARALLEL = ("ddp", "fsdp")


class LossOutput(NamedTuple):
    """What `Losses` returns."""

    cross_entropy_sum: Tensor
    """Nats, summed over the tokens given; a scalar, float64."""
    aux_loss: Tensor
    """Scalar to add to the mean loss."""
    stats: Routing | None


class Losses(nn.Module):
    """A decoder and its loss as one module: what wraps a module sees all uses of its parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens_BT: Tensor) -> LossOutput:
        """Of int64 (B, T + 1) tokens: inputs are all but the last, targets all but the first."""
        output = self.model(tokens_BT[:, :-1])
        summed = output.cross_entropy_sum(tokens_BT[:, 1:])
        return LossOutput(summed, output.aux_loss, output.stats)


class Parallel(ABC):
    """How a model is spread over ranks."""

    def __init__(self, model: nn.Module, world: World) -> None:
        self.world = world
        self.whole: Losses | None = Losses(model)
        """Model and loss on this rank alone; None where it has parts of them."""
        self.losses: nn.Module = self.whole
        """What is called for a `LossOutput`."""
        self._tables = row_tables(model)

    @abstractmethod
    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Around the backward pass of a micro-batch, the last of its step or not."""

    def exchange(self, total: Tensor) -> Tensor:
        """After the last backward pass: exchange what is left; the sum of `total` over ranks."""
        for table in self._tables:
            exchange_rows(table, self.world)
        return self.world.sum_(total)

    def total_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """Norm of all gradients together."""
        return torch.nn.utils.get_total_norm(gradients)


@final
class Alone(Parallel):
    """One process: nothing to exchange."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, ALONE)

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Nothing to do."""
        return nullcontext()

    def exchange(self, total: Tensor) -> Tensor:
        """Nothing to do."""
        return total


@final
class Replicated(Parallel):
    """DistributedDataParallel."""

    def __init__(self, model: nn.Module, world: World, sequences_BT: Tensor) -> None:
        """`sequences_BT` are tokens of the shape that a rank's forward pass will have."""
        super().__init__(model, world)
        self._ddp = _ddp(self.losses, self._tables)
        self._lay_out(model, sequences_BT)
        self.losses = self._ddp

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """DDP all-reduces in the last backward pass alone."""
        return nullcontext() if last else cast(AbstractContextManager[None], self._ddp.no_sync())

    def _lay_out(self, model: nn.Module, sequences_BT: Tensor) -> None:
        """DDP lays its buckets out anew after the first backward pass, and from 3 ranks on the
        order of a sum depends on its place there. That pass is made here, without a trace, so that
        a run that was continued has the bits of one that was not.
        """
        model.eval()  # keeps running statistics as they are
        output = self._ddp(sequences_BT)
        (output.cross_entropy_sum + output.aux_loss).backward()
        model.train()
        model.zero_grad(set_to_none=True)


@final
class Sharded(Parallel):
    """FSDP2: `fully_shard` for each block and for the rest; tables are left whole."""

    def __init__(self, model: nn.Module, world: World) -> None:
        super().__init__(model, world)
        self.whole = None
        from torch.distributed.fsdp import fully_shard

        tables = set(self._tables)
        blocks = cast(Iterable[nn.Module], model.blocks)
        for block in (*blocks, self.losses):
            # Resharded always: between steps, all that is kept of a parameter is its parts.
            fully_shard(block, reshard_after_forward=True, ignored_params=tables)

    @contextmanager
    def _synchronised(self, last: bool) -> Iterator[None]:
        self.losses.set_requires_gradient_sync(last)  # pyright: ignore[reportCallIssue]
        yield

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """FSDP2 reduces and scatters in the last backward pass alone."""
        return self._synchronised(last)

    def total_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """Parts are summed over ranks; what every rank has whole counts once."""
        parts = torch.nn.utils.get_total_norm([local(g) for g in gradients if is_sharded(g)])
        rest = torch.nn.utils.get_total_norm([g for g in gradients if not is_sharded(g)])
        return (self.world.sum_(parts.square()) + rest.square()).sqrt()


def spread(model: nn.Module, kind: str, world: World, sequences_BT: Tensor) -> Parallel:
    """Spread a model over the ranks; before its optimiser is made, for parameters may be replaced.

    Args:
        model: a decoder on its device, with the same bits on all ranks.
        kind: one of `PARALLEL`; means nothing for one rank.
        world: the ranks.
        sequences_BT: tokens of the shape that a rank's forward pass will have.
    """
    if world.size == 1:
        return Alone(model)
    for layer in _layers(model):
        layer.spread(world)
    return Sharded(model, world) if kind == "fsdp" else Replicated(model, world, sequences_BT)


def row_tables(model: nn.Module) -> list[nn.Parameter]:
    """Tables of a model whose gradient comes as rows."""
    return [table for layer in _layers(model) for table in layer.row_tables]


@torch.no_grad()
def exchange_rows(table: nn.Parameter, world: World) -> None:
    """Make a table's gradient the mean of those of all ranks.

    Rows that several ranks picked are summed in the order of the ranks, so that all of them have
    the same bits. A gradient that came dense (`kernels=plain`) is all-reduced.
    """
    assert table.grad is not None
    if not table.grad.is_sparse:
        table.grad = world.sum_(table.grad) / world.size
        return
    grad = coalesced(table.grad)
    merged = merge_rows(gather_rows(RowGradient(grad.indices()[0], grad.values()), world))
    merged.grad_RD.div_(world.size)
    table.grad = merged.sparse(len(table))


def gather_rows(own: RowGradient, world: World) -> list[RowGradient]:
    """The rows of all ranks, each padded to the longest on its way."""
    counts = world.counts(len(own.row_R))
    missing = max(counts) - len(own.row_R)
    row_R, grad_RD = own.row_R.int(), own.grad_RD.contiguous()
    if missing:
        row_R, grad_RD = (
            functional.pad(row_R, (0, missing)),
            functional.pad(grad_RD, (0, 0, 0, missing)),
        )
    gathered = zip(world.gather(row_R), world.gather(grad_RD), counts, strict=True)
    return [RowGradient(rows[:n].long(), grads[:n]) for rows, grads, n in gathered]


def merge_rows(parts: Sequence[RowGradient]) -> RowGradient:
    """The sum of gradients, row by row in the order given."""
    row_U = torch.cat([part.row_R for part in parts]).unique()
    grad_UD = parts[0].grad_RD.new_zeros(len(row_U), parts[0].grad_RD.shape[1])
    for part in parts:
        grad_UD.index_add_(0, torch.searchsorted(row_U, part.row_R), part.grad_RD)
    return RowGradient(row_U, grad_UD)


def sent_bytes(rows: int, table_ND: Tensor) -> int:
    """Bytes that a rank sends to each other one for a table in a step in which the rank with most
    rows picked `rows`; without the 8 of their number.
    """
    return rows * (4 + table_ND.shape[1] * table_ND.element_size())


def _layers(model: nn.Module) -> list[FFW]:
    return [module for module in model.modules() if isinstance(module, FFW)]


def _ddp(losses: nn.Module, tables: Sequence[nn.Parameter]) -> nn.parallel.DistributedDataParallel:
    """Tables exchange their own rows; buffers are the same on all ranks as they are."""
    ignored = {id(table) for table in tables}
    names = [name for name, p in losses.named_parameters() if id(p) in ignored]
    names += [name for name, _ in losses.named_buffers()]
    wrapper = nn.parallel.DistributedDataParallel
    wrapper._set_params_and_buffers_to_ignore_for_model(losses, names)
    return wrapper(losses)
