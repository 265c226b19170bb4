"""A run with its plan on a corpus, and the identity that follows from both."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peer_scaling.cost import Cost, flops_by_convention, training_flops_by_component
from peer_scaling.data import Corpus, Windows
from peer_scaling.evaluate import num_batches
from peer_scaling.paths import closed_folder
from peer_scaling.plan import InfeasibleError, Plan, make_plan
from peer_scaling.record import RunRecord, budget_label
from peer_scaling.run import Run

SEMANTICS = 2
"""Raised when the same configuration would train another model: old runs are then not mixed in."""


@dataclass(frozen=True)
class PlannedRun:
    """What is trained, on what, and where the result goes."""

    run: Run
    plan: Plan
    cost: Cost
    epochs: float | None
    """Passes over the training windows; None while the corpus is not prepared."""
    fingerprint: str | None
    """Of the corpus; None while it is not prepared."""

    @property
    def run_id(self) -> str:
        """Name of the run's folder: readable, and unique by the start of its identity."""
        return run_id(self.run, self.plan, self.fingerprint)

    @property
    def identity(self) -> str:
        """sha256 of everything that determines the result."""
        return identity(self.run, self.plan, self.fingerprint)

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return self.run.study_folder / self.run_id

    def closed_folder(self) -> Path:
        """Folder of the run, if no link at or in it leads out of the folder of runs.

        Raises:
            UserError: one does.
        """
        settings = self.run.settings
        return closed_folder(Path(settings.runs_dir), settings.study, self.run_id)

    def record_fields(self) -> dict[str, Any]:
        """The fields of the run's record that the plan determines."""
        tokens, cost = self.plan.tokens, self.cost
        return {
            **_labels(self.run, self.run_id, self.fingerprint),
            "flops": self.plan.flops,
            "flops_by_component": training_flops_by_component(cost, tokens),
            "flops_by_convention": flops_by_convention(cost, tokens),
            "bytes_per_token": cost.bytes_per_token,
            "num_params_total": cost.num_params_total,
            "num_params_active": cost.num_params_active,
            "num_params_embedding": cost.num_params_embedding,
            "num_params_lookup": cost.num_params_lookup,
            "tokens": tokens,
            "steps": self.plan.steps,
            "epochs": self.epochs,
        }


def infeasible_record(run: Run, corpus: Corpus | None, reason: str) -> RunRecord:
    """The record of a cell that `plan_run` refused: a study lists it instead of dropping it."""
    fingerprint = corpus and corpus.fingerprint(run.data.order)
    name = run_id(run, None, fingerprint)
    return RunRecord(status="infeasible", reason=reason, **_labels(run, name, fingerprint))


def _labels(run: Run, name: str, fingerprint: str | None) -> dict[str, Any]:
    return {
        "run_id": name,
        "study": run.settings.study,
        "ffw": run.ffw_name,
        "variant": run.variant,
        "size": run.size,
        "seed": run.settings.seed,
        "budget": run.settings.budget,
        "lr": run.lr,
        "causal": run.ffw.causal,
        "protocol": _digest({**_shared_facts(run), "data": fingerprint}),
        "data_fingerprint": fingerprint,
        "config": run.describe(),
    }


def plan_run(run: Run, corpus: Corpus | None) -> PlannedRun:
    """Plan a run on a prepared corpus, or without one as far as that goes.

    Raises:
        InfeasibleError: the budget is too small for the model, the corpus too small for the budget
            or for the evaluation, or a forward pass would not cost what the plan says.
    """
    cost = run.cost()
    plan = make_plan(run.settings.budget, cost, run.batch_tokens)
    problem = run.ffw.cost_problem(run.forward_sequences, run.data.context)
    if problem:
        raise InfeasibleError(f"ffw={run.ffw_name}: {problem}")
    if corpus is None:
        return PlannedRun(run, plan, cost, None, None)
    epochs = _epochs(run, plan, corpus)
    _check_validation(run, corpus)
    return PlannedRun(run, plan, cost, epochs, corpus.fingerprint(run.data.order))


def _epochs(run: Run, plan: Plan, corpus: Corpus) -> float:
    windows = Windows(corpus, "train", run.data.context)
    if not len(windows):
        raise InfeasibleError(
            f"data={run.data.source}: {corpus.num_tokens('train'):,} training tokens hold no "
            f"sequence of data.context={run.data.context}"
        )
    epochs = plan.tokens / (len(windows) * run.data.context)
    if epochs <= run.data.max_epochs:
        return epochs
    raise InfeasibleError(
        f"{plan.tokens:,} tokens are {epochs:.2f} epochs of data={run.data.source} "
        f"({corpus.num_tokens('train'):,} training tokens), above data.max_epochs="
        f"{run.data.max_epochs:g}: use a larger size, a smaller budget, more data or a higher limit"
    )


def _check_validation(run: Run, corpus: Corpus) -> None:
    windows = Windows(corpus, "validation", run.data.context)
    if not num_batches(run.eval, windows, run.settings.batch_size):
        raise InfeasibleError(
            f"eval.tokens={run.eval.tokens} and {len(windows)} validation sequences leave no "
            f"whole batch of {run.settings.batch_size}: use a smaller batch_size or more data"
        )


def run_id(run: Run, plan: Plan | None, fingerprint: str | None) -> str:
    """`<ffw>-<size>-<budget>-s<seed>-<identity>`, with the first 8 digits of the identity."""
    name = f"{run.ffw_name}-{run.size}-{budget_label(run.settings.budget)}-s{run.settings.seed}"
    return f"{name}-{identity(run, plan, fingerprint)[:8]}"


def identity(run: Run, plan: Plan | None, fingerprint: str | None) -> str:
    """sha256 of everything that determines the result, and of nothing else: not of paths, logging,
    tracker or device.
    """
    facts = {
        **_shared_facts(run),
        "data": fingerprint,
        "ffw": run.ffw_settings,
        "shape": [run.decoder.d_model, run.decoder.num_layers, run.decoder.num_heads],
        "budget": run.settings.budget,
        "steps": plan and plan.steps,
        "forward_sequences": run.forward_sequences if run.ffw.micro_batch_matters else None,
        "lr": run.lr,
        "seed": run.settings.seed,
    }
    return _digest(facts)


def _shared_facts(run: Run) -> dict[str, Any]:
    """What all cells of a study have in common: everything but the variant, the shape of the
    backbone, the budget and the seed.
    """
    shape = ("d_model", "num_layers", "num_heads")
    decoder = {k: v for k, v in asdict(run.decoder).items() if k not in shape}
    return {
        "semantics": SEMANTICS,
        "decoder": decoder,
        "vocab_size": run.data.tokenizer.vocab_size,
        "context": run.data.context,
        "batch_size": run.settings.batch_size,
        "optim": asdict(run.optim),
        "data_seed": run.data.seed,
        "data_order": run.data.order,
        "eval_tokens": run.eval.tokens,
        "precision": run.settings.precision,
    }


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
