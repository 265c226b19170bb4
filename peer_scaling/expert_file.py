"""Which experts of a trained model the validation set uses, expert by expert, as a CSV file."""

from pathlib import Path

import torch

from peer_scaling.data import Windows
from peer_scaling.durable import write_atomically
from peer_scaling.errors import UserError
from peer_scaling.evaluate import ExpertUse, evaluate
from peer_scaling.parallel import Losses
from peer_scaling.step import autocast_of, num_passes
from peer_scaling.trained import Trained, corpus_of

COLUMNS = "expert,score,choices"


def write_experts(trained: Trained, path: Path, device: torch.device) -> int:
    """Write a row per expert: its number, the router score that it got, how often it was chosen;
    over the validation tokens of the final evaluation, which are returned.

    Raises:
        UserError: the model has no experts, its corpus is not there, or `path` cannot be written.
    """
    if path.suffix != ".csv":
        raise UserError(f"--experts {path}: the file's name must end in .csv")
    use = ExpertUse()
    tokens = _evaluate(trained, device, use)
    if use.score_N is None or use.choices_N is None:
        raise UserError(f"--experts: ffw={trained.run.ffw_name} has no experts; leave it out")
    numbers = zip(use.score_N.tolist(), use.choices_N.tolist(), strict=True)
    rows = [f"{number},{score!r},{choices:.0f}" for number, (score, choices) in enumerate(numbers)]
    try:
        write_atomically(path, "\n".join([COLUMNS, *rows]) + "\n", "evaluation")
    except OSError as error:
        raise UserError(f"--experts {path}: cannot be written ({error.strerror})") from error
    return tokens


def _evaluate(trained: Trained, device: torch.device, use: ExpertUse) -> int:
    """The final evaluation once more; its tokens."""
    run, losses = trained.run, Losses(trained.model.to(device))
    windows = Windows(corpus_of(trained), "validation", run.data.context)
    passes, autocast = num_passes(run, windows), autocast_of(run, device)
    return evaluate(
        losses, windows, passes, run.forward_sequences, device, autocast, use=use
    ).tokens
