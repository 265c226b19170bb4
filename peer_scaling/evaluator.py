"""One trained run on the evaluation sets, by each of its routings."""

import hashlib
import os
from collections.abc import Callable, Mapping
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
from peer_scaling.routes import calibration_passes, expert_cutoffs, routed
from peer_scaling.scoring import Encoded, Scores, score
from peer_scaling.step import autocast_of
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

    def by_route(documents: list[Encoded], route: str) -> Scores:
        with routed(model.swapped, route, cutoff_N):
            return score(model, documents, batch_size=batch_size, **common)

    return scorers | {route: partial(by_route, route=route) for route in run.ffw.causal_routes}


def _cutoffs(trained: Trained, device: torch.device, autocast: torch.autocast) -> torch.Tensor:
    """From the last steps of training, as at its end."""
    run, data = trained.run, trained.run.data
    corpus = corpus_of(trained)
    windows = Windows(corpus, "train", data.context)
    batches = TrainingBatches(windows, run.settings.batch_size, data.seed, data.order)
    last = make_plan(run.settings.budget, run.cost(), run.batch_tokens).steps
    passes = calibration_passes(batches, last, run.batch_tokens, run.forward_sequences)
    losses = Losses(trained.model)
    return expert_cutoffs(trained.model.swapped, losses, passes, device, autocast)
