"""One trained run on the evaluation sets, by each of its routings."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from peer_scaling.data import TrainingBatches, Windows
from peer_scaling.errors import UserError, without_secrets
from peer_scaling.eval_sets import EvalSet
from peer_scaling.evaluation import AS_TRAINED, evaluate_set, write_evaluation
from peer_scaling.ffw.base import THRESHOLD
from peer_scaling.parallel import Losses
from peer_scaling.plan import make_plan
from peer_scaling.publish import WEIGHTS
from peer_scaling.routes import CALIBRATION_TOKENS, expert_cutoffs
from peer_scaling.run import Run
from peer_scaling.scoring import Encoded, Scores, score
from peer_scaling.tokenizer import Tokenizer
from peer_scaling.trained import Trained, corpus_of, tokenizer_of


def evaluate_run(
    trained: Trained,
    sets: Mapping[str, EvalSet],
    device: torch.device,
    *,
    batch_size: int = 16,
    stride: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Evaluate a run on sets and write its `evaluation.json`; the entries, by set. A set that
    cannot be read has an entry with the reason.

    Args:
        trained: the run.
        sets: by name.
        device: where its model goes.
        batch_size: windows per forward pass.
        stride: tokens that a window scores after a document's first; by default half the context.

    Raises:
        UserError: the run's tokenizer is not there, or the stride is too long.
    """
    context = trained.run.data.context
    stride = stride or max(1, context // 2)
    if stride > context:
        raise UserError(f"eval.stride={stride} exceeds the context of {context} tokens; lower it")
    tokenizer = tokenizer_of(trained)
    facts = _facts(trained, tokenizer, stride)
    trained.model.to(device)
    scorers = _scorers(trained, device, stride, batch_size)
    causal = [routing for routing in scorers if trained.run.ffw.causal or routing != AS_TRAINED]
    entries: dict[str, dict[str, Any]] = {}
    for name, config in sets.items():
        try:
            entries[name] = evaluate_set(name, config, tokenizer, scorers, causal)
        except UserError as error:
            print(f"missing: {without_secrets(str(error))}")
            entries[name] = {"title": config.title, "missing": _reason(error, config)}
    try:
        told = write_evaluation(trained.folder, facts, entries)
    except OSError as error:
        raise UserError(f"{trained.folder}: no evaluation written ({error.strerror})") from error
    if told:
        print(told)
    return entries


def _reason(error: UserError, config: EvalSet) -> str:
    """What is stored: without the folders of this machine."""
    text = without_secrets(str(error))
    for path in filter(None, (config.path, os.path.expanduser(config.path or ""))):
        folder = os.path.dirname(path)
        text = text.replace(f"{folder}/", "") if folder else text
    return text


def _facts(trained: Trained, tokenizer: Tokenizer, stride: int) -> dict[str, Any]:
    own = trained.run.data.tokenizer
    with (trained.folder / WEIGHTS).open("rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "run_id": trained.record.run_id,
        "weights_sha256": weights,
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


def autocast_of(run: Run, device: torch.device) -> torch.autocast:
    """The precision that the run was trained in."""
    enabled = run.settings.precision == "bfloat16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def _scorers(
    trained: Trained, device: torch.device, stride: int, batch_size: int
) -> dict[str, Callable[[list[Encoded]], Scores]]:
    """By routing. A layer that compares tokens with others sees each window alone, and unpadded:
    its result depends on the window, and on no other.
    """
    run, model = trained.run, trained.model
    autocast = autocast_of(run, device)
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
