"""A run that was stopped in the middle, as it lies on the disk, and its state in memory."""

import signal

import pytest

from attempts import OPTIONS, SAVE_STEPS
from injectors import signal_at_step
from peer_scaling.checkpoint import Checkpoints
from peer_scaling.optim import make_optimizer
from peer_scaling.saver import Saver
from peer_scaling.snapshot import TrainingState
from peer_scaling.stop import StoppedError
from peer_scaling.train import run_once
from planned_runs import make_planned

NEWEST, BEFORE = 2 * SAVE_STEPS + 5, 2 * SAVE_STEPS
"""Steps of the two checkpoints that are there."""


def stopped_run(folder, ffw="peer", *options):
    """A planned run with checkpoints after steps `BEFORE` and `NEWEST`."""
    planned = make_planned(folder, *OPTIONS, *options, ffw=ffw)
    with pytest.MonkeyPatch.context() as patch:
        signal_at_step(patch, NEWEST, signal.SIGTERM.name)
        with pytest.raises(StoppedError):
            run_once(planned)
    assert store_of(planned).steps() == [NEWEST, BEFORE]
    return planned


def store_of(planned):
    return Checkpoints(planned.folder, 2)


def fresh_saver(planned, **how):
    """A saver of a state with its first weights."""

    def build():
        model = planned.run.model()
        groups = model.optim_groups()
        return TrainingState(model, make_optimizer(planned.run.optim, groups, planned.run.lr))

    return Saver(planned, build, **how)
