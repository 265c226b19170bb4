"""How long runs will take on this machine, before any is trained."""

import time

import numpy as np

from peer_scaling import machine
from peer_scaling.optim import make_optimizer
from peer_scaling.planned import PlannedRun
from peer_scaling.step import Stepper, pick_device, product_dtype, read_results, torch_settings

MAX_TIMED_PARAMS = 50_000_000
MAX_TIMED_FLOPS = 2e11
"""Models and steps up to these sizes are built and timed; larger ones are estimated."""
ASSUMED_UTILISATION = 0.4
"""Share of the measured matrix-product peak that a large run is assumed to reach: 0.43 to 0.58 was
measured for dense models on CPU."""
UPDATE_BYTES_PER_PARAM = 96
"""float32 traffic of one update, operation by operation: 80 for AdamW as PyTorch does it on a CPU,
16 for the gradient, which is zeroed, read for its norm and scaled. All rows of a table take part in
every step."""
WARMUP_STEPS, TIMED_STEPS = 2, 3


class Estimator:
    """Seconds of a run; each variant and size is timed once."""

    def __init__(self) -> None:
        self._seconds_per_step: dict[str, float] = {}
        self._peaks: tuple[float, float] | None = None

    def seconds(self, planned: PlannedRun) -> float:
        """Training time of a run on this machine, alone on its threads."""
        flops_per_step = planned.cost.flops_per_token * planned.plan.batch_tokens
        if planned.cost.num_params_total > MAX_TIMED_PARAMS or flops_per_step > MAX_TIMED_FLOPS:
            return self._from_peaks(planned)
        run = planned.run
        key = repr((run.ffw, run.decoder, run.data.context, run.settings.batch_size))
        if key not in self._seconds_per_step:
            self._seconds_per_step[key] = _time_step(planned)
        return self._seconds_per_step[key] * planned.plan.steps

    def _from_peaks(self, planned: PlannedRun) -> float:
        if self._peaks is None:
            settings = planned.run.settings
            device, dtype = pick_device(settings.device), product_dtype(settings.precision)
            with torch_settings(planned.run):
                self._peaks = machine.matmul_peak(device, dtype), machine.copy_peak(device)
        flops_per_second, bytes_per_second = self._peaks
        update_bytes = UPDATE_BYTES_PER_PARAM * planned.cost.num_params_total
        products = planned.plan.flops / (ASSUMED_UTILISATION * flops_per_second)
        return products + planned.plan.steps * update_bytes / bytes_per_second


def _time_step(planned: PlannedRun) -> float:
    """Median seconds of an update on random tokens."""
    run = planned.run
    device = pick_device(run.settings.device)
    vocab_size, context = run.data.tokenizer.vocab_size, run.data.context
    rng = np.random.Generator(np.random.Philox(key=0))
    tokens = rng.integers(vocab_size, size=(run.settings.batch_size, context + 1))
    times = []
    with torch_settings(run):
        model = run.model().to(device)
        optimizer = make_optimizer(run.optim, model.optim_groups(), run.lr)
        stepper = Stepper(run, model, optimizer, device)
        for _ in range(WARMUP_STEPS + TIMED_STEPS):
            began = time.perf_counter()
            read_results([stepper.step(tokens, 0.0)])
            times.append(time.perf_counter() - began)
    return float(np.median(times[WARMUP_STEPS:]))
