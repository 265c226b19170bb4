"""What a launcher's runs may use at a time: a GPU each, or a group of cores each."""

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import torch

from peer_scaling import machine
from peer_scaling.pool import Slot, process_context

VISIBLE = "CUDA_VISIBLE_DEVICES"


def make_slots(device: str, threads: int | None, workers: int | None) -> list[Slot]:
    """One slot per GPU, or per `threads` cores where there is no GPU to use.

    The memory that counts is the device's. A run on a GPU has parameters, moments and gradients
    there, and was checked to fit when it has the GPU alone. On the host it has the corpus, mapped
    from a file, and its state only while that is saved: the host's memory holds no such run back.

    Args:
        device: of the runs, a name of PyTorch's or `auto`.
        threads: of a run on a CPU.
        workers: slots, if somebody chose their number; several share a GPU if there are fewer.
    """
    names = visible_gpus() if device in ("auto", "cuda") else []
    if names:
        number = workers or len(names)
        sizes = _free_bytes(names) if number > len(names) else {}
        return [
            Slot({VISIBLE: name}, name, sizes.get(name))
            for name in (names[n % len(names)] for n in range(number))
        ]
    if device.startswith("cuda"):  # one GPU, by its place among the visible ones
        return [Slot(device=device)] * (workers or 1)
    cores = max(1, available_cores() // (threads or 1))
    memory = machine.available_bytes(torch.device("cpu"))
    return [Slot(memory=memory)] * (workers or cores)


def visible_gpus() -> list[str]:
    """Names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES has them: numbers, UUIDs
    or MIG instances.
    """
    count = torch.cuda.device_count()
    if not count or VISIBLE not in os.environ:
        return [str(number) for number in range(count)]
    names = [name.strip() for name in os.environ[VISIBLE].split(",")]
    instances = [name for name in names if name.startswith("MIG-")]
    # CUDA shows a process one MIG instance, however many are named; of other names those before the
    # first that is none.
    return instances or names[:count]


def _free_bytes(names: Sequence[str]) -> dict[str, int]:
    """Memory that is free on each GPU, each asked by a process of its own: one that has asked keeps
    some hundred MB there.
    """
    context = process_context()
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as executor:
        return dict(zip(names, executor.map(_free_bytes_of, names), strict=True))


def _free_bytes_of(name: str) -> int:
    os.environ[VISIBLE] = name
    return torch.cuda.mem_get_info(0)[0]


def available_cores() -> int:
    """Cores that this process may use, in a container or job fewer than there are."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
