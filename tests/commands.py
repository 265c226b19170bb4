"""The commands as a user types them, in their own processes and folders."""

import os
import subprocess
import sys
from pathlib import Path

BIN = Path(sys.executable).parent


def command(name, *arguments, folder, **environment):
    keep = {"PATH", "HOME", "PEER_SCALING_CACHE", "LANG", "TMPDIR"}
    env = {k: v for k, v in os.environ.items() if k in keep}
    env |= {"OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [str(BIN / name), *arguments],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )


def peer_train(*arguments, folder, **environment):
    return command("peer-train", *arguments, folder=folder, **environment)
