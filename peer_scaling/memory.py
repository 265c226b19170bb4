"""`micro_batch=auto`: how many sequences of a step fit in one forward pass.

Answered before step 0 by making whole updates with a model and an optimiser of its own, dropped
afterwards; then kept, by the run and by its checkpoints. Tokens, their order and, but for rounding,
the loss do not depend on the answer, unless `FFWConfig.micro_batch_matters`: then the number is
part of the run's identity.

Memory is bytes on the run's device. Shape suffixes: B sequences, T time.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from math import inf

import numpy as np
import torch

from peer_scaling import machine
from peer_scaling.checkpoint import FORWARD_SEQUENCES, Checkpoints
from peer_scaling.data import Corpus
from peer_scaling.display import gigabytes_text, run_name
from peer_scaling.errors import UserError
from peer_scaling.optim import make_optimizer
from peer_scaling.planned import PlannedRun, plan_run
from peer_scaling.record import find_record
from peer_scaling.run import AUTO, Run
from peer_scaling.step import Stepper, pick_device, read_results, torch_settings

SHARE = 0.9
"""Of the memory that is available, a step may take so much: allocators lose some to gaps, and a run
keeps and reads more than a probe."""


def settled(run: Run, corpus: Corpus) -> PlannedRun:
    """Plan a run on a corpus, with its micro-batch if that is `auto`: the one that an earlier start
    of it used, or the largest that fits now.

    Raises:
        InfeasibleError: as `plan_run`.
        UserError: not even the smallest micro-batch fits.
    """
    if run.settings.micro_batch != AUTO:
        return plan_run(run, corpus)
    return _started(run, corpus) or plan_run(_with_micro_batch(run, _probe(run)), corpus)


def smaller(run: Run) -> Run | None:
    """The run with the next smaller micro-batch; None if there is none, if a number was asked for,
    or if it would be another run.
    """
    if run.chosen_micro_batch is None or run.ffw.micro_batch_matters:
        return None
    below = [number for number in candidates(run) if number < run.chosen_micro_batch]
    return _with_micro_batch(run, below[-1]) if below else None


def candidates(run: Run) -> list[int]:
    """Micro-batches that the run could have, ascending."""
    size, context = run.settings.batch_size, run.data.context
    divisors = (n for n in range(1, size + 1) if size % n == 0)
    return [n for n in divisors if run.ffw.cost_problem(n, context) is None]


def search(
    numbers: Iterable[int], need: Callable[[int], float], fixed: float, have: float
) -> dict[int, float]:
    """Bytes needed for each number tried, until one does not fit.

    Args:
        numbers: ascending.
        need: measures one; infinite if memory ran out.
        fixed: what is needed whatever the number.
        have: bytes that may be needed. A number is tried only if a line through the last two needs
            says that it fits: on a CPU, what does not fit ends the process. (With a limit that made
            it an error, `setrlimit`, oneDNN makes no primitive any more after the first failure.)
    """
    needs = {0: fixed}
    for number in numbers:
        if len(needs) > 1 and _extended(needs, number) > have:
            break
        needs[number] = need(number)
        if needs[number] > have:
            break
    del needs[0]
    return needs


def _extended(needs: dict[int, float], number: int) -> float:
    (a, need_a), (b, need_b) = list(needs.items())[-2:]
    return need_b + max(0.0, need_b - need_a) / (b - a) * (number - b)


def _with_micro_batch(run: Run, number: int) -> Run:
    return replace(run, chosen_micro_batch=number)


def _started(run: Run, corpus: Corpus) -> PlannedRun | None:
    """The run as an earlier start of it left it, ended or with a checkpoint; None without one.

    Looked for under every micro-batch, because the run's folder may depend on it.
    """
    numbers = candidates(run)
    for number in reversed(numbers):
        planned = plan_run(_with_micro_batch(run, number), corpus)
        record = find_record(planned.folder)
        if record and record.is_final:
            return planned
        snapshot = Checkpoints(planned.folder, run.checkpoint.keep).newest(planned.identity)
        if snapshot and snapshot.state.get(FORWARD_SEQUENCES) in numbers:
            kept = _with_micro_batch(run, snapshot.state[FORWARD_SEQUENCES])
            return replace(planned, run=kept)
    return None


def _probe(run: Run) -> int:
    """The largest micro-batch whose update fits."""
    device = pick_device(run.settings.device)
    available = machine.available_bytes(device)
    if available is None:
        raise UserError(
            f"micro_batch=auto: how much memory {device} has is not known here; give a number"
        )
    have = SHARE * available
    machine.release_memory()
    try:
        with torch_settings(run):
            needs = _needs(run, device, have)
    except Exception as error:
        if not machine.is_out_of_memory(error):
            raise
        needs = {candidates(run)[0]: inf}  # it ran out before the first update
    machine.release_memory()
    fitting = [number for number, need in needs.items() if need <= have]
    if not fitting:
        raise UserError(_refusal(needs, have, device))
    number = fitting[-1]
    print(
        f"{run_name(run)}: micro_batch=auto is {number} of {run.settings.batch_size} sequences, "
        f"{gigabytes_text(needs[number])} of {gigabytes_text(available)}",
        flush=True,
    )
    return number


def _refusal(needs: dict[int, float], have: float, device: torch.device) -> str:
    (number, need), *_ = needs.items()
    amount = f"more than {gigabytes_text(have)}" if need == inf else gigabytes_text(need)
    return (
        f"micro_batch=auto: a forward pass of {number} sequence(s) makes an update need {amount}; "
        f"{gigabytes_text(have)} may be used on {device}, {SHARE:.0%} of what is available: use a "
        f"smaller size or data.context, activation_checkpointing=true or another device"
    )


def _needs(run: Run, device: torch.device, have: float) -> dict[int, float]:
    """`search` over the candidates, with a state that ends with this call."""
    # Compiling takes minutes for each shape.
    eager = replace(run, settings=replace(run.settings, compile=False))
    base = machine.memory_in_use(device)
    model = run.model().to(device)
    optimizer = make_optimizer(run.optim, model.optim_groups(), run.lr)

    def need(number: int, batches: Sequence[np.ndarray]) -> float:
        machine.release_memory()
        machine.reset_peak_memory(device)
        stepper = Stepper(_with_micro_batch(eager, number), model, optimizer, device)
        try:
            for tokens_BT in batches:
                read_results([stepper.step(tokens_BT, 0.0)])
        except Exception as error:
            if machine.is_out_of_memory(error):
                return inf
            raise
        return machine.peak_memory_bytes(device) - base

    batches = _extremes(run)
    # Two passes of two tokens: the weights' gradients and their sum, and next to no activations.
    fixed = need(1, [tokens_BT[:2, :3] for tokens_BT in batches])
    if fixed > have:
        return {candidates(run)[0]: fixed}
    return search(candidates(run), lambda number: need(number, batches), fixed, have)


def _extremes(run: Run) -> list[np.ndarray]:
    """Batches of int64 (B, T + 1) tokens that need most memory: random ones, which pick most rows
    of a table, and one token again and again, whose hidden states are all the same, so that all go
    to the same experts.
    """
    rng = np.random.Generator(np.random.Philox(key=0))
    shape = (run.settings.batch_size, run.data.context + 1)
    random_BT = rng.integers(run.data.tokenizer.vocab_size, size=shape)
    return [random_BT, np.zeros_like(random_BT)]
