"""Each benchmark runs in its quick form and ends with one JSON line of ratios."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PATHS = (ROOT / "benchmarks").glob("*.py")
NAMES = sorted(path.stem for path in PATHS if "def main(" in path.read_text())
MINUTES = ("adaptive", "study")
"""They train dozens of runs, quick or not: `make bench` has them, and the full tier of the tests."""


@pytest.mark.parametrize("name", NAMES)
def test_quick_benchmarks_end_with_a_line_of_ratios(name):
    if name in MINUTES and os.environ.get("PEER_SCALING_FAULTS") != "full":
        pytest.skip("takes minutes; PEER_SCALING_FAULTS=full runs it")
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    ratios = json.loads(result.stdout.splitlines()[-1])
    assert ratios
    assert all(isinstance(ratio, float) and ratio > 0 for ratio in ratios.values())
