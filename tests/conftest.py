"""Fixtures shared by all tests: a private cache, one CPU thread, the reference data if it is there."""

import os
from pathlib import Path

import pytest
import torch

from peer_scaling import pool

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def _machine(tmp_path_factory):
    """One thread, because tests run side by side; corpora in a cache of their own."""
    torch.set_num_threads(1)
    cache = tmp_path_factory.mktemp("cache")
    previous = os.environ.get("PEER_SCALING_CACHE")
    os.environ["PEER_SCALING_CACHE"] = str(cache)
    yield
    if previous is None:
        del os.environ["PEER_SCALING_CACHE"]
    else:
        os.environ["PEER_SCALING_CACHE"] = previous


@pytest.fixture(scope="session", autouse=True)
def _pools():
    """A process of a pool imports the main module again, which is pytest: half a second for each,
    unless the server that it is forked from has it.
    """
    pool.PRELOADED = (*pool.PRELOADED, "pytest")


@pytest.fixture(autouse=True)
def _environment():
    """As it was after every test: W&B leaves the address of its process there, and PyTorch settings."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys() - {"PYTEST_CURRENT_TEST"}:
        del os.environ[name]


@pytest.fixture
def reference_data() -> Path:
    """The folder of real data beside the project; the test is skipped without it."""
    folder = Path(os.environ.get("PEER_SCALING_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no reference data at {folder}; set PEER_SCALING_DATA")
    return folder
