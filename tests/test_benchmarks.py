"""Each benchmark runs in its quick form and ends with one JSON line of ratios."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PATHS = (ROOT / "benchmarks").glob("*.py")
NAMES = sorted(path.stem for path in PATHS if "def main(" in path.read_text())


@pytest.mark.parametrize("name", NAMES)
def test_quick_benchmarks_end_with_a_line_of_ratios(name):
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    ratios = json.loads(result.stdout.splitlines()[-1])
    assert ratios
    assert all(isinstance(ratio, float) and ratio > 0 for ratio in ratios.values())
