"""The causality gate: does a model see what it is to predict, or what is none of its business?

Asked of the real model and the real loss as a black box: tokens are changed, and what must not
depend on them is compared bit by bit. The same shapes throughout, so that equal inputs are computed
alike. Where bits differ, the question is put again in float64: rounding shrinks with it, a leak
does not. A gradient from a prefix to what comes after it finds leaks too small to change a bit.

Prefixes follow a test of nanochat's (pull request 845), the gradient form one of levanter's; both
look at sequences of their own in eval mode, and not at the batch, training mode or labels.
"""

import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from peer_scaling.distributed import ALONE, World
from peer_scaling.kernels.dispatch import use_backend
from peer_scaling.leaks import BITS, COARSE, DOUBLE, LABELS, Leak, Search
from peer_scaling.parallel import Losses
from peer_scaling.probing import Probe, in_float64, untouched

NOT_RUN = "not run"
WHOLE = "parallel=fsdp keeps parts of the model"
"""Why it is not, there."""


@dataclass(frozen=True)
class CausalityReport:
    """Result of `probe`."""

    leaks: tuple[Leak, ...]
    """In evaluation, and one in training that is not the batch's doing."""
    batch_coupled: bool | None
    """Whether, in training, a token's output depends on other sequences: no leak, but a fact. Not
    asked of a model that leaks in evaluation."""
    seconds: float
    not_run: str | None = None
    """Why nothing is known."""

    def reason(self, causal: bool) -> str | None:
        """Why a run's numbers must not be used: what is found in a model that is declared causal,
        and what it is told of its targets in any; None if there is no such leak.
        """
        found = [leak for leak in self.leaks if causal or leak.kind == LABELS]
        return "leak: " + "; ".join(map(str, found)) if found else None

    def outcome(self, causal: bool) -> str:
        """For the record: `passed`, `leaks`, `leaks, as declared`, or `not run` and why."""
        if self.not_run:
            return f"{NOT_RUN}: {self.not_run}"
        if self.reason(causal):
            return "leaks"
        return "leaks, as declared" if self.leaks else "passed"


def probe(
    losses: Losses,
    vocab_size: int,
    context: int,
    device: torch.device,
    *,
    world: World = ALONE,
    document_end: int | None = None,
    compiled: bool = False,
) -> CausalityReport:
    """Look for leaks in a model and its loss, which are left as they were to the bit.

    Args:
        losses: the model with what makes inputs and targets; not one that FSDP has in parts.
        vocab_size: tokens are drawn from [0, V), V at least 2, by a private generator.
        context: the longest input that the model takes.
        device: the model's.
        world: the ranks that call this together, all with the whole model.
        document_end: the token behind which the model must not see what came before it; None for a
            model that sees across documents, as ours do.
        compiled: whether the model is; its uncompiled code is probed.
    """
    began = time.perf_counter()
    tokens = Probe.draw(vocab_size, context, device, document_end)
    eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    with untouched(losses), eager, torch.no_grad():
        search, leaks, coupled, later = Search(losses, tokens, BITS, world), (), None, None
        clean = search.is_clean()
        if clean:
            coupled, later = search.in_training()
        if later or not clean:
            tolerance = DOUBLE if device.type in ("cpu", "cuda") else COARSE
            # `auto`: a backend that a user asked for by name may know no float64.
            precise = in_float64(losses) if tolerance is DOUBLE else nullcontext()
            with precise, use_backend("auto"):
                leaks = tuple(Search(losses, tokens, tolerance, world).leaks())
        if not (clean or leaks):
            coupled, later = search.in_training()
    return CausalityReport(leaks, coupled, time.perf_counter() - began)
