"""Which sequences a run has learned from, in order: written down where gradients and updates are made,
and not where the training loop believes that they are."""

import hashlib
from dataclasses import replace

import numpy as np
import torch

from peer_scaling.adamw import AdamW
from peer_scaling.model import Decoder
from peer_scaling.planned import plan_run
from peer_scaling.prepare import prepare
from peer_scaling.saver import Saver
from planned_runs import batch_of, make_run

INDEPENDENT = {
    "dense": ("dense",),
    "moe": ("moe", "ffw.router=token_choice", "ffw.balance_loss=0"),
    "pkm": ("pkm", "ffw.query_norm=layer"),
    "peer": ("peer", "ffw.query_norm=layer"),
    "peer_rows": ("peer", "ffw.query_norm=layer", "ffw.table_gradient=rows"),
}
"""Variants whose training does not depend on the micro-batch but for rounding."""
SAVE_STEPS = 5


class Ledger:
    """From here on, a sequence counts when its backward pass has ended, and a step when its update
    has; steps after the checkpoint that a run continues from count no longer."""

    def __init__(self, patch):
        self.steps, self._seen, self._learned = [], None, []
        forward, backward, step, resume = Decoder.forward, torch.Tensor.backward, AdamW.step, Saver.resume  # fmt: skip

        def counted_forward(model, tokens):
            if model.training:
                self._seen = tokens.numpy().copy()
            return forward(model, tokens)

        def counted_backward(tensor, *args, **kwargs):
            backward(tensor, *args, **kwargs)
            self._learned.append(self._seen)

        def counted_step(optimizer, closure=None):
            step(optimizer, closure)
            self.steps.append(digest(self._learned))
            self._learned = []

        def counted_resume(saver):
            resumed = resume(saver)
            del self.steps[resumed[0].step if resumed else 0 :]
            self._learned = []
            return resumed

        patch.setattr(Decoder, "forward", counted_forward)
        patch.setattr(torch.Tensor, "backward", counted_backward)
        patch.setattr(AdamW, "step", counted_step)
        patch.setattr(Saver, "resume", counted_resume)


def digest(batches):
    """Of the rows alone: not of how they were divided into forward passes."""
    rows = [row.tobytes() for batch in batches for row in batch]
    return hashlib.sha256(b"|".join(rows)).hexdigest()


def expected_ledger(planned):
    """What a run that is never interrupted learns from."""
    batches = (batch_of(planned, step) for step in range(planned.plan.steps))
    return [digest([np.ascontiguousarray(batch[:, :-1])]) for batch in batches]


def short_run(runs_dir, variant, *overrides, steps=24, chosen=None):
    """A run of so many steps that saves often, as if `micro_batch=auto` had come to `chosen`."""
    ffw, *own = INDEPENDENT.get(variant, (variant,))
    every = f"checkpoint.every_tokens={SAVE_STEPS * 256}"
    auto = [] if chosen is None else ["micro_batch=auto"]
    run = make_run(runs_dir, every, "save_model=false", *own, *auto, *overrides, ffw=ffw)
    budget = steps * run.batch_tokens * run.cost().flops_per_token
    run = replace(run, settings=replace(run.settings, budget=budget), chosen_micro_batch=chosen)
    return plan_run(run, prepare(run.data))
