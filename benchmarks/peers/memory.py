"""Memory that a forward and backward pass takes on top of the weights.

Each implementation has a process of its own: memory that an earlier one freed, but that the
allocator kept, would hide what a later one takes. The processes fork from a server that has
imported PyTorch once and has run nothing.
"""

import ctypes
import multiprocessing
import resource
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import forkserver

import torch

from benchmarks.peers.backends import forced
from benchmarks.peers.cases import contenders
from benchmarks.peers.contender import Case, Contender, inputs
from peer_scaling.machine import (
    available_bytes,
    is_out_of_memory,
    peak_memory_bytes,
    reset_peak_memory,
)

M_MMAP_THRESHOLD = -3
"""Option number of glibc's mallopt, from its malloc.h."""
PRELOAD = (
    __name__,
    "PEER_pytorch",
    "product_key_memory",
    "st_moe_pytorch",
    "transformers.models.mixtral.modeling_mixtral",
    "transformers.models.switch_transformers.modeling_switch_transformers",
)
"""Modules that take seconds to import; the server passes over those that are not installed."""
MMAP_BYTES = 64 * 1024
"""Tensors from this size on go back to the system when freed (glibc's own limit grows by use)."""
WARMUP_TOKENS = 8


def start_server() -> None:
    """Start the process that measurements fork from; it imports while the caller goes on."""
    multiprocessing.set_forkserver_preload(list(PRELOAD))
    forkserver.ensure_running()


def extra_bytes(case: Case, name: str, threads: int) -> int | None:
    """Peak of resident memory over the level before, gradients included; None if out of memory."""
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        return executor.submit(_measure, case, name, threads).result()


def _measure(case: Case, name: str, threads: int) -> int | None:
    torch.set_num_threads(threads)
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)
        limit_memory()
    (contender,) = [c for c in contenders(case) if c.name == name]
    cpu = torch.device("cpu")
    try:
        _pass(contender, case, WARMUP_TOKENS)
        x_BTD, grad_BTD = inputs(case)
        reset_peak_memory(cpu)
        before = peak_memory_bytes(cpu)
        with forced(contender.backend):
            contender.module(x_BTD).backward(grad_BTD)
        return peak_memory_bytes(cpu) - before
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None


def _pass(contender: Contender, case: Case, tokens: int) -> None:
    x_BTD, grad_BTD = inputs(case, tokens)
    with forced(contender.backend):
        contender.module(x_BTD).backward(grad_BTD)
    contender.module.zero_grad(set_to_none=True)


def limit_memory() -> None:
    """Make an allocation beyond the machine's free memory an error instead of a killed process."""
    free = available_bytes(torch.device("cpu"))
    if free is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (int(0.95 * free), hard))
