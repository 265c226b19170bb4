"""Builds `rows.cpp` on demand and loads it: plain C functions over pointers, found with ctypes.

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
from ctypes import c_int64, c_void_p
from functools import cache
from pathlib import Path

from peer_scaling.paths import cache_folder

SOURCE = Path(__file__).with_name("rows.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC")
COMPILERS = ("c++", "g++", "clang++")
_SIGNATURES = {
    "sort_pairs": "pnnnpp",
    "list_rows": "ppnnnp",
    "prefer_huge_pages": "pn",
    "dots": "pnnnnppp",
    "bag": "pnnnnppp",
    "row_sums": "ppnnnnnppnp",
    "best_pairs": "pnnnnnnnpp",
}
"""Arguments of the functions: pointers and 64-bit numbers."""
_TYPED = ("dots", "bag", "row_sums", "best_pairs")
SUFFIXES = ("float32", "float64")


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


def _compiler() -> str:
    for name in (os.environ.get("CXX"), *COMPILERS):
        found = name and shutil.which(name)
        if found:
            return found
    raise NativeBuildError(f"no C++ compiler ({', '.join(COMPILERS)}, or CXX=...)")


def _fingerprint(compiler: str) -> str:
    """Of the source, the flags, the compiler's version and the instructions it may use here."""
    macros = _run(compiler, *FLAGS, "-E", "-dM", "-x", "c++", os.devnull)
    facts = SOURCE.read_bytes() + " ".join((compiler, *FLAGS)).encode() + macros
    return hashlib.sha256(facts).hexdigest()[:16]


def _build(compiler: str, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            output = Path(folder) / path.name
            _run(compiler, *FLAGS, "-shared", "-o", str(output), str(SOURCE))
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
