"""The command `peer-eval`: a trained model on the evaluation sets, or as a folder to share."""

import argparse
import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from peer_scaling.config import bind, plain_values
from peer_scaling.data import TrainingBatches, Windows
from peer_scaling.display import table_text
from peer_scaling.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_USAGE,
    UserError,
    first_line,
    without_secrets,
)
from peer_scaling.eval_sets import EvalSet
from peer_scaling.evaluation import AS_TRAINED, evaluate_set, write_evaluation
from peer_scaling.expert_file import write_experts
from peer_scaling.export import export
from peer_scaling.ffw.base import THRESHOLD
from peer_scaling.parallel import Losses
from peer_scaling.paths import config_folder
from peer_scaling.plan import make_plan
from peer_scaling.publish import WEIGHTS
from peer_scaling.record import EVALUATION, RECORD
from peer_scaling.routes import CALIBRATION_TOKENS, expert_cutoffs
from peer_scaling.scoring import Encoded, Scores, score
from peer_scaling.step import pick_device
from peer_scaling.tokenizer import Tokenizer
from peer_scaling.trained import Trained, corpus_of, load_trained, tokenizer_of

CONFIG = "peer_eval"
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
        if unknown:
            problems.append(f"only={', '.join(unknown)} is unknown; use {', '.join(self.sets)}")
        if problems:
            raise ValueError("\n".join(problems))


def main() -> None:
    """The console script: 0 if a set was evaluated or a model exported, 1 if nothing could be, 2
    for what a user can put right.
    """
    arguments = _parser().parse_args()
    overrides = [text for text in arguments.runs if "=" in text and not Path(text).exists()]
    named = [text for text in arguments.runs if text not in overrides]
    try:
        options, sets = options_from(overrides)
        folders = list(_runs(named))
        if len(folders) > 1 and (arguments.export or arguments.experts):
            raise UserError(f"--export and --experts take one run, not {len(folders)}")
        if not folders:
            raise UserError(
                f"{', '.join(named) or 'no RUN'}: nothing to evaluate; give a run's folder"
            )
        code = max(_one(Path(folder), arguments, options, sets) for folder in folders)
    except UserError as error:
        for problem in error.problems:
            print(f"error: {without_secrets(problem)}", file=sys.stderr)
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
    options = bind(EvalOptions, values.get("eval") or {}, "eval.", problems)
    chosen = {
        name: bind(EvalSet, values["eval"]["sets"][name], f"eval.sets.{name}.", problems)
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


def _one(
    folder: Path, arguments: argparse.Namespace, options: EvalOptions, sets: dict[str, EvalSet]
) -> int:
    trained = load_trained(folder)
    if arguments.export:
        _export(trained, Path(arguments.export))
    if arguments.experts:
        tokens = write_experts(trained, Path(arguments.experts))
        print(f"{trained.record.run_id}: {arguments.experts}, of {tokens:,} validation tokens")
    if arguments.export or arguments.experts:
        return EXIT_DONE
    entries = evaluate_run(trained, options, sets)
    print(_table(trained.record.run_id, entries))
    return EXIT_DONE if any("results" in entry for entry in entries.values()) else EXIT_FAILED


def _export(trained: Trained, folder: Path) -> None:
    has_text = trained.run.data.tokenizer.kind != "none"
    export(trained, folder, corpus_of(trained).folder if has_text else None)
    print(f"{trained.record.run_id}: exported to {folder}")


def evaluate_run(
    trained: Trained, options: EvalOptions, sets: Mapping[str, EvalSet]
) -> dict[str, dict[str, Any]]:
    """Evaluate a run on sets and write its `evaluation.json`; the entries, by set. A set that
    cannot be read has an entry with the reason.

    Raises:
        UserError: the run's tokenizer or the device is not there, or the stride is too long.
    """
    context = trained.run.data.context
    stride = options.stride or max(1, context // 2)
    if stride > context:
        raise UserError(f"eval.stride={stride} exceeds the context of {context} tokens; lower it")
    device = pick_device(options.device)
    tokenizer = tokenizer_of(trained)
    facts = _facts(trained, tokenizer, stride)
    trained.model.to(device)
    scorers = _scorers(trained, device, stride, options.batch_size)
    causal = [routing for routing in scorers if trained.run.ffw.causal or routing != AS_TRAINED]
    entries: dict[str, dict[str, Any]] = {}
    for name, config in sets.items():
        try:
            entries[name] = evaluate_set(name, config, tokenizer, scorers, causal)
        except UserError as error:
            entries[name] = {"title": config.title, "missing": without_secrets(str(error))}
    try:
        replaced = write_evaluation(trained.folder, facts, entries)
    except OSError as error:
        raise UserError(f"{trained.folder}: no evaluation written ({error.strerror})") from error
    if replaced:
        print(f"{EVALUATION}: replaced, of another model or protocol: {', '.join(replaced)}")
    return entries


def _facts(trained: Trained, tokenizer: Tokenizer, stride: int) -> dict[str, Any]:
    own = trained.run.data.tokenizer
    weights = (trained.folder / WEIGHTS).read_bytes()
    return {
        "run_id": trained.record.run_id,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "tokenizer": {
            "kind": own.kind,
            "name": Path(own.name).name if own.name else None,
            "vocab_size": own.vocab_size,
            "sha256": tokenizer.fingerprint,
        },
        "context": trained.run.data.context,
        "stride": stride,
        "precision": trained.run.settings.precision,
    }


def _scorers(
    trained: Trained, device: torch.device, stride: int, batch_size: int
) -> dict[str, Callable[[list[Encoded]], Scores]]:
    """By routing. A layer that compares tokens with others sees each window alone, and unpadded:
    its result depends on the window, and on no other.
    """
    run, model = trained.run, trained.model
    enabled = run.settings.precision == "bfloat16"
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)
    common = {"context": run.data.context, "stride": stride, "autocast": autocast}
    alone = batch_size if run.ffw.causal else 1
    scorers = {AS_TRAINED: partial(score, model, batch_size=alone, **common)}
    cutoff_N = _cutoffs(trained, device, autocast) if THRESHOLD in run.ffw.causal_routes else None

    def routed(documents: list[Encoded], route: str) -> Scores:
        with _taking(trained, route, cutoff_N):
            return score(model, documents, batch_size=batch_size, **common)

    return scorers | {route: partial(routed, route=route) for route in run.ffw.causal_routes}


@contextmanager
def _taking(trained: Trained, route: str, cutoff_N: torch.Tensor | None) -> Iterator[None]:
    trained.model.swapped.take_route(route, cutoff_N)
    try:
        yield
    finally:
        trained.model.swapped.take_route(None)


def _cutoffs(trained: Trained, device: torch.device, autocast: torch.autocast) -> torch.Tensor:
    """From the last steps of training, as at its end."""
    run, data = trained.run, trained.run.data
    corpus = corpus_of(trained)
    windows = Windows(corpus, "train", data.context)
    batches = TrainingBatches(windows, run.settings.batch_size, data.seed, data.order)
    last = make_plan(run.settings.budget, run.cost(), run.batch_tokens).steps
    first = max(0, last - -(-CALIBRATION_TOKENS // run.batch_tokens))
    parts = (
        part_BT.to(device)
        for step in range(first, last)
        for part_BT in torch.from_numpy(batches.batch(step)).split(run.forward_sequences)
    )
    return expert_cutoffs(trained.model.swapped, Losses(trained.model), parts, autocast)


def _table(run_id: str, entries: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        _row(entry, result) for entry in entries.values() for result in entry.get("results", ())
    ]
    missing = [f"missing: {e['missing']}" for e in entries.values() if "missing" in e]
    return "\n".join([run_id, *([table_text(COLUMNS, rows)] if rows else []), *missing])


def _row(entry: Mapping[str, Any], result: Mapping[str, Any]) -> tuple[str, ...]:
    routing = result["routing"] + ("" if result["causal"] else " (not causal)")
    measures = (_number(result[name]) for name in MEASURES.values())
    return (entry["title"], routing, f"{entry['counts']['tokens']:,}", *measures)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if value < 1e4 else f"{value:,.0f}"


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
