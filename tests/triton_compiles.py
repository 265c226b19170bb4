"""The Triton kernels through the compiler for Hopper, with no GPU; `test_triton.py` runs this file.

The interpreter runs what the compiler may refuse, or compile to narrow loads.
"""

import re

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from peer_scaling.kernels import triton_rows, triton_scatter, triton_tiles

WIDE_LOAD = r"ld\.global\S*\.(v4\.b32|v2\.b64)"
WIDE_ADD = r"(red|atom)\.global\S*\.(v4\.f32|f64)"


class Hopper:
    """As much of a driver as compilation asks for."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


class Compiled:
    """A kernel that is compiled where it would be launched."""

    def __init__(self, kernel, assembly):
        self.kernel, self.assembly = kernel, assembly

    def __getitem__(self, grid):
        def compile_only(*args, **constants):
            compiled = self.kernel.warmup(*args, grid=grid, **constants)
            self.assembly[self.kernel.__name__] = compiled.asm["ptx"]

        return compile_only


@pytest.fixture
def assembly(monkeypatch, tmp_path):
    """PTX by the name of the kernel, for those that were launched."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    driver.set_active(Hopper())
    found = {}
    for module in (triton_rows, triton_scatter):
        for name, value in list(vars(module).items()):
            if isinstance(value, triton.JITFunction) and name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Compiled(value, found))
    return found


@pytest.mark.parametrize(
    ("dtype", "width", "activation"),
    [(torch.bfloat16, 96, "gelu"), (torch.float64, 64, "silu")],
    ids=str,
)
def test_kernels_compile_to_wide_loads(dtype, width, activation, assembly):
    acc = triton_tiles.accumulator(torch.empty(0, dtype=dtype))
    x, (down, up) = torch.zeros(2, width, dtype=dtype), torch.zeros(2, 5, width, dtype=dtype)
    index, gate = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, dtype=acc)
    experts, modes = (index, gate, down, up), {"compact": False, "atomic": False}
    _, pre = triton_rows.experts_forward(x, *experts, activation)
    triton_rows.experts_backward(x, x, index, gate, pre, down, up, activation, **modes)
    triton_rows.bag_forward(index, gate, up)
    triton_rows.bag_backward(x, index, gate, up, compact=False, atomic=True)
    assert sorted(assembly) == [
        "atomic_kernel",
        "bag_kernel",
        "dots_kernel",
        "experts_backward_kernel",
        "experts_forward_kernel",
        "segment_kernel",
    ]
    for name, ptx in assembly.items():
        assert ".local" not in ptx, name
        assert re.search(WIDE_ADD if name == "atomic_kernel" else WIDE_LOAD, ptx), name
