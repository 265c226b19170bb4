"""A command line with the files that it reads, and what its message must name."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Case:
    """One configuration."""

    kind: str
    arguments: tuple[str, ...]
    files: dict[str, str] = field(default_factory=dict)
    """By path in the case's folder; surrogates stand for single bytes."""
    names: str | None = None
    """What an error line must hold: the faulty key, or the file if that is no YAML at all."""
    meant: str | None = None
    """The key or option that was mistyped, which must be suggested."""
    links: dict[str, str] = field(default_factory=dict)
    """Symbolic links, from path in the case's folder to target."""


def study(text: str, *arguments: str, **more) -> Case:
    """The case of a study in the user's own folder of studies, planned but not trained."""
    own = ("--config-dir", "mine", "--config-name", "own", "dry_run=true")
    return Case(arguments=(*own, *arguments), files={"mine/own.yaml": text}, **more)


STUDY = """defaults:
  - train
  - override data: synthetic
  - override tracker: "off"
  - override hydra/sweeper: isoflop
  - override hydra/launcher: local
  - _self_
study: own
{top}
hydra:
  mode: MULTIRUN
  sweeper:
    ladder: {ladder}
    variants: {variants}
    seeds: {seeds}
{hydra}"""


def study_text(
    top="batch_size: 4",
    ladder="[{budget: 2e9, sizes: [d8_l2]}]",
    variants="{dense: {}, moe: {num_experts: 8}}",
    seeds="[0]",
    hydra="",
):
    """A good study, but for what is given."""
    return STUDY.format(top=top, ladder=ladder, variants=variants, seeds=seeds, hydra=hydra)
