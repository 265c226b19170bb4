"""`peer-train` for a study in which runs fail, as the variable WAY says: python failing_study.py ARGUMENTS.

WAY is one of `toys.FAILURES`, for the run with seed 1; `flaky`, for kills at random; or `not`.
"""

import os
from pathlib import Path
from random import Random

from injectors import at_call
from peer_scaling import launcher
from peer_scaling.step import Stepper
from peer_scaling.train import main
from toys import fail, failed

STEP = 20


class Patch:
    """Of a process that ends with its run."""

    setattr = staticmethod(setattr)


class FailingJob(launcher.LocalJob):
    """In the process of each run: sets up what is to happen at a step of it, then runs it."""

    def __call__(self, number, overrides):
        (seed,) = (int(o.removeprefix("seed=")) for o in overrides if o.startswith("seed="))
        way = os.environ["WAY"]
        steps = flaky_kills(seed) if way == "flaky" else [STEP] * 9 if seed == 1 else []
        folders = Path(self._config.runs_dir, self._config.study).glob(f"*-s{seed}-*")
        attempts = sum(len(failed(folder)) for folder in folders)
        if attempts < len(steps) and way != "not":
            last = "SIGKILL" if way == "flaky" else way
            at_call(Patch, Stepper, "step", steps[attempts], lambda: fail(last))
        return super().__call__(number, overrides)


def flaky_kills(seed):
    """Steps at which the first attempts of a run are killed; the one with seed 0 always is."""
    rng, steps = Random(f"F20 {seed}"), []
    while len(steps) < 3 and (seed == len(steps) == 0 or rng.random() < 0.3):
        steps.append(rng.randint(1, 60))
    return steps


if __name__ == "__main__":
    import failing_study  # processes know the class by that name, not as one of __main__

    launcher.LocalJob = failing_study.FailingJob
    main()
