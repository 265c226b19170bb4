"""Facts of the machine: what a record holds of it, its memory, and how fast it is at its best."""

import ctypes
import errno
import gc
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from peer_scaling.kernels.dispatch import backend_name
from peer_scaling.paths import PACKAGE

_STATUS = Path("/proc/self/status")
_MEMORY = Path("/proc/meminfo")
_CLEAR = Path("/proc/self/clear_refs")
_CGROUP_FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""By controller, which version 2 does not name: limit, use, and the part of it that is cache."""
_OUT_OF_MEMORY = ("allocate memory", "not enough memory", "ALLOC_FAILED")

_TRANSIENT = {
    errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EBUSY, errno.ENETDOWN, errno.ENETUNREACH,
    errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOLCK, errno.EINTR,
}  # fmt: skip


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
    if (peak := _status_bytes("VmHWM")) is not None:
        return peak
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_in_use(device: torch.device) -> int:
    """Memory now: of the device on a GPU, of the process otherwise; 0 where it is not known."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status_bytes("VmRSS") or 0


def release_memory() -> None:
    """Give the system back what nothing refers to any more, and what allocators keep of it."""
    gc.collect()  # a model and an error inside it refer to each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = sys.platform == "linux" and getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc
    if trim:
        trim(0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed. By type, but for what PyTorch raises as a bare RuntimeError:
    its CPU allocator's and cuBLAS's failures can be known by their messages only.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, torch.AcceleratorError):  # of CUDA itself, past PyTorch's allocator
        return "out of memory" in str(error)
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return type(error) is RuntimeError and any(text in str(error) for text in _OUT_OF_MEMORY)


def is_transient(error: BaseException) -> bool:
    """Whether the same attempt may well succeed a little later: a disk, the network, or another
    process of the run did not answer. By type and number, never by message.
    """
    if isinstance(error, ConnectionError | TimeoutError | torch.distributed.DistError):
        return True
    return isinstance(error, OSError) and error.errno in _TRANSIENT


def available_bytes(device: torch.device) -> int | None:
    """Memory that this process can still get on a device; None where the system does not say.

    On a GPU, what is free there and what PyTorch holds unused. Otherwise what the system can give
    without swapping, or what a control group leaves if that is less.
    """
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    if device.type != "cpu" or not _MEMORY.exists():
        return None
    lines = dict(line.split(":") for line in _MEMORY.read_text().splitlines())
    return min([int(lines["MemAvailable"].split()[0]) * 1024, *cgroup_bytes()])  # kB


def cgroup_bytes(
    groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> Iterator[int]:
    """Memory that is left in each control group of this process that has a limit, version 1 or 2.

    Files that were read count as use, but are dropped when the memory is needed.
    """
    if not groups.exists():
        return
    for line in groups.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in _CGROUP_FILES:
            continue
        limit_name, use_name, cache_name = _CGROUP_FILES[controllers]
        top = root / controllers
        own = top / path.lstrip("/")
        for folder in (own, *own.parents[: len(own.parts) - len(top.parts)]):
            limit = folder / limit_name
            if limit.exists() and (text := limit.read_text().strip()) != "max":
                stat = dict(s.split() for s in (folder / "memory.stat").read_text().splitlines())
                used = int((folder / use_name).read_text()) - int(stat.get(cache_name, 0))
                yield max(0, int(text) - used)


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


def _status_bytes(name: str) -> int | None:
    """A line of /proc/self/status; None where there is none."""
    if not _STATUS.exists():
        return None
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines[name].split()[0]) * 1024 if name in lines else None  # kB


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
