"""Which backend computes: by device and dtype, or by name.

`auto` takes Triton on CUDA and the C++ kernels on a CPU, where they can be had, and plain PyTorch
operations otherwise; `plain` is the definition with PyTorch's own autograd, for tests and for
counting FLOPs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec

import torch

from peer_scaling.kernels.backend import Backend
from peer_scaling.kernels.native import NativeBuildError
from peer_scaling.kernels.torch_backend import TorchBackend

BACKENDS = ("auto", "plain", "torch", "native", "triton")
_NATIVE_TYPES = (torch.float32, torch.float64)
_TRITON_TYPES = (torch.float32, torch.bfloat16)
_wanted: ContextVar[str] = ContextVar("peer_scaling_kernels", default="auto")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Compute with this backend inside the context, in this thread.

    Raises:
        ValueError: the name is none of `BACKENDS`.
    """
    if name not in BACKENDS:
        raise ValueError(f"kernels={name!r} is unknown; choose one of {', '.join(BACKENDS)}")
    token = _wanted.set(name)
    try:
        yield
    finally:
        _wanted.reset(token)


def backend_for(device: torch.device, dtype: torch.dtype) -> Backend | None:
    """The backend for tensors like these; None for the plain definitions.

    Raises:
        NativeBuildError: `native` was asked for by name and cannot be built.
        ValueError: a backend was asked for by name that cannot compute with such tensors.
    """
    wanted = _wanted.get()
    if wanted == "plain":
        return None
    if wanted == "torch":
        return _backend("torch")
    name = _best(device, dtype)
    if wanted in ("auto", name):
        return _backend(name)
    if wanted == "native" and device.type == "cpu" and dtype in _NATIVE_TYPES:
        return _native()  # says why not
    raise ValueError(f"kernels={wanted} does not compute with {dtype} on {device}; use auto")


def backend_name(device: torch.device, dtype: torch.dtype) -> str:
    """Name of what computes for tensors like these, for records; with the reason, if it is only the
    second best.
    """
    backend = backend_for(device, dtype)
    if backend is None:
        return "plain"
    if _wanted.get() == "auto" and device.type == "cpu" and backend.name == "torch":
        return f"torch ({_native_problem() or f'no native kernels for {dtype}'})"
    return backend.name


def _best(device: torch.device, dtype: torch.dtype) -> str:
    if device.type == "cpu" and dtype in _NATIVE_TYPES and _native_problem() is None:
        return "native"
    if device.type == "cuda" and dtype in _TRITON_TYPES and find_spec("triton"):
        return "triton"
    return "torch"


@cache
def _backend(name: str) -> Backend:
    if name == "native":
        return _native()
    if name == "triton":  # a package that CPU builds of PyTorch do not bring
        from peer_scaling.kernels.triton_backend import TritonBackend

        return TritonBackend()
    return TorchBackend()


def _native() -> Backend:
    from peer_scaling.kernels.native_backend import NativeBackend

    return NativeBackend()


@cache
def _native_problem() -> str | None:
    """Why there are no native kernels; None if there are."""
    try:
        _native()
    except (NativeBuildError, OSError) as error:
        return str(error)
    return None
