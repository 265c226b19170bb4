"""Which runs of a frame may be compared: the others are excluded, each with its reason."""

import pandas as pd

from analysis.records import SETTINGS

CELL = ["variant", "size", "budget", "seed"]
SAME = ["num_params_total", "tokens", "flops", "loss"]
"""What copies of one result have in common."""


def exclude_incomparable(frame: pd.DataFrame) -> None:
    """Give a reason to every usable run that does not belong with the others, in place."""
    for study, group in _usable(frame).groupby("study"):
        _keep_latest(frame, group, "protocol", f"other data, optimiser or backbone than {study}'s")
    for _, group in _usable(frame).groupby(["study", "variant"]):
        variant = group["variant"].iloc[0]
        _keep_latest(frame, group, SETTINGS, f"other settings of {variant} than its")
    for _, group in _usable(frame).groupby(["study", "variant"]):
        _keep_one_routing(frame, group)
    _exclude_repeated(frame, ["study", "run_id"])
    _exclude_repeated(frame, ["study", *CELL])


def _usable(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.loc[frame["excluded"].isna()]


def _keep_latest(frame: pd.DataFrame, group: pd.DataFrame, column: str, what: str) -> None:
    latest = _by_time(group).index[-1]
    values = group[column].fillna("")
    others = group.index[values.to_numpy() != values[latest]]
    frame.loc[others, "excluded"] = (
        f"{what} latest run {frame.loc[latest, 'run_id']}: give them their own study"
    )


def _keep_one_routing(frame: pd.DataFrame, group: pd.DataFrame) -> None:
    """Of a variant that is ranked by a causal route, exclude the runs that have no loss with it."""
    ranked = group.loc[group["routing"].notna()]
    if ranked.empty:
        return
    latest = _by_time(ranked).iloc[-1]
    others = group.index[(group["routing"] != latest["routing"]).to_numpy()]
    frame.loc[others, "excluded"] = (
        f"no loss with {latest['routing']} routing, which {latest['variant']} is ranked by since "
        f"{latest['run_id']}: remove its folder and train it again, or give it its own study"
    )


def _by_time(group: pd.DataFrame) -> pd.DataFrame:
    return group.sort_values("finished_at", na_position="first", kind="stable")


def _exclude_repeated(frame: pd.DataFrame, key: list[str]) -> None:
    """Exclude all but the latest of several runs of one `key`; all of them if they differ, and
    `finished_at` does not say which is the latest. Runs without a seed are no repetitions.
    """
    for _, group in _usable(frame).groupby(key):
        if len(group) > 1:
            _keep_one(frame, _by_time(group), key)


def _keep_one(frame: pd.DataFrame, group: pd.DataFrame, key: list[str]) -> None:
    *older, latest = group.index
    name, time = group.loc[latest, ["run_id", "finished_at"]]
    frame.loc[older, "excluded"] = f"superseded by {name}"
    tied = group.loc[group["finished_at"].fillna("") == (time or "")]
    if len(tied) > 1 and not _are_copies(tied):
        frame.loc[tied.index, "excluded"] = _which(tied, key)


def _are_copies(group: pd.DataFrame) -> bool:
    return len(group[[*CELL, *SAME]].drop_duplicates()) == 1


def _which(tied: pd.DataFrame, key: list[str]) -> str:
    names = ", ".join(dict.fromkeys(tied["run_id"].head(5)))
    losses = ", ".join(map(repr, tied["loss"].head(5).tolist()))
    return (
        f"{len(tied)} runs of one {', '.join(key[1:])} ({names}; losses {losses}), and finished_at "
        "does not say which is the last"
    )
