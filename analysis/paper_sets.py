"""Cells of table 1 of He 2024 (2407.04153): the runs of a variant on an evaluation set."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from analysis.evaluations import Evaluations, Key, Protocol, SetResult
from analysis.fitting import student_quantile
from analysis.schema import MAX_LOSS

HEADINGS = {
    "curation_corpus": "Curation Corpus",
    "lambada": "Lambada",
    "pile": "Pile",
    "wikitext": "Wikitext",
    "c4": "C4",
}
"""By key of the set, in the order and the words of the paper."""
TITLES = {**HEADINGS, "lambada": "LAMBADA", "wikitext": "WikiText-103"}
"""What the sets are called in an evaluation that is of the paper's sets."""
LARGE = 11.5
"""Nats: perplexities above are shown to three digits."""


@dataclass(frozen=True)
class SetCell:
    """The runs of one variant, budget and routing on one set; NaN where none is evaluated."""

    text: str
    """The perplexity with its 95 % interval, and what is missing."""
    nats: float
    """Mean over the runs, per token; of last words, per example."""
    bits_per_byte: float
    accuracy: float
    protocol: Protocol | None


def heading(evaluations: Evaluations, name: str) -> str:
    """Of the column of a set: the paper's word, and what ours is called if it is another set."""
    own, titles = HEADINGS.get(name), evaluations.titles(name)
    if own is None:
        return ", ".join(titles)
    others = [title for title in titles if title != TITLES[name]]
    return f"{own} (ours: {', '.join(titles)})" if others else own


def sets_caption(evaluations: Evaluations) -> str:
    """What stands beside table 1, in Markdown: which texts the columns are of, and how scored."""
    counts: dict[str, dict[str, int]] = {}
    for name in evaluations.sets():
        own = counts.setdefault(heading(evaluations, name), {})
        for run in evaluations.by_run.values():
            result = next(iter(run.results.get(name, {}).values()), None)
            if result:
                own[_scored(result)] = own.get(_scored(result), 0) + 1
    lines = [
        f"- {title}: {scored} ({num} runs)"
        for title, own in counts.items()
        for scored, num in own.items()
    ]
    parts = [
        "Perplexities of the best trained size of each variant and budget: on the validation text "
        "of the study, at the minimum of its curve with a 95 % interval, and on evaluation sets, "
        "per token, of last words per example. With two runs or more, brackets hold the 95 % "
        "interval of Student's t over them. Nats below dense are differences of mean nats. The "
        "paper's rows are of another scale, tokenizer and training text: gaps compare, "
        "perplexities do not.",
        "Evaluation sets, of all runs that have them:",
        "\n".join(lines) or "None.",
    ]
    return "\n\n".join(parts)


def _scored(result: SetResult) -> str:
    own = result.protocol
    return (
        f"{own.title} from {result.source}, scored {own.scored.replace('_', ' ')}, "
        f"{own.num_documents:,} documents, {own.num_tokens:,} tokens, context {own.context}, "
        f"stride {own.stride}, text {own.text[:12]}, tokenizer {own.tokenizer[:12]}"
    )


def set_cell(evaluations: Evaluations, runs: Sequence[Key], name: str, routing: str) -> SetCell:
    """The mean over runs that differ in their seed.

    The mean is of the nats, so that the perplexity is a geometric mean; its interval is Student's t
    of the runs.
    """
    found: list[SetResult] = []
    lacking: dict[str, list[str]] = {}
    for run in runs:
        result = _result(evaluations, run, name, routing)
        if isinstance(result, SetResult):
            found.append(result)
        else:
            lacking.setdefault(result, []).append(run[1])
    reasons = [why.format(runs=" ".join(names)) for why, names in lacking.items()]
    others = {d for r in found for d in r.protocol.differences(found[0].protocol)}
    if others:
        names = " ".join(run for _, run in runs)
        reasons = [f"evaluations differ in {', '.join(sorted(others))}: peer-eval {names}"]
    if others or not found:
        return SetCell("; ".join(reasons), np.nan, np.nan, np.nan, None)
    parts = [_perplexity([r.nats for r in found])]
    parts += [f"{len(found)} of {len(runs)} runs", *reasons] if reasons else []
    return SetCell(
        text="; ".join(parts),
        nats=float(np.mean([r.nats for r in found])),
        bits_per_byte=float(np.mean([r.bits_per_byte for r in found])),
        accuracy=float(np.mean([np.nan if r.accuracy is None else r.accuracy for r in found])),
        protocol=found[0].protocol,
    )


def _result(evaluations: Evaluations, run: Key, name: str, routing: str) -> SetResult | str:
    """A run's result, or why there is none, with `{runs}` for the names of the runs."""
    if run in evaluations.problems:
        return f"evaluation not used: {_plain(evaluations.problems[run])}"
    own = evaluations.by_run.get(run)
    if own and name in own.missing:
        return f"missing: {_plain(_short(own.missing[name], name))}"
    if own is None or name not in own.results:
        return "not evaluated: peer-eval {runs}"
    return own.results[name].get(routing) or f"not evaluated with {routing} routing: {{runs}}"


def _short(reason: str, name: str) -> str:
    """The cause, for a cell; `evaluation.json` says what to do about it too."""
    return reason.partition(";")[0].removeprefix(f"eval.sets.{name}: ")


def _plain(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _perplexity(nats: Sequence[float]) -> str:
    """Of the mean, with the interval of the runs."""
    nats_U, num = np.array(nats), len(nats)
    mean = float(nats_U.mean())
    if num < 2:
        return perplexity_text(mean)
    margin = student_quantile(num - 1) * float(nats_U.std(ddof=1)) / num**0.5
    ends = [perplexity_text(mean + sign * margin) for sign in (-1, 1)]
    return f"{perplexity_text(mean)} [{ends[0]}, {ends[1]}]"


def perplexity_text(nats: float) -> str:
    """Exp of nats; as a power where that is no float64."""
    if nats >= MAX_LOSS:
        return f"e^{nats:.0f}"
    return f"{np.exp(nats):.2f}" if nats < LARGE else f"{np.exp(nats):.3g}"


def below_text(base: SetCell | None, own: SetCell) -> str:
    """Nats of a cell below those of dense; empty where one of them is not known."""
    if base is None or base.protocol is None or own.protocol is None:
        return ""
    others = own.protocol.differences(base.protocol)
    if others:
        return f"not compared: other {', '.join(others)} than dense's"
    return f"{base.nats - own.nats:+.3f}"
