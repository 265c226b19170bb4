"""F16, F17: numbers that are not finite change nothing, a rate far too high is noticed at once, and
a run at its normal rate is left alone.
"""

import hashlib
from itertools import product
from math import inf, nan
from random import Random
from types import SimpleNamespace

import pytest
import torch

from analysis.load import load_runs, usable
from peer_scaling import step as step_module
from peer_scaling.adamw import AdamW
from peer_scaling.divergence import SUSTAINED_STEPS, sustained_spike
from peer_scaling.ffw import moe, product_key
from peer_scaling.kernels.product_keys import TopKeys
from peer_scaling.model import DecoderOutput
from peer_scaling.record import RECORD
from peer_scaling.step import Stepper
from peer_scaling.train import exit_code, run_once
from planned_runs import SMALL, make_planned
from scorecard import report
from tiers import count

BUDGET = ("budget=7e8", "threads=1", "save_model=false")


class Poison:
    """Makes one number of one step bad, and digests what updates change after every step."""

    def __init__(self, patch, kind, at, value, rng):
        self.at, self.value, self._rng = at, value, rng
        self.digests, self._step = [], 0
        real = Stepper.step

        def step(stepper, tokens, factor):
            self._step += 1
            if self._step == at and kind == "parameter":
                self._parameter(stepper)
            if self._step == at:
                self.digests.append(updated(stepper))
            result = real(stepper, tokens, factor)
            if self._step >= at:
                self.digests.append(updated(stepper))
            return result

        patch.setattr(Stepper, "step", step)
        if kind != "parameter":
            getattr(self, f"_{kind}")(patch)

    @property
    def now(self):
        return self._step == self.at

    def _parameter(self, stepper):
        """One number, or a table as a whole: of a table only the rows that are picked matter."""
        parameter = self._rng.choice(stepper._parameters)
        with torch.no_grad():
            if len(parameter) == 64 and parameter.ndim == 2:
                parameter.fill_(self.value)
            else:
                parameter.view(-1)[self._rng.randrange(parameter.numel())] = self.value

    def _loss(self, patch):
        real = DecoderOutput.cross_entropy_sum
        patch.setattr(
            DecoderOutput,
            "cross_entropy_sum",
            lambda output, target: real(output, target) * (self.value if self.now else 1.0),
        )

    def _gradient(self, patch):
        real = step_module.clip_gradients

        def clip(parameters, limit, *total_norm):
            if self.now:
                grad = self._rng.choice([p.grad for p in parameters if p.grad is not None])
                values = grad._values() if grad.is_sparse else grad
                values.view(-1)[self._rng.randrange(values.numel())] = self.value
            return real(parameters, limit, *total_norm)

        patch.setattr(step_module, "clip_gradients", clip)

    def _router(self, patch):
        """One logit of one token."""

        def logits(x, weight):
            return self._one_bad(torch.nn.functional.linear(x, weight))

        def search(query, keys, k):
            found = product_key_topk(query, keys, k)
            return TopKeys(self._one_bad(found.score_MHK), found.index_MHK)

        product_key_topk = product_key.product_key_topk
        patch.setattr(moe, "functional", SimpleNamespace(linear=logits))
        patch.setattr(product_key, "product_key_topk", search)

    def _one_bad(self, x):
        if not self.now:
            return x
        place = self._rng.randrange(x.numel())
        return torch.where(torch.arange(x.numel()).view_as(x) == place, self.value, x)


def updated(stepper):
    """Digest of parameters, moments and counts: statistics of the query norm are no update."""
    digest = hashlib.sha256()
    for parameter in stepper._parameters:
        state = stepper._optimizer.state_of(parameter)
        for tensor in (parameter, *(state[name] for name in sorted(state))):
            digest.update(tensor.detach().numpy().tobytes())
    return digest.hexdigest()


KINDS = ("loss", "gradient", "parameter", "router")
CASES = [c for c in product(KINDS, (nan, inf), SMALL) if c[0] != "router" or c[2] != "dense"]


@pytest.mark.parametrize(
    ("kind", "value", "ffw"), CASES if count(0, 1) else Random(0).sample(CASES, 16)
)
def test_a_bad_number_ends_the_run(tmp_path, kind, value, ffw):
    """F16. Before the update, though the host learns of it up to 16 steps later."""
    repeats, rng = count(1, 7), Random(f"F16 {kind} {value} {ffw}")
    for repeat in range(repeats):
        at, lines = rng.randint(1, 60), rng.choice((5, 1000))
        options = (*BUDGET, f"log_lines={lines}", f"seed={repeat}")
        planned = make_planned(tmp_path / str(repeat), *options, ffw=ffw)
        with pytest.MonkeyPatch.context() as patch:
            poison = Poison(patch, kind, at, value, rng)
            record = run_once(planned)
        assert (record.status, record.last_step) == ("diverged", at - 1), record.reason
        assert record.reason.startswith(f"after step {at - 1}: loss ")
        assert "nan" in record.reason or "inf" in record.reason
        assert len(set(poison.digests)) == 1, "updated after the bad number"
        assert len(poison.digests) > 1
        check_ended(planned, record)
    report(
        "F16", f"{repeats} runs with a bad loss, gradient, parameter or logit: 0 updates after it"
    )


def check_ended(planned, record):
    """Told by the exit code, not trained again, not in a fit."""
    assert exit_code(record) == 3
    written = (planned.folder / RECORD).stat().st_mtime_ns
    assert run_once(planned) == record
    assert (planned.folder / RECORD).stat().st_mtime_ns == written
    frame = load_runs(planned.folder)
    assert usable(frame).empty
    assert frame["excluded"].iloc[0].startswith("diverged: after step ")


@pytest.mark.parametrize("kind", ["gradient", "loss"])
def test_control_without_the_mark_parameters_change(tmp_path, monkeypatch, kind):
    real = AdamW.step

    def step(self, closure=None):
        self.found_inf = None
        return real(self, closure)

    monkeypatch.setattr(AdamW, "step", step)
    planned = make_planned(tmp_path, *BUDGET, "log_lines=5", ffw="dense")
    poison = Poison(monkeypatch, kind, 3, nan, Random(kind))
    assert run_once(planned).status == "diverged"
    assert len(set(poison.digests)) > 1


@pytest.mark.parametrize("ffw", SMALL)
def test_a_thousand_times_the_rate_is_noticed(tmp_path, ffw):
    """F17."""
    steps = []
    for seed in range(count(1, 5)):
        for lines in (1, 1000):  # read every 16 steps, and every one
            options = (*BUDGET, "optim.lr=20.0", f"seed={seed}", f"log_lines={lines}")
            planned = make_planned(tmp_path / str(lines), *options, ffw=ffw)
            record = run_once(planned)
            assert record.status == "diverged"
            check_ended(planned, record)
            steps.append(record.last_step)
    assert max(steps) <= 50
    report("F17", f"{ffw}, rate x 1000: {len(steps)} of {len(steps)} diverged by step {max(steps)}")


@pytest.mark.parametrize("ffw", SMALL)
def test_a_normal_rate_is_left_alone(tmp_path, ffw):
    runs = [(*BUDGET, f"seed={seed}") for seed in range(count(1, 5))]
    if count(0, 1):  # cells of the laptop study
        cell = ("data=sotu", "eval.tokens=2048", "data.num_tokens=null", "threads=1")
        runs += [(*cell, "size=d12_l2", "budget=2e10", f"seed={seed}") for seed in range(2)]
    for number, options in enumerate(runs):
        planned = make_planned(tmp_path / str(number), *options, ffw=ffw)
        assert run_once(planned).status == "done", "a false alarm"
    report("F17", f"{ffw}, normal rate: 0 of {len(runs)} diverged")


def falling(steps, spike=(0, 0), by=0.0):
    """A loss that falls from 5 with noise of 0.2, and stands higher for a while."""
    rng = Random(0)
    losses = [2 + 3 / (1 + n / 20) + rng.gauss(0, 0.2) for n in range(steps)]
    return [x + by * (spike[0] <= n < spike[1]) for n, x in enumerate(losses)]


@pytest.mark.parametrize("start", [1, 5, 50, 200])
def test_a_rise_counts_when_it_lasts(start):
    lasting, short = start + SUSTAINED_STEPS, start + SUSTAINED_STEPS - 4
    assert sustained_spike(falling(300)) is None
    assert sustained_spike(falling(300, (start, 400), by=4.0)) == start
    assert sustained_spike(falling(300, (start, short), by=4.0)) is None
    assert sustained_spike(falling(lasting, (start, lasting), by=4.0)) == start, "no later"
    assert sustained_spike(falling(300, (start, 400), by=0.5)) is None, "noise and drift"
