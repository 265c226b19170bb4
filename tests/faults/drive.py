"""Configurations through `peer-train`'s own code, many in one process: python drive.py TASK < cases.

Reads a JSON list of (folder, arguments), works in each folder, and prints a JSON line for each:
exit code, output, and seconds of this process's time. TASK is `check` (everything that is checked
before a run starts), `train`, or `commands`: the first argument is then the name of a command, and
corpora are in the folder's `cache`; or `forge`: the cells of a study get records and are not trained.
With UNGUARDED in the environment, the protections are off:
the control of the tests.
"""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

LIMIT_SECONDS = 30
"""After which a case is cut off and counts as a hang."""


def drive(cases, root, task="check", **environment):
    """Run cases, each in a folder of its own below `root`; a list of (case, folder, outcome)."""
    folders = [root / f"{number:04d}" for number in range(len(cases))]
    for case, folder in zip(cases, folders, strict=True):
        lay_out(case, folder)
    commands = [(f, c.arguments) for c, f in zip(cases, folders, strict=True)]
    outcomes = run_all(commands, task, **environment)
    return list(zip(cases, folders, outcomes, strict=True))


def run_all(commands, task="check", **environment):
    """Outcomes of (folder, arguments), one after the other in one process."""
    result = subprocess.run(
        [sys.executable, __file__, task],
        input=json.dumps([(str(folder), arguments) for folder, arguments in commands]),
        env=os.environ | {"OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    outcomes = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(outcomes) == len(commands), result.stderr[-3000:]
    return outcomes


def lay_out(case, folder):
    folder.mkdir(parents=True)
    for name, text in case.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
    for name, target in case.links.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target.format(root=str(folder.parent).lstrip("/")))


def forger():
    sys.path.append(str(Path(__file__).parent))
    from forging import LocalLauncher

    return LocalLauncher


class Hang(BaseException):
    """No Exception, which the code under test may catch."""


def main():
    from peer_scaling import cli, config, guard, planned, status, study_cells, train
    from peer_scaling.cli import run_command
    from peer_scaling.config import run_from
    from peer_scaling.estimate import Estimator
    from peer_scaling.launcher import LocalLauncher
    from peer_scaling.preflight import check_run
    from peer_scaling.sweeper import IsoflopSweeper

    def check(config):
        check_run(run_from(config))
        return 0

    def cut_off(signum, frame):
        raise Hang

    if os.environ.get("UNGUARDED"):
        cli.guarded = contextlib.nullcontext
        config.interpolation_problems = guard.interpolation_problems = lambda raw, path="": []
        unchecked = lambda root, *names: Path(root).joinpath(*names)  # noqa: E731
        planned.closed_folder = study_cells.closed_folder = unchecked
    Estimator.seconds = lambda self, planned: 0.0  # times a model for the plan of a study
    signal.signal(signal.SIGALRM, cut_off)
    task = check if sys.argv[1] == "check" else train.task
    launcher, limit = LocalLauncher, LIMIT_SECONDS
    if sys.argv[1] == "forge":
        launcher, limit = forger(), 10 * LIMIT_SECONDS  # whole studies, of hundreds of cells
    mains, by_name = {"peer-status": status.main}, sys.argv[1] == "commands"
    if by_name:  # not otherwise: matplotlib makes itself a folder at home
        from analysis.cli import main as analyse

        mains["peer-analyze"] = analyse
    lines = os.fdopen(os.dup(1), "w")
    for folder, arguments in json.load(sys.stdin):
        os.chdir(folder)
        os.environ.pop("HYDRA_FULL_ERROR", None)
        sys.modules.pop("planted_module", None)
        sys.argv[1:] = arguments[1:] if by_name else arguments
        if by_name:
            os.environ["PEER_SCALING_CACHE"] = str(Path(folder) / "cache")
        other = mains.get(arguments[0]) if by_name else None
        out, err, code = io.StringIO(), io.StringIO(), None
        began = time.process_time()
        signal.alarm(limit)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                other() if other else run_command(task, IsoflopSweeper, launcher)
                code = 0
        except SystemExit as end:
            code = end.code
        except Hang:
            err.write("hang\n" + traceback.format_exc())
        except Exception:
            traceback.print_exc(file=err)
        signal.alarm(0)
        seconds = time.process_time() - began
        outcome = {"code": code, "out": out.getvalue(), "err": err.getvalue(), "seconds": seconds}
        print(json.dumps(outcome), file=lines, flush=True)


if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).parent))  # as for the command, whose own folder is `bin`
    main()
