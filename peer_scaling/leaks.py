"""The search for leaks: tokens are changed, and what must not depend on them is compared.

Shape suffixes: B sequences, T time (the model's inputs), V vocabulary, D model width, M tokens.
"""

from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor
from torch.nn import functional

from peer_scaling.distributed import World
from peer_scaling.kernels.cross_entropy import cross_entropy_sum
from peer_scaling.parallel import Losses
from peer_scaling.probing import Embedded, Probe, Seen, constant, see, set_mode

LATER, OTHERS, ORDER, LABELS, DOCUMENT = (
    "later tokens",
    "other sequences",
    "order of sequences",
    "labels",
    "earlier document",
)


@dataclass(frozen=True)
class Leak:
    """Something that a prediction depends on and must not."""

    kind: str
    """What it sees: one of the five names above."""
    place: str
    """Where that was found."""
    size: float
    unit: str = "logits"
    """Of `size`: `logits` (the largest change of one), `nats per token` of the loss, or `nats per
    unit of an embedding`."""

    def __str__(self) -> str:
        return f"{self.kind}: {self.place} ({self.size:.2g} {self.unit})"


@dataclass(frozen=True)
class Tolerance:
    """What counts as equal."""

    relative: float
    """Of hidden states and gradients, in units of their largest number."""
    nats: float
    """Of the mean loss per token, which is summed in another order here."""


BITS = Tolerance(0.0, 1e-5)
DOUBLE = Tolerance(1e-12, 1e-9)
COARSE = Tolerance(1e-4, 1e-4)
"""On devices without float64."""
ROUNDING = 1e-5
"""Relative to the largest number; a batch that is coupled in training is off by more."""


class Moved(NamedTuple):
    """The place where outputs that must be equal differ most."""

    sequence: int
    time: int
    size: float
    """Largest change of a logit there."""


class Graph(NamedTuple):
    """A loss and what it came from."""

    loss: Tensor
    """Of the tokens within prefixes, nats."""
    embedded: list[Tensor]
    """(B, T, D) each."""


@final
class Search:
    """Perturbations at one precision. Every rank of several makes the same forward passes."""

    def __init__(self, losses: Losses, tokens: Probe, tolerance: Tolerance, world: World) -> None:
        self._losses, self._probe, self._world = losses, tokens, world
        self._tolerance, self._spread = tolerance, 0.0

    def is_clean(self) -> bool:
        """Whether everything at once moves nothing: suffixes, other sequences and their order. In
        evaluation; says not what it was.
        """
        base, graph = self._base()
        return not (
            self._moved_by_all(base)
            or self._label_leaks(base)
            or self._gradient_leaks(graph)
            or self._document_leaks()
        )

    def leaks(self) -> list[Leak]:
        """One perturbation at a time, to name what is found."""
        base, graph = self._base()
        found = self._batch_leaks(base)
        if not any(leak.kind == LATER for leak in found):
            found += self._gradient_leaks(graph)
        found += [*self._label_leaks(base), *self._document_leaks()]
        if not found and (moved := self._moved_by_all(base)):
            found.append(self._from_others(moved))
        if not found and (later := self.in_training()[1]):
            found.append(later)
        return found

    def in_training(self) -> tuple[bool, Leak | None]:
        """Whether the batch is coupled; if not, whether a prefix sees what comes after it."""
        set_mode(self._losses, training=True)
        base = self._see(self._probe.tokens_BT)
        if not self._moved_by_all(base):
            return False, None
        if self._moved_by_others(base, max(self._tolerance.relative, ROUNDING)):
            return True, None
        later = self._moved_by_suffixes(base)
        return False, self._later(later, " in training") if later else None

    def _base(self) -> tuple[Seen, Graph]:
        """What is compared with, and how it came from the embeddings."""
        set_mode(self._losses, training=False)
        inside_BT = self._probe.inside_BT
        with torch.enable_grad(), constant(self._losses), Embedded(inside_BT.shape) as embedded:
            seen = self._see(self._probe.tokens_BT)
            targets_M = self._probe.tokens_BT[:, 1:][inside_BT]
            loss = cross_entropy_sum(seen.hidden_BTD[inside_BT], seen.head_VD, targets_M)
        seen = seen._replace(hidden_BTD=seen.hidden_BTD.detach())
        if seen.hidden_BTD.device.type != "cpu":  # whose sums may have several orders
            again_BTD = self._see(self._probe.tokens_BT).hidden_BTD
            self._spread = float((again_BTD - seen.hidden_BTD).abs().max())
        return seen, Graph(loss, embedded.leaves)

    def _see(self, tokens_BT: Tensor) -> Seen:
        return see(self._losses, tokens_BT)

    def _moved(
        self, base: Seen, changed: Seen, equal_BT: Tensor, relative: float | None = None
    ) -> Moved | None:
        """Where outputs differ most that must be equal; all ranks learn of it if one finds any."""
        before, after = base.hidden_BTD, changed.hidden_BTD
        change_BTD = torch.where(before.isnan() & after.isnan(), 0.0, (after - before).abs())
        change_BT = change_BTD.nan_to_num(torch.inf).amax(-1).where(equal_BT, 0.0)
        relative = self._tolerance.relative if relative is None else relative
        limit = max(self._spread, relative * float(before.abs().max()))
        sequence, at = divmod(int(change_BT.argmax()), change_BT.shape[1])
        if not self._world.any(bool(change_BT[sequence, at] > limit)):
            return None
        change_D = (after - before)[sequence, at]
        return Moved(sequence, at, float(functional.linear(change_D, base.head_VD).abs().max()))

    def _moved_by_all(self, base: Seen) -> Moved | None:
        """What other suffixes everywhere do to prefixes, all sequences in other places. That of the
        sequence without a prefix is all of it.
        """
        return self._moved_by_order(base, self._probe.other_suffixes(), self._probe.inside_BT)

    def _moved_by_order(self, base: Seen, tokens_BT: Tensor, equal_BT: Tensor) -> Moved | None:
        rolled = self._see(tokens_BT.roll(1, 0))
        back = rolled._replace(hidden_BTD=rolled.hidden_BTD.roll(-1, 0))
        return self._moved(base, back, equal_BT)

    def _moved_by_suffixes(self, base: Seen) -> Moved | None:
        changed = self._see(self._probe.other_suffixes())
        return self._moved(base, changed, self._probe.inside_BT)

    def _moved_by_others(self, base: Seen, relative: float | None = None) -> Moved | None:
        """What every other sequence does to those between."""
        even_B = torch.arange(len(base.hidden_BTD), device=base.hidden_BTD.device) % 2 == 0
        changed = self._see(self._probe.other_sequences(even_B))
        return self._moved(base, changed, ~even_B[:, None], relative)

    def _moved_by_own_suffix(self) -> Moved | None:
        """What the suffix of a sequence does to its prefix where there is no other: the first
        found. Among others it may matter too rarely to be seen.
        """
        inside_BT, other_BT = self._probe.inside_BT, self._probe.other_suffixes()
        for row in range(len(inside_BT) - 1, 0, -2):  # every other length
            own = slice(row, row + 1)
            base, changed = self._see(self._probe.tokens_BT[own]), self._see(other_BT[own])
            if moved := self._moved(base, changed, inside_BT[own]):
                return moved._replace(sequence=row)
        return None

    def _batch_leaks(self, base: Seen) -> list[Leak]:
        later, others = self._moved_by_suffixes(base), self._moved_by_others(base)
        everywhere_BT = torch.ones_like(self._probe.inside_BT)
        order = self._moved_by_order(base, self._probe.tokens_BT, everywhere_BT)
        if later and (others or order):  # whose suffix was it?
            later, others = self._moved_by_own_suffix(), others or later
        found = [self._later(later)] if later else []
        found += [self._from_others(others)] if others else []
        if order:
            found.append(Leak(ORDER, f"output {order.time + 1} follows it", order.size))
        return found

    def _later(self, moved: Moved, when: str = "") -> Leak:
        prefix = int(self._probe.prefix_B[moved.sequence])
        place = f"output {moved.time + 1} sees tokens behind the first {prefix}{when}"
        return Leak(LATER, place, moved.size)

    def _from_others(self, moved: Moved) -> Leak:
        place = f"output {moved.time + 1} of sequence {moved.sequence + 1} follows them"
        return Leak(OTHERS, place, moved.size)

    def _gradient_leaks(self, graph: Graph) -> list[Leak]:
        """The loss within prefixes must have no derivative in embeddings behind them."""
        if not graph.loss.requires_grad:
            return []
        inside_BT, found = self._probe.inside_BT, []
        with constant(self._losses):  # parts may be computed a second time, and must be as before
            grads = torch.autograd.grad(graph.loss, graph.embedded)
        for grad_BTD in grads:
            size_BT = grad_BTD.abs().amax(-1)
            behind_BT = size_BT.where(~inside_BT, 0.0)
            sequence, at = divmod(int(behind_BT.argmax()), behind_BT.shape[1])
            size, limit = behind_BT[sequence, at], self._tolerance.relative * size_BT.max()
            if self._world.any(bool(size > limit)):
                prefix = int(self._probe.prefix_B[sequence])
                place = f"the loss of the first {prefix} tokens has a derivative in token {at + 1}"
                found.append(Leak(LATER, place, float(size), "nats per unit of an embedding"))
        return found[:1]

    def _label_leaks(self, base: Seen) -> list[Leak]:
        """The loss must be that of the next tokens, given all up to each."""
        tokens_BT = self._probe.tokens_BT
        if torch.equal(base.inputs_BT, tokens_BT[:, 1:]):
            return [Leak(LABELS, "the model is given the tokens it is to predict", torch.inf)]
        hidden_MD, target_M = base.hidden_BTD.flatten(0, 1), tokens_BT[:, 1:].flatten()
        right = float(cross_entropy_sum(hidden_MD, base.head_VD, target_M))
        error = abs(base.loss - right) / len(target_M)
        if not self._world.any(error > self._tolerance.nats):
            return []
        own = float(cross_entropy_sum(hidden_MD, base.head_VD, base.inputs_BT.flatten()))
        shifted = abs(base.loss - own) < abs(base.loss - right) / 1e3
        told = "the model's own inputs" if shifted else "not the next tokens"
        return [Leak(LABELS, f"the targets are {told}", error, "nats per token")]

    def _document_leaks(self) -> list[Leak]:
        """Behind the end of a document, nothing may depend on what was before it."""
        if self._probe.document_end is None:
            return []
        tokens_BT, changed_BT = self._probe.documents()
        time_T = torch.arange(tokens_BT.shape[1] - 1, device=tokens_BT.device)
        behind_BT = time_T > self._probe.prefix_B[:, None]
        moved = self._moved(self._see(tokens_BT), self._see(changed_BT), behind_BT)
        if moved is None:
            return []
        distance = moved.time - int(self._probe.prefix_B[moved.sequence])
        place = f"output {distance} of a document sees the one before"
        return [Leak(DOCUMENT, place, moved.size)]
