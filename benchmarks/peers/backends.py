"""The backends of our kernels, as the environment variable of `peer_scaling.kernels` names them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from peer_scaling.ffw.peer import PEER

VARIABLE = "PEER_SCALING_BACKEND"
NAMES = ("torch", "native")


@contextmanager
def forced(backend: str | None) -> Iterator[None]:
    """Run our layers with one backend; None leaves the choice to them."""
    before = os.environ.get(VARIABLE)
    if backend is not None:
        os.environ[VARIABLE] = backend
    try:
        yield
    finally:
        if backend is not None:
            os.environ.pop(VARIABLE)
            if before is not None:
                os.environ[VARIABLE] = before


def available() -> tuple[str, ...]:
    """The backends that run here; none if the package has a single one and reads no variable."""
    if _failure("no such backend") is None:
        return ()
    failures = {name: _failure(name) for name in NAMES}
    for name, failure in failures.items():
        if failure is not None:
            print(f"backend {name} is skipped: {failure}", flush=True)
    return tuple(name for name, failure in failures.items() if failure is None)


def _failure(backend: str) -> str | None:
    layer = PEER(num_experts=16, num_heads=1, experts_per_head=2, key_dim=4).build(8)
    with forced(backend):
        try:
            layer(torch.randn(1, 4, 8)).y_BTD.sum().backward()
        except Exception as error:  # whichever way a backend says that it cannot run
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None
