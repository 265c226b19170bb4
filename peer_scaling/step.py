"""One update and one evaluation: all that touches the device.

Shape suffixes: B sequences, T time.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from peer_scaling.data import Corpus, Windows
from peer_scaling.errors import UserError, first_line
from peer_scaling.evaluate import Evaluation, evaluate, num_batches
from peer_scaling.optim import set_lr
from peer_scaling.run import Run


class DivergedError(Exception):
    """A loss or gradient norm that is not finite, found before the update it would have made."""


class Stepper:
    """Model, optimiser and device: makes updates and evaluations, keeps no other state."""

    def __init__(
        self, run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
    ) -> None:
        self._run, self._optimizer, self._device = run, optimizer, device
        self._model = model
        if run.settings.compile:
            self._model.compile()  # in place: parameters keep their names
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def step(self, tokens: np.ndarray, factor: float) -> tuple[float, float]:
        """One update on a batch of int64 (B, T + 1) tokens, at `factor` times the peak rate.

        Returns:
            Mean cross-entropy in nats per token, and the norm of the gradient before clipping.

        Raises:
            DivergedError: either is not finite; parameters are as before.
        """
        tokens_BT = torch.from_numpy(tokens).to(self._device, non_blocking=True)
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for part_BT in tokens_BT.split(self._run.forward_sequences):
            total += self._backward(part_BT, share=len(part_BT) / len(tokens_BT))
        norm = float(nn.utils.clip_grad_norm_(self._parameters, self._run.optim.clip))
        loss = float(total) / tokens_BT[:, 1:].numel()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._optimizer.zero_grad(set_to_none=True)
            raise DivergedError(f"loss {loss}, gradient norm {norm}")
        set_lr(self._optimizer, factor)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss, norm

    def evaluate(self, corpus: Corpus) -> Evaluation:
        """Loss on the validation set."""
        windows = Windows(corpus, "validation", self._run.data.context)
        size = self._run.forward_sequences
        batches = num_batches(self._run.eval, windows, size)
        return evaluate(self._model, windows, batches, size, self._device, self._autocast())

    def _backward(self, tokens_BT: torch.Tensor, share: float) -> torch.Tensor:
        """Accumulate the gradient of `share` of the step's mean loss; the summed cross-entropy."""
        with self._autocast():
            output = self._model(tokens_BT[:, :-1])
            summed = output.cross_entropy_sum(tokens_BT[:, 1:])
        mean = summed / tokens_BT[:, 1:].numel()
        ((mean + output.aux_loss) * share).backward()
        return summed.detach()

    def _autocast(self) -> torch.autocast:
        enabled = self._run.settings.precision == "bfloat16"
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=enabled)


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


@contextmanager
def torch_settings(run: Run) -> Iterator[None]:
    """Threads and determinism for one run; what was set before is set again afterwards."""
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(run.settings.threads or threads)
    torch.use_deterministic_algorithms(run.settings.deterministic or strict)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict)
