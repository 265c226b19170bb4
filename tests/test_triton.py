"""The Triton kernels, in processes of their own: Triton settles how it runs when it is imported."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from conftest import ROOT

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def run_file(name, **environment):
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "TRITON_"))}
    command = [sys.executable, "-m", "pytest", f"tests/{name}", "-p", "no:cacheprovider"]
    result = subprocess.run(
        command, cwd=ROOT, env=inherited | environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout + result.stderr


@needs_triton
def test_kernels_in_the_interpreter():
    run_file("triton_cases.py", TRITON_INTERPRET="1")


@needs_triton
def test_kernels_through_the_compiler():
    run_file("triton_compiles.py")


@needs_triton
@needs_gpu
def test_kernels_on_the_gpu():
    run_file("triton_cases.py")


def test_only_the_kernels_import_triton():
    for path in (ROOT / "peer_scaling").rglob("*.py"):
        if not path.name.startswith("triton_"):
            assert not re.search(r"(?m)^\s*(import|from) triton\b", path.read_text()), path
