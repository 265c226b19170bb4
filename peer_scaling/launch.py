"""The console script `peer-train`: knows a finished study by its stamp, before anything heavy is
imported; everything else is `train.py`'s.
"""

import sys

from peer_scaling.errors import EXIT_DONE
from peer_scaling.stamp import Launch


def main() -> None:
    """Say that there is nothing to do, or do it."""
    launch = Launch.begin()
    text = launch.finished_text() if launch else None
    if text is not None:
        print(text, flush=True)
        sys.exit(EXIT_DONE)
    from peer_scaling import train

    train.main(launch)
