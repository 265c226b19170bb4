"""A study with an outcome for every cell: its plan is brought up to date, and a stamp left in the
cache, by which the next launch knows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from hydra.types import TaskFunction

from peer_scaling.cells import StudyCell, summary_line, write_plan
from peer_scaling.cli import CommandTask
from peer_scaling.data import Corpus, DataConfig
from peer_scaling.documents import source_identity
from peer_scaling.plan_file import read_plan
from peer_scaling.prepare import find_prepared
from peer_scaling.record import PLAN, RECORD
from peer_scaling.stamp import Stamp, result_digest, state_of
from peer_scaling.tokenizer import tokenizer_identity


def leave_stamp(
    task: TaskFunction,
    cells: Sequence[StudyCell],
    corpora: Mapping[DataConfig, Corpus | None],
    *,
    keep_missing: bool,
) -> None:
    """Leave a stamp if every cell has a final record by now; nothing that fails here is an error.

    Args:
        task: the command's, which knows its launch; another one leaves nothing.
        cells: as they were planned.
        corpora: that they were planned on.
        keep_missing: as the launch wrote its plan.
    """
    ended = [cell.as_it_is_now() for cell in cells]
    launch = task.launch if isinstance(task, CommandTask) else None
    if launch is None or any(cell.to_run for cell in ended):
        return
    try:
        # Another launch of the study may have planned more cells in the meantime.
        path = write_plan(ended, ended[0].run.study_folder, keep_missing=True)
        if not keep_missing and _has_missing(path.parent):
            return  # the next launch would drop them from the plan
        launch.command.stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp = _stamp(launch.facts, ended, corpora)
        if all(_is_same(data, corpus) for data, corpus in corpora.items()):
            launch.leave(stamp)
    except Exception:  # a launch that has done its work does not fail for want of a stamp
        return


def _has_missing(folder: Path) -> bool:
    rows, _ = read_plan(folder)
    return not all((folder / row["run_id"] / RECORD).exists() for row in rows)


def _stamp(
    facts: str, cells: list[StudyCell], corpora: Mapping[DataConfig, Corpus | None]
) -> Stamp:
    settings = cells[0].run.settings
    folder = cells[0].run.study_folder
    names = [PLAN, *(f"{cell.record.run_id}/{RECORD}" for cell in cells if cell.record)]
    paths = {path for item in corpora.items() for path in _watched(*item)}
    return Stamp(
        facts=facts,
        text=summary_line(cells),
        runs_dir=settings.runs_dir,
        study=settings.study,
        results={name: result_digest(folder, name) for name in names},
        sources={
            str(d.path): source_identity("local", d.path) for d in corpora if d.source == "local"
        },
        states={str(path): state_of(path) for path in sorted(paths)},
    )


def _watched(data: DataConfig, corpus: Corpus | None) -> Iterator[Path]:
    """Files and folders that a corpus is found by, and made of."""
    assert corpus is not None
    yield corpus.folder
    yield from corpus.folder.iterdir()
    if data.source == "c4":
        yield corpus.folder.parent  # a larger one may come there
    if data.tokenizer.kind in ("file", "hf"):
        named = Path(str(data.tokenizer.name))
        yield named
        yield from named.iterdir() if named.is_dir() else ()


def _is_same(data: DataConfig, corpus: Corpus | None) -> bool:
    """Whether a launch would plan on this very corpus now, as it did when this one began."""
    assert corpus is not None
    spec = corpus.manifest["spec"]
    tokenizer = asdict(data.tokenizer) | tokenizer_identity(data.tokenizer)
    found = find_prepared(data) if data.source == "c4" else Corpus.load(corpus.folder)
    return found == corpus and (tokenizer, _source(data)) == (
        spec["tokenizer"],
        spec.get("identity"),
    )


def _source(data: DataConfig) -> dict[str, str] | None:
    if data.source == "synthetic":
        return None
    return source_identity(data.source, data.path)
