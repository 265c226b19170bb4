"""Facts of the machine that a record holds, and how fast it is at its best."""

import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from peer_scaling.kernels.dispatch import backend_name
from peer_scaling.paths import PACKAGE

_STATUS = Path("/proc/self/status")
_MEMORY = Path("/proc/meminfo")
_CLEAR = Path("/proc/self/clear_refs")


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware, without host or user names and without environment variables."""
    packages = ("torch", "numpy", "hydra-core", "peer-scaling")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": _device_name(device),
        "kernels": backend_name(device, torch.float32),
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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed. By type, but for PyTorch's CPU allocator, which raises a bare
    RuntimeError and can be known by its message only.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return type(error) is RuntimeError and "allocate memory" in str(error)


def available_bytes() -> int | None:
    """Memory that the system can give without swapping; None where it does not say."""
    if not _MEMORY.exists():
        return None
    lines = dict(line.split(":") for line in _MEMORY.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024  # kB


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product: the peak that a run's speed is compared with.

    A product of 1024 x 1024 numbers (8192 x 8192 on a GPU) of type `dtype` on the threads that are
    set now, once to warm up, then up to 10 times within 0.1 seconds; the fastest counts. A few
    milliseconds on a GPU, under 0.2 seconds on a CPU core of 50 GFLOP/s or more.
    """
    size = 8192 if device.type == "cuda" else 1024
    a = torch.ones(size, size, device=device, dtype=dtype)
    return 2 * size**3 / _fastest(lambda: torch.matmul(a, a), device)


def copy_peak(device: torch.device) -> float:
    """Bytes per second, read and written, of a copy of 256 MiB; timed as `matmul_peak` is."""
    a = torch.ones(2**26, device=device)
    b = torch.empty_like(a)
    return 2 * a.numel() * a.element_size() / _fastest(lambda: b.copy_(a), device)


def _fastest(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of at least 1 and at most 10 calls within 0.1 seconds."""
    call()
    _synchronize(device)
    times = []
    while not times or (len(times) < 10 and sum(times) < 0.1):
        began = time.perf_counter()
        call()
        _synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
