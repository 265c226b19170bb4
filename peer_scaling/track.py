"""W&B as an optional mirror of a run: what it shows is in `record.json` and `history.jsonl` too,
and the whole record is in its summary, so that `analysis` can do without the run's folder.
"""

import netrc
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from peer_scaling.errors import check, first_line
from peer_scaling.paths import NAME, NAME_RULE
from peer_scaling.record import SUMMARY_KEY, RunRecord, record_text

KINDS = ("wandb", "off")
WANDB_HOST = "api.wandb.ai"
"""Where logins of earlier W&B versions are filed; a newer one's own host is asked for too."""
INIT_TIMEOUT_SECONDS = 20.0
"""W&B alone waits 90 s for a server that does not answer, once for every run of a study."""


@dataclass(frozen=True)
class TrackerConfig:
    """Where a run is mirrored."""

    kind: str = "wandb"
    """`wandb` or `off`."""
    project: str = "peer-scaling"
    entity: str | None = None
    mode: str = "auto"
    """`auto` (online if a key is in the environment or in netrc, offline otherwise), `online`,
    `offline`. WANDB_MODE beats it."""

    def __post_init__(self) -> None:
        problems = [
            f"{name}={getattr(self, name)!r} must be a name: {NAME_RULE}"
            for name in ("project", "entity")
            if getattr(self, name) is not None and not NAME.fullmatch(getattr(self, name))
        ]
        if self.kind not in KINDS:
            problems.append(f"kind={self.kind!r} is unknown; choose one of {', '.join(KINDS)}")
        if self.mode not in ("auto", "online", "offline"):
            problems.append(f"mode={self.mode!r} is unknown; choose auto, online, offline")
        check(problems)


@dataclass(frozen=True)
class RunLabels:
    """How a run is filed in a tracker."""

    run_id: str
    """Also the W&B id, so that a run that is started again is the same run."""
    study: str
    tags: tuple[str, ...]
    config: Mapping[str, Any]


class Tracker(ABC):
    """A mirror of one run. No method raises for what a remote service does."""

    @abstractmethod
    def log(self, metrics: Mapping[str, float]) -> None:
        """Add one line of history; `tokens` and `flops` are among the metrics."""

    @abstractmethod
    def finish(self, record: RunRecord | None) -> None:
        """End the run, in every outcome; without a record if it was interrupted."""


class NullTracker(Tracker):
    """Mirrors nothing."""

    def log(self, metrics: Mapping[str, float]) -> None:
        """Do nothing."""

    def finish(self, record: RunRecord | None) -> None:
        """Do nothing."""


class WandbTracker(Tracker):
    """One W&B run."""

    def __init__(self, config: TrackerConfig, labels: RunLabels, folder: Path, mode: Any) -> None:
        import wandb

        self._run_id, self._failed = labels.run_id, False
        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            group=labels.study,
            job_type="train",
            name=labels.run_id,
            id=labels.run_id,
            tags=list(labels.tags),
            config=dict(labels.config),
            dir=str(folder),
            mode=mode,
            resume="allow",
            reinit="finish_previous",
            settings=wandb.Settings(
                console="off",
                silent=True,
                x_disable_stats=True,
                disable_git=True,
                init_timeout=INIT_TIMEOUT_SECONDS,
            ),
        )
        for axis in ("tokens", "flops"):
            self._run.define_metric(axis)
        self._run.define_metric("train/*", step_metric="tokens")
        self._run.define_metric("eval/*", step_metric="flops", summary="min")

    def log(self, metrics: Mapping[str, float]) -> None:
        """Log with `tokens` and `flops` as axes; W&B's own step counter means nothing here."""
        if not self._failed:
            self._try(lambda: self._run.log(dict(metrics)))

    def finish(self, record: RunRecord | None) -> None:
        """Write the summary and end the run; anything but `done` counts as a failure."""
        summary = record_summary(record) if record else {"status": "interrupted"}
        self._try(lambda: self._run.summary.update(summary))
        self._try(lambda: self._run.finish(exit_code=0 if summary["status"] == "done" else 1))

    def _try(self, call: Callable[[], object]) -> None:
        """Say so when W&B first fails, and go on."""
        try:
            call()
        except Exception as error:  # its process may be gone: OSError, its own types, any other
            if not self._failed:
                print(f"{self._run_id}: W&B stopped: {first_line(error)}", flush=True)
            self._failed = True


def record_summary(record: RunRecord) -> dict[str, Any]:
    """A record for a W&B summary: its numbers and words one by one, for tables, and all of it as
    the text that `record.parse_record` reads.
    """
    single = (str, int, float)
    fields = {name: value for name, value in asdict(record).items() if isinstance(value, single)}
    return {**fields, SUMMARY_KEY: record_text(record)}


def start_tracker(config: TrackerConfig, labels: RunLabels, folder: Path) -> Tracker:
    """The tracker that `config` asks for; `off` does not import W&B.

    A W&B that cannot be started is a line on the screen: the run goes on, offline if that helps.
    """
    if config.kind == "off":
        return NullTracker()
    mode = wandb_mode(config)
    for attempt in dict.fromkeys((mode, "offline")):
        try:
            return WandbTracker(config, labels, folder, attempt)
        except Exception as error:  # W&B raises its own types, and those of what is below it
            cause = first_line(error)
            print(f"{labels.run_id}: W&B ({attempt}) did not start: {cause}", flush=True)
    return NullTracker()


def wandb_mode(config: TrackerConfig) -> Any:
    """`online` or `offline`; WANDB_MODE, if set, as it is."""
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    if config.mode != "auto":
        return config.mode
    return "online" if os.environ.get("WANDB_API_KEY") or _in_netrc() else "offline"


def _in_netrc() -> bool:
    import wandb

    hosts = {WANDB_HOST, urlparse(wandb.Settings().base_url).hostname}
    try:
        return any(netrc.netrc().authenticators(host) for host in hosts if host)
    except (OSError, netrc.NetrcParseError):
        return False
