"""The global random generators, as plain values.

Training draws from private generators only, and data order is a function of the step, so that none
of these is needed to continue a run. They are kept for what a user adds.
"""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def capture_rng() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """States of Python's and NumPy's generators as JSON values, of PyTorch's as uint8 tensors."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    values = {
        "python": [version, list(words), gauss],
        "numpy": [name, [int(k) for k in keys], int(position), int(has_gauss), float(cached)],
    }
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda.{n}": s for n, s in enumerate(torch.cuda.get_rng_state_all())}
    return values, tensors


def restore_rng(values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Set what `capture_rng` returned; GPUs that are not here are left out."""
    version, words, gauss = values["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = values["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(tensors["cpu"])
    for number in range(torch.cuda.device_count()):
        if f"cuda.{number}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda.{number}"], number)
