"""The backends of our kernels that run here."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from peer_scaling.kernels.dispatch import backend_for, use_backend
from peer_scaling.kernels.native import NativeBuildError

NAMES = ("torch", "native")


@contextmanager
def forced(backend: str | None) -> Iterator[None]:
    """Run our layers with one backend; None leaves the choice to them."""
    with use_backend(backend or "auto"):
        yield


def available() -> tuple[str, ...]:
    """The backends of this CPU; a printed line for each that cannot be had."""
    found = []
    for name in NAMES:
        try:
            with use_backend(name):
                backend_for(torch.device("cpu"), torch.float32)
            found.append(name)
        except NativeBuildError as error:
            print(f"backend {name} is skipped: {error}", flush=True)
    return tuple(found)
