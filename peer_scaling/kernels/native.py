"""Builds the C++ kernels on demand and loads them: C functions over pointers, found with ctypes.

No headers of PyTorch and no build system take part, so that a build takes 2 seconds and holds for
every version of PyTorch. The result is cached by the source, the compiler and the processor's
instruction set, and put in place by a rename: processes may build at the same time.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch

from peer_scaling.paths import cache_folder

FOLDER = Path(__file__).parent
SOURCES = ("rows.cpp", "top_pairs.cpp", "adamw.cpp")
HEADERS = ("lanes.h",)
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-std=c++17", "-fPIC")
COMPILERS = ("c++", "g++", "clang++")
_SIGNATURES = {
    "sort_pairs": "pnnnpp",
    "list_rows": "ppnnnp",
    "dots": "pnnnnppp",
    "bag": "pnnnnppp",
    "row_sums": "ppnnnnnppnp",
    "best_pairs": "pnnnnnnnpp",
    "adamw": "pppnnnpnppn",
}
"""Arguments of the functions: pointers and 64-bit numbers."""
_TYPED = ("dots", "bag", "row_sums", "best_pairs", "adamw")
SUFFIXES = ("float32", "float64")
MIN_NUMBERS_PER_THREAD = 2**21
"""Below this much work a thread costs more than it gives."""


class NativeBuildError(Exception):
    """The native kernels cannot be built here; the message says why."""


@cache
def library() -> ctypes.CDLL:
    """The compiled kernels; built at the first call of the first process that needs them.

    Raises:
        NativeBuildError: there is no C++ compiler, or it fails.
    """
    compiler = _compiler()
    path = cache_folder() / "kernels" / f"rows-{_fingerprint(compiler)}.so"
    if not path.exists():
        _build(compiler, path)
    return _declare(ctypes.CDLL(str(path)))


def function(name: str, dtype: torch.dtype) -> Any:
    """The kernel of a name for float32 or float64."""
    return getattr(library(), f"{name}_{str(dtype).removeprefix('torch.')}")


def split_work(total: int, numbers: int) -> list[int]:
    """Bounds of even ranges, as many as there are threads and work for them."""
    parts = max(1, min(torch.get_num_threads(), numbers // MIN_NUMBERS_PER_THREAD, total))
    return [total * part // parts for part in range(parts + 1)]


def run_all(calls: Iterable[Callable[[], Any]]) -> list[Any]:
    """Results of the calls, each on a thread of its own if there are several: they run in C++ and
    hold no lock of Python's.
    """
    to_do = list(calls)
    if len(to_do) == 1:
        return [to_do[0]()]
    with ThreadPoolExecutor(len(to_do)) as pool:
        return list(pool.map(lambda call: call(), to_do))


def _compiler() -> str:
    for name in (os.environ.get("CXX"), *COMPILERS):
        found = name and shutil.which(name)
        if found:
            return found
    raise NativeBuildError(f"no C++ compiler ({', '.join(COMPILERS)}, or CXX=...)")


def _fingerprint(compiler: str) -> str:
    """Of the source, the flags, the compiler's version and the instructions it may use here."""
    macros = _run(compiler, *FLAGS, "-E", "-dM", "-x", "c++", os.devnull)
    code = b"".join((FOLDER / name).read_bytes() for name in SOURCES + HEADERS)
    facts = code + " ".join((compiler, *FLAGS)).encode() + macros
    return hashlib.sha256(facts).hexdigest()[:16]


def _build(compiler: str, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            output = Path(folder) / path.name
            _run(
                compiler,
                *FLAGS,
                "-shared",
                "-o",
                str(output),
                *(str(FOLDER / name) for name in SOURCES),
            )
            output.replace(path)
    except OSError as error:
        raise NativeBuildError(f"{path.parent}: {error.strerror}") from error


def _run(*command: str) -> bytes:
    result = subprocess.run(command, capture_output=True, check=False)
    if result.returncode:
        said = result.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise NativeBuildError(f"{command[0]} failed: {said[0]}")
    return result.stdout


def _declare(loaded: ctypes.CDLL) -> ctypes.CDLL:
    kinds = {"p": c_void_p, "n": c_int64}
    for name, arguments in _SIGNATURES.items():
        for full in [f"{name}_{s}" for s in SUFFIXES] if name in _TYPED else [name]:
            function = getattr(loaded, full)
            function.argtypes = [kinds[kind] for kind in arguments]
            function.restype = c_int64 if name == "list_rows" else None
    return loaded
