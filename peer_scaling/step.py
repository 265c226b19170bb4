"""One update and one evaluation: all that touches the device.

Shape suffixes: B sequences, T time.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from peer_scaling.adamw import AdamW, clip_gradients
from peer_scaling.causality import WHOLE, CausalityReport, probe
from peer_scaling.data import Corpus, TrainingBatches, Windows
from peer_scaling.errors import UserError, first_line
from peer_scaling.evaluate import Evaluation, evaluate, num_batches
from peer_scaling.ffw.base import FFW
from peer_scaling.kernels.dispatch import use_backend
from peer_scaling.model import Decoder
from peer_scaling.optim import set_lr
from peer_scaling.parallel import Alone, Parallel
from peer_scaling.routes import calibration_passes, causal_losses, expert_cutoffs
from peer_scaling.run import Run


class DivergedError(Exception):
    """A loss or gradient norm that is not finite, and that has changed no parameter."""


class StepResult(NamedTuple):
    """What an update reports: scalars on the device, not waited for."""

    loss: torch.Tensor
    """Mean cross-entropy, nats per token, float64."""
    norm: torch.Tensor
    """Norm of the gradient before clipping."""


class Update(NamedTuple):
    """A `StepResult` that has been read."""

    loss: float
    norm: float

    @property
    def finite(self) -> bool:
        """Whether both are: the first update of which this is false stops the run."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)


def read_results(results: Sequence[StepResult]) -> list[Update]:
    """Wait for the device, and bring the numbers of updates over in one transfer."""
    if not results:
        return []
    rows = torch.stack([torch.stack([r.loss.double(), r.norm.double()]) for r in results])
    return [Update(loss, norm) for loss, norm in rows.tolist()]


class Stepper:
    """Model, optimiser and device: makes updates and evaluations.

    The only state beside theirs is a mark on the device. A loss or gradient norm that is not finite
    sets it for good, and fused AdamW makes no update while it is set: parameters, moments and step
    counts stay as they were before the first bad step, and the host need not wait to know.
    """

    def __init__(
        self,
        run: Run,
        model: nn.Module,
        optimizer: AdamW,
        device: torch.device,
        parallel: Parallel | None = None,
    ) -> None:
        """`parallel`, by default of one process, is what spreads the model over ranks."""
        self._run, self._optimizer, self._device = run, optimizer, device
        self._model = model
        self._parallel = parallel or Alone(model)
        self.world = self._parallel.world
        if run.settings.compile:
            _compile(model)
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._bad = torch.zeros((), device=device)
        # What `torch.amp.GradScaler` sets: 1 makes the fused optimiser leave everything as it is.
        optimizer.found_inf = self._bad

    def step(self, tokens: np.ndarray, factor: float) -> StepResult:
        """One update on a batch of int64 (B, T + 1) tokens, at `factor` times the peak rate; of
        several ranks, each has its own sequences of the batch, and all get the same numbers.

        The host does not wait for the device. The update is left out if its loss or norm is not
        finite, or those of an earlier step were not; `read_results` tells.
        """
        tokens_BT = self._to_device(tokens)
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        size = self._run.forward_sequences // self.world.size
        for end, part_BT in enumerate(tokens_BT.split(size), 1):
            with self._parallel.accumulating(last=end * size >= len(tokens_BT)):
                total += self._backward(part_BT, share=len(part_BT) / len(tokens_BT))
        total = self._parallel.exchange(total)
        norm = clip_gradients(self._parameters, self._run.optim.clip, self._parallel.total_norm)
        self._bad.copy_((self._bad > 0) | ~(total.isfinite() & norm.isfinite()))
        set_lr(self._optimizer, factor)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return StepResult(total / (tokens_BT[:, 1:].numel() * self.world.size), norm)

    def evaluate(self, corpus: Corpus, check: Callable[[], None] = lambda: None) -> Evaluation:
        """Loss on the validation set; `check`, called before each batch, may raise to leave."""
        windows = Windows(corpus, "validation", self._run.data.context)
        size, passes = self._run.forward_sequences, num_passes(self._run, windows)
        autocast = self._autocast()
        losses, world = self._parallel.losses, self.world
        return evaluate(losses, windows, passes, size, self._device, autocast, check, world)

    def causal_losses(
        self, corpus: Corpus, batches: TrainingBatches, last: int, check: Callable[[], None]
    ) -> tuple[dict[str, float], str | None]:
        """The loss on the validation set with each causal route of a layer that is not causal, and
        what the gate finds in the model so routed. Cutoffs are from the steps before `last`.
        """
        leaks: list[str] = []
        ffw = next(m for m in self._model.modules() if isinstance(m, Decoder)).swapped
        size = self._run.forward_sequences // self.world.size
        passes = calibration_passes(batches, last, self._run.batch_tokens, size)
        autocast, losses = self._autocast(), self._parallel.losses

        def cutoffs() -> torch.Tensor:
            return expert_cutoffs(ffw, losses, passes, self._device, autocast, self.world)

        def scored() -> float:
            leaks.extend(filter(None, [self.probe().reason(causal=True)]))
            return self.evaluate(corpus, check).loss

        return causal_losses(ffw, self._run.ffw, scored, cutoffs), "; ".join(leaks) or None

    def probe(self) -> CausalityReport:
        """Whether the model sees what it must not. A probe that fails, for want of memory or of a
        kernel, costs no run its result: the report says why it was not run.
        """
        losses, data = self._parallel.whole, self._run.data
        if losses is None:
            return CausalityReport((), None, 0.0, not_run=WHOLE)
        compiled = self._run.settings.compile
        try:
            return probe(
                losses,
                data.tokenizer.vocab_size,
                data.context,
                self._device,
                world=self.world,
                compiled=compiled,
            )
        except (RuntimeError, MemoryError, ValueError) as error:
            if self.world.size > 1:  # the others wait in the middle of theirs
                raise
            return CausalityReport((), None, 0.0, f"{type(error).__name__}: {first_line(error)}")

    def _backward(self, tokens_BT: torch.Tensor, share: float) -> torch.Tensor:
        """Accumulate the gradient of `share` of the step's mean loss; the summed cross-entropy."""
        with self._autocast():
            output = self._parallel.losses(tokens_BT)
        mean = output.cross_entropy_sum / tokens_BT[:, 1:].numel()
        ((mean + output.aux_loss) * share).backward()
        return output.cross_entropy_sum.detach()

    def _to_device(self, tokens: np.ndarray) -> torch.Tensor:
        tokens_BT = torch.from_numpy(tokens)
        if self._device.type == "cuda":
            tokens_BT = tokens_BT.pin_memory()  # from other memory, the host waits for the copy
        return tokens_BT.to(self._device, non_blocking=True)

    def _autocast(self) -> torch.autocast:
        return autocast_of(self._run, self._device)


def num_passes(run: Run, windows: Windows) -> int:
    """Forward passes of an evaluation. Of whole batches of a step: what is read does not depend on
    the micro-batch.
    """
    whole = run.settings.batch_size
    return num_batches(run.eval, windows, whole) * (whole // run.forward_sequences)


def autocast_of(run: Run, device: torch.device) -> torch.autocast:
    """The precision that a run has on a device."""
    enabled = run.settings.precision == "bfloat16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def _compile(model: nn.Module) -> None:
    """In place, so that parameters keep their names."""
    for layer in model.modules():
        if isinstance(layer, FFW) and not layer.compiles:
            eager = torch.compiler.disable(layer.forward)
            layer.forward = eager  # pyright: ignore[reportAttributeAccessIssue]
    model.compile()


def pick_device(name: str) -> torch.device:
    """The device of a name; `auto` is a GPU if there is one.

    Raises:
        UserError: PyTorch does not know the name or has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device={name}: {first_line(error)}; use device=auto or device=cpu"
        ) from error


def product_dtype(precision: str) -> torch.dtype:
    """The type that matrix products are made in, from the name of a precision."""
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


@contextmanager
def torch_settings(run: Run) -> Iterator[None]:
    """Threads, determinism and kernels for one run; what was set before is set again afterwards."""
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(run.settings.threads or threads)
    torch.use_deterministic_algorithms(run.settings.deterministic or strict)
    if run.settings.deterministic:
        # cuBLAS reads it when it starts; without it, PyTorch refuses matrix products on a GPU.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        with use_backend(run.settings.kernels):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict)
