"""`hydra/launcher: submitit_slurm`: cells of a study as Slurm jobs that are waited for."""

from collections.abc import Sequence
from typing import Any, final

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from peer_scaling.errors import UserError


@final
class SubmititSlurmLauncher(Launcher):
    """Hydra plugin: `waiting_jobs.SlurmJobsLauncher`, imported where it is asked for."""

    def __init__(self, **values: Any) -> None:
        self._values = values

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Called by Hydra before `launch`.

        Raises:
            UserError: the extra `slurm` is not installed.
        """
        try:
            from peer_scaling.waiting_jobs import SlurmJobsLauncher
        except ModuleNotFoundError as error:
            raise UserError(f"{error}; pip install 'peer-scaling[slurm]'") from error
        self._launcher = SlurmJobsLauncher(**self._values)
        self._launcher.setup(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run every list of overrides as a job; what each returned, in the order given."""
        return self._launcher.launch(job_overrides, initial_job_idx)
