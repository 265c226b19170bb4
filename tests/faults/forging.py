"""A launcher that gives every cell of a study a record, and trains nothing."""

from datetime import UTC, datetime

from peer_scaling.jobs import CellLauncher, CellResult
from peer_scaling.publish import write_record
from peer_scaling.record import RunRecord


class LocalLauncher(CellLauncher):
    """In place of ours of this name; prints `ran <run id>` for each cell."""

    def __init__(self, **settings):
        pass

    def setup(self, **context):
        pass

    def launch(self, job_overrides, initial_job_idx):
        raise AssertionError("a study's cells are launched as cells")

    def launch_cells(self, jobs, policy):
        for job in jobs:
            ended = {"status": "done", "reason": None, "finished_at": datetime.now(UTC).isoformat()}
            write_record(RunRecord(**job.fields, **ended, loss=3.0), job.folder)
            print(f"ran {job.run_id}")
        return [CellResult(job, 0) for job in jobs]
