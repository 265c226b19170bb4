"""From a run's folder back to its model: what `peer-eval` starts from.

The record says what was trained, `model.safetensors` has the weights; both may come from anywhere,
so the record's configuration is bound and checked like a user's, and nothing in it names code.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from peer_scaling.config import run_from_values
from peer_scaling.data import Corpus
from peer_scaling.errors import UserError, first_line
from peer_scaling.model import Decoder
from peer_scaling.paths import inside
from peer_scaling.prepare import find_prepared
from peer_scaling.publish import WEIGHTS, load_weights
from peer_scaling.record import RECORD, RecordError, RunRecord, read_record
from peer_scaling.run import Run
from peer_scaling.tokenizer import Tokenizer, load_tokenizer

DERIVED = ("micro_batch_chosen", "size", "decoder")
"""What a record's configuration has beside the keys of a run."""


@dataclass(frozen=True)
class Trained:
    """A run that ended, with its final weights."""

    folder: Path
    record: RunRecord
    run: Run
    model: Decoder
    """In eval mode, on the CPU, float32."""


def load_trained(folder: Path) -> Trained:
    """The model that a run left in its folder.

    Raises:
        UserError: no final record there, no weights, or they do not fit the record's model.
    """
    record = _final_record(folder)
    run = run_of(record)
    path = inside(folder, WEIGHTS)
    if not path.is_file():
        raise UserError(f"{folder}: no {WEIGHTS}; train the run with save_model=true")
    model = run.model()
    try:
        load_weights(model, folder)
    except (SafetensorError, RuntimeError, OSError) as error:
        raise UserError(f"{path}: not the weights of {record.run_id} ({first_line(error)})") from (
            error
        )
    return Trained(folder, record, run, model.eval())


def _final_record(folder: Path) -> RunRecord:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a run's, as runs/smoke/dense-...")
    try:
        record = read_record(inside(folder, RECORD))
    except RecordError as error:
        raise UserError(f"{first_line(error)}; give the folder of one finished run") from error
    if record.status != "done":
        why = f"{record.status}: {record.reason}"
        raise UserError(f"{folder}: {why}; only a run that is done is evaluated")
    return record


def run_of(record: RunRecord) -> Run:
    """What a record says was trained.

    Raises:
        UserError: its configuration is not one that this version can build; one line per problem.
    """
    try:
        return run_from_values(_values(record.config))
    except UserError as error:
        raise UserError(*(f"{record.run_id}: {line}" for line in error.problems)) from error


def _values(config: Mapping[str, Any]) -> dict[str, Any]:
    values = {key: value for key, value in config.items() if key not in DERIVED}
    return {**values, "backbone": config.get("decoder"), "device": "auto", "dry_run": False}


def corpus_of(trained: Trained) -> Corpus:
    """The corpus that the run was trained on, prepared again if need be.

    Raises:
        UserError: its source is not there, or has changed since.
    """
    run = trained.run
    corpus = find_prepared(run.data)
    if corpus is None:
        raise UserError(
            f"data={run.data.source}: not prepared on this machine; `peer-train` does it"
        )
    expected = trained.record.data_fingerprint
    if expected not in (None, corpus.fingerprint(run.data.order)):
        raise UserError(
            f"{trained.record.run_id}: data={run.data.source} is not what it was trained on "
            f"(fingerprint {str(expected)[:8]}): restore the files, or train again"
        )
    return corpus


def tokenizer_of(trained: Trained) -> Tokenizer:
    """The tokenizer that the run's tokens were made with.

    Raises:
        UserError: as `corpus_of`, or the run was trained on token numbers without text.
    """
    corpus = corpus_of(trained)
    eod = corpus.manifest["eod"]
    if eod is None:
        source = trained.run.data.source
        raise UserError(f"{trained.record.run_id}: data={source} is token numbers without text")
    return load_tokenizer(corpus.folder, eod)
