"""Facts of the machine that a record holds."""

import os
import platform
import resource
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from peer_scaling.paths import PACKAGE

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware, without host or user names and without environment variables."""
    packages = ("torch", "numpy", "hydra-core", "peer-scaling")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "packages": {name: _version(name) for name in packages},
    }


def git_commit() -> str | None:
    """Commit of the checkout that this code runs from, `+` if it has changes; None outside one."""
    if not (PACKAGE.parent / ".git").exists():
        return None
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return commit and commit + ("+" if changed else "")


def reset_peak_memory(device: torch.device) -> None:
    """Start measuring the peak memory of a run."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR.exists():
        try:
            _CLEAR.write_text("5")  # resets VmHWM (man 5 proc): runs in one process stay apart
        except OSError:
            return


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory since the reset: of the device on a GPU, of the process otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ModuleNotFoundError:  # PackageNotFoundError: run from a plain checkout
        return None


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(PACKAGE.parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
