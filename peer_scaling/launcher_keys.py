"""What a configuration may say of a launcher: `hydra.launcher` of a study or a command line.

Launchers of plugins write shell scripts and start processes from what they are given.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from peer_scaling.config import leaves
from peer_scaling.errors import shown
from peer_scaling.paths import NAME, NAME_RULE
from peer_scaling.slurm import SBATCH_RULE, SBATCH_TEXT

SUBMITIT_FOLDER = "${hydra.sweep.dir}/.submitit/%j"
CODE = ("setup", "teardown", "python", "srun_args", "additional_parameters", "use_srun")
"""Of submitit's launchers: lines of a shell script and arguments, as they are."""
RAY = (
    *("init.address", "init.num_cpus", "init.num_gpus", "init.include_dashboard"),
    *("init.object_store_memory", "init.log_to_driver"),
    *("remote.num_cpus", "remote.num_gpus", "remote.memory", "remote.max_retries"),
)
"""What may be said to Ray: its other options name folders, environments and code."""
ONE_EACH = ("tasks_per_node", "nodes")
"""Processes that Hydra's launcher would start for one job, and each would train the run alone."""


def launcher_problems(own: dict[str, Any]) -> Iterator[str]:
    """What `hydra.launcher` and `hydra.job` of a configuration may not say, a line each.

    Args:
        own: the node `hydra`, with launcher and job, unresolved.
    """
    launcher = own["launcher"]
    for path, value in leaves(launcher, "hydra.launcher"):
        if isinstance(value, str) and not value.isprintable():
            yield f"{path}={value!r}: must be one line of printable characters"
    if launcher.get("submitit_folder") not in (None, SUBMITIT_FOLDER):
        yield f"hydra.launcher.submitit_folder={shown(launcher['submitit_folder'])}: not to be set"
    target = str(launcher.get("_target_")).lower()
    if "submitit" in target:
        yield from _submitit_problems(launcher)
    if "hydra_ray_launcher" in target:
        yield from _ray_problems(launcher)
    name = own["job"].get("name")
    if name is not None and not NAME.fullmatch(str(name)):
        yield f"hydra.job.name={shown(repr(name))} must be a name: {NAME_RULE}"


def _submitit_problems(launcher: dict[str, Any]) -> Iterator[str]:
    for name, value in launcher.items():
        key = f"hydra.launcher.{name}={shown(value)}"
        if name in CODE and value:
            yield f"{key}: code, not to be set; load modules in the shell that you submit from"
        elif name in ONE_EACH and value != 1:
            yield f"{key}: one process a job here; peer-sweep submit starts several for a run"
        elif isinstance(value, dict | list) and value:
            yield f"{key}: must be a number or a text"
        elif isinstance(value, str) and name not in ("_target_", "submitit_folder", "name"):
            if not SBATCH_TEXT.fullmatch(value):
                yield f"{key} must be {SBATCH_RULE}"
        elif name == "name" and value != "${hydra.job.name}" and not NAME.fullmatch(str(value)):
            yield f"{key} must be a name: {NAME_RULE}"


def _ray_problems(launcher: dict[str, Any]) -> Iterator[str]:
    target = launcher["_target_"]
    if not str(target).endswith(".RayLauncher"):
        yield f"hydra.launcher._target_={shown(target)}: rents machines; use hydra/launcher=ray"
        return
    if find_spec("ray") is None:
        yield "hydra/launcher=ray: not installed; pip install 'peer-scaling[ray]'"
    for path, value in leaves(launcher.get("ray"), ""):
        key = f"hydra.launcher.ray.{path}={shown(value)}"
        if path not in RAY:
            yield f"{key}: not to be set; of Ray's options, {', '.join(RAY)}"
        elif path == "init.address":
            if value not in (None, "local"):
                yield f"{key}: not to be set, code is sent there; export RAY_ADDRESS"
        elif not isinstance(value, int | float | None):
            yield f"{key}: must be a number"
