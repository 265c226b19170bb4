"""Everything that the page of a study shows, worked out before a word of it is written."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from analysis.evidence import Study
from analysis.isoflop import IsoflopFit, fit_isoflop
from analysis.load import ONLINE, as_frame, load_runs, usable
from analysis.profile import Profile
from analysis.record_set import RecordSet, read_record_set
from analysis.verdicts import Comparison, compare_study


@dataclass(frozen=True, eq=False)
class StudyReport:
    """Frozen results and the records behind them."""

    study: Study
    comparison: Comparison | None
    """None where there is nothing to compare."""
    why_not: str
    """Empty if there is one."""
    records: RecordSet
    command: str
    """That writes the page again."""

    @property
    def fit(self) -> IsoflopFit:
        """All curves and power laws."""
        return self.study.fit

    @property
    def frame(self) -> pd.DataFrame:
        """All runs, excluded ones too."""
        return self.study.frame

    @property
    def profiles(self) -> list[Profile]:
        """By budget, then in the order of the variants."""
        place = {variant: i for i, variant in enumerate(self.fit.variants)}
        return sorted(self.fit.profiles, key=lambda p: (p.budget, place[p.variant]))

    @property
    def variants(self) -> Sequence[str]:
        """Those with curves, then those of which no run can be used."""
        others = {v for v in self.frame["variant"] if isinstance(v, str)} - set(self.fit.variants)
        return [*self.fit.variants, *sorted(others)]


def study_report(
    source: str, study: str | None, axis: str, baseline: str | None, command: str
) -> StudyReport:
    """Load, fit and compare.

    Args:
        source: as `load_runs` takes it.
        study: only this one's runs; the others are looked at for other learning rates.
        axis: what N counts.
        baseline: reference of all pairs it is in.
        command: kept.

    Raises:
        AnalysisError: nothing that can be used, runs of several studies, no such baseline.
    """
    frame = load_runs(source, study)
    beside = study and not source.startswith(ONLINE)
    tuning = load_runs(source) if beside else frame
    records = read_record_set(source, frame)
    variants = set(usable(frame)["variant"])
    if len(variants) == 1 and baseline is None:
        why = f"there is one variant, {variants.pop()}, and nothing to compare it with"
        own = Study(fit_isoflop(frame, axis), as_frame(frame), tuning)
        return StudyReport(own, None, why, records, command)
    comparison = compare_study(frame, axis, baseline, tuning)
    own = Study(comparison.fit, comparison.frame, tuning)
    return StudyReport(own, comparison, "", records, command)
