"""The command `peer-eval`: a trained model on the evaluation sets, or as a folder to share."""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from peer_scaling.cli import print_problems
from peer_scaling.config import bind, plain_values
from peer_scaling.display import table_text
from peer_scaling.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_USAGE,
    UserError,
    check,
    first_line,
    without_secrets,
)
from peer_scaling.eval_sets import EvalSet
from peer_scaling.evaluator import evaluate_run
from peer_scaling.expert_file import write_experts
from peer_scaling.export import export
from peer_scaling.paths import config_folder
from peer_scaling.publish import WEIGHTS
from peer_scaling.record import RECORD
from peer_scaling.step import pick_device
from peer_scaling.trained import Trained, corpus_of, load_trained

CONFIG = "peer_eval"
DEVICES = ("cpu", "cuda", "mps")
MEASURES = {
    "token ppl": "token_perplexity",
    "word ppl": "word_perplexity",
    "bits/byte": "bits_per_byte",
    "example ppl": "example_perplexity",
    "accuracy": "accuracy",
}
COLUMNS = ("set", "routing", "tokens", *MEASURES)


@dataclass(frozen=True)
class EvalOptions:
    """What `conf/peer_eval.yaml` says."""

    sets: Mapping[str, Any] = field(default_factory=dict)
    only: tuple[str, ...] | None = None
    """Names of the sets to evaluate; all by default."""
    stride: int | None = None
    """Tokens that a window scores after a document's first; half the context by default."""
    batch_size: int = 16
    device: str = "auto"

    def __post_init__(self) -> None:
        problems = [
            f"{name}={getattr(self, name)} must be positive"
            for name in ("stride", "batch_size")
            if getattr(self, name) is not None and getattr(self, name) < 1
        ]
        unknown = [name for name in self.only or () if name not in self.sets]
        empty = [name for name, own in self.sets.items() if not isinstance(own, Mapping)]
        problems += [
            f"sets.{name}={self.sets[name]} is no set; leave it out by only" for name in empty
        ]
        if unknown:
            problems.append(f"only={', '.join(unknown)} is unknown; use {', '.join(self.sets)}")
        check(problems)


def main() -> None:
    """The console script: 0 if a set was evaluated or a model exported, 1 if nothing could be, 2
    for what a user can put right.
    """
    arguments = _parser().parse_intermixed_args()
    overrides = [text for text in arguments.runs if "=" in text and not Path(text).exists()]
    named = [text for text in arguments.runs if text not in overrides]
    try:
        options, sets = options_from(overrides)
        folders = list(_runs(named))
        unused = [text for text in overrides if not text.startswith("eval.device=")]
        if unused and (arguments.export or arguments.experts):
            raise UserError(f"{unused[0]}: nothing is evaluated with --export or --experts")
        if len(folders) > 1 and (arguments.export or arguments.experts):
            raise UserError(f"--export and --experts take one run, not {len(folders)}")
        if not folders:
            raise UserError(
                f"{', '.join(named) or 'no RUN'}: nothing to evaluate; give a run's folder"
            )
        code = max(
            _each(Path(f), arguments, options, sets, alone=len(folders) == 1) for f in folders
        )
    except UserError as error:
        print_problems(error.problems)
        sys.exit(EXIT_USAGE)
    sys.exit(code)


def options_from(overrides: Sequence[str]) -> tuple[EvalOptions, dict[str, EvalSet]]:
    """The options and the sets to evaluate, from `conf/peer_eval.yaml` and `key=value` texts.

    Raises:
        UserError: one line per problem.
    """
    try:
        with initialize_config_dir(str(config_folder("conf").resolve()), version_base="1.3"):
            values = plain_values(compose(CONFIG, list(overrides)))
    except (HydraException, OmegaConfBaseException) as error:
        cause = f" ({first_line(error.__cause__)})" if error.__cause__ else ""
        raise UserError(f"{first_line(error)}{cause}; conf/peer_eval.yaml has the keys") from error
    problems: list[str] = []
    given = dict(values.get("eval") or {})
    if isinstance(given.get("only"), str):
        given["only"] = [given["only"]]
    options = bind(EvalOptions, given, "eval.", problems)
    chosen = {
        name: bind(EvalSet, options.sets[name], f"eval.sets.{name}.", problems)
        for name in (options.only or options.sets if options else ())
    }
    if problems:
        raise UserError(*problems)
    return options, chosen


def _runs(named: Sequence[str]) -> Iterator[str]:
    """Folders of runs; one that holds runs stands for those of them that left weights."""
    for folder in named:
        below = sorted(path.parent for path in Path(folder).glob(f"*/{RECORD}"))
        if not below or (Path(folder) / RECORD).exists():
            yield folder
        for run in below:
            if (run / WEIGHTS).exists():
                yield str(run)
            else:
                print(f"{run.name}: left out, no {WEIGHTS}")


def _each(
    folder: Path,
    arguments: argparse.Namespace,
    options: EvalOptions,
    sets: dict[str, EvalSet],
    alone: bool,
) -> int:
    """The exit code of a run; what is wrong with one of several stops no other."""
    try:
        return _one(folder, arguments, options, sets)
    except UserError as error:
        if alone:
            raise
        print(f"{folder.name}: left out: {without_secrets(first_line(error))}")
        return EXIT_FAILED


def _one(
    folder: Path, arguments: argparse.Namespace, options: EvalOptions, sets: dict[str, EvalSet]
) -> int:
    trained = load_trained(folder)
    if arguments.export:
        _export(trained, Path(arguments.export))
    if arguments.experts:
        tokens = write_experts(trained, Path(arguments.experts), device_of(options))
        print(f"{trained.record.run_id}: {arguments.experts}, of {tokens:,} validation tokens")
    if arguments.export or arguments.experts:
        return EXIT_DONE
    size, stride = options.batch_size, options.stride
    entries = evaluate_run(trained, sets, device_of(options), batch_size=size, stride=stride)
    print(_table(trained.record.run_id, entries))
    return EXIT_DONE if any("results" in entry for entry in entries.values()) else EXIT_FAILED


def device_of(options: EvalOptions) -> torch.device:
    """Where to compute.

    Raises:
        UserError: it is not there, or none that evaluates.
    """
    device = pick_device(options.device)
    if device.type not in DEVICES:
        raise UserError(f"eval.device={options.device}: use auto, {', '.join(DEVICES)}")
    return device


def _export(trained: Trained, folder: Path) -> None:
    has_text = trained.run.data.tokenizer.kind != "none"
    export(trained, folder, corpus_of(trained).folder if has_text else None)
    print(f"{trained.record.run_id}: exported to {folder}")


def _table(run_id: str, entries: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        _row(entry, result) for entry in entries.values() for result in entry.get("results", ())
    ]
    left = [
        f"{e['title']}: {number:,} rows without text left out"
        for e in entries.values()
        if (number := e.get("counts", {}).get("without_text"))
    ]
    return "\n".join([run_id, *([table_text(COLUMNS, rows)] if rows else []), *left])


def _row(entry: Mapping[str, Any], result: Mapping[str, Any]) -> tuple[str, ...]:
    routing = result["routing"] + ("" if result["causal"] else " (not causal)")
    measures = (_number(result[name]) for name in MEASURES.values())
    return (entry["title"], routing, f"{entry['counts']['tokens']:,}", *measures)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if 1e4 <= value < 1e7 else f"{value:.4g}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="peer-eval",
        description="Perplexities of a trained model on C4, WikiText-103, the Pile, LAMBADA and "
        "Curation Corpus, written to evaluation.json in its folder; docs/evaluation.md.",
        epilog="key=value: eval.only=[lambada], eval.sets.lambada.path=FILE, eval.stride=128, "
        "eval.batch_size=16, eval.device=cuda; conf/peer_eval.yaml and conf/eval/sets have all.",
    )
    parser.add_argument(
        "runs", nargs="+", help="folder of a run, or of a study", metavar="RUN|key=value"
    )
    parser.add_argument("--export", metavar="DIR", help="write the model for transformers instead")
    parser.add_argument("--experts", metavar="FILE", help="write which experts are used instead")
    return parser
