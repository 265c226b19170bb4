"""Where things are: shipped configs, the cache of tokenised corpora, runs."""

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def config_folder(name: str) -> Path:
    """The folder `conf` or `sweeps`: inside the package in a wheel, beside it in a checkout."""
    inside, beside = PACKAGE / name, PACKAGE.parent / name
    return inside if inside.is_dir() else beside


def cache_folder() -> Path:
    """Tokenised corpora: $PEER_SCALING_CACHE, else $XDG_CACHE_HOME/peer_scaling or ~/.cache."""
    own = os.environ.get("PEER_SCALING_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "peer_scaling"
