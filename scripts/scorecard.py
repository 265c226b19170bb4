"""Prints what `make faults` measured as a Markdown table; exits with 1 if a row has no result.

    python scripts/scorecard.py <file of JSON lines>

A test reports its figure when all it asserts holds, so a figure that is there was reached. Lines
come from tests/faults/scorecard.py.
"""

import json
import sys
from collections import Counter
from datetime import date
from pathlib import Path

REQUIRED = {
    "F01": (
        "kill -9 at random times, 4 variants",
        "300 kills: 0 runs lost, 0 differing bits, lost work <= 1 save interval",
    ),
    "F02": ("kill -9 at every labelled point x 3", "100 % resume, 0 torn checkpoints chosen"),
    "F05": ("four signals x 25 random steps", "durable, right exit code, <= 1 step lost"),
    "F07": (
        "real Slurm: warned of the limit, preempted, kill -9 of a worker, scancel",
        "final status right, cancelled never requeued, resumed runs bit-identical",
    ),
    "F09": ("evaluate every 10 %, every 1 %, never", "training state bit-identical"),
    "F10": ("100 truncations", "all detected, the one before used"),
    "F11": ("1,000 single-bit flips", "all detected, the one before used"),
    "F12": ("every file deleted or renamed once", "all detected, the one before used"),
    "F13": ("disk full at 50 places", "the one before intact 50/50, 0 false 'saved'"),
    "F14": ("read-only, EIO, ESTALE", "0 false 'saved'"),
    "F15": ("20 disks that are too small", "refused in < 5 s with need and have"),
    "F16": ("NaN or Inf 200 times", "0 updates after the bad value"),
    "F17": ("learning rate x 1000, 4 variants x 5 seeds", "all within 50 steps, 0 false alarms"),
    "F18": ("out of memory 60 times", "0 samples dropped or doubled"),
    "F19": (
        "one job of 32 fails in five ways",
        "the other 31 complete, the failed one handled by policy",
    ),
    "F20": ("flaky jobs, p = 0.3, 64 x 10", "640 of 640 done, attempts counted right"),
    "F21": ("10 jobs hang", "found within 2 heartbeats of the limit, done again"),
    "F22": ("64 writers x 200 records, 8 readers, random kills", "12,800, 0 duplicates, 0 errors"),
    "F23": ("two launchers start the same 256 runs, 20 times", "5,120 of 5,120 exactly once"),
    "F24": ("SIGSTOP past the lease, 50 times", "one record each, <= 1 step after waking"),
    "F26": ("re-launch of a finished study of 256 runs", "0 runs, < 2 s, same tables"),
    "F27": ("one more budget, seed or variant; cosmetic changes", "only what is new; 0 runs"),
    "F28": ("semantic changes under an old name", "new identities, never mixed"),
    "F29": ("1,000 malformed, 200 valid configs", "0 tracebacks, >= 95 % name the key, 0 refused"),
    "F30": ("200 hostile configs", "0 executions, 0 writes outside"),
    "F31": ("50 malicious pickles", "0 executions"),
    "F32": ("secrets canary", "0 found"),
    "F34": ("resume at step 200 after logging to 212", "each step once, the rewound lines kept"),
    "F37": (
        "nine planted leaks x 5 seeds, 4 clean variants x 5 seeds",
        "all found, no false alarm, < 2 s on a CPU",
    ),
    "F42": ("soak: 2,000 runs of 1 s, random kills", "2,000 of 2,000, memory growth < 5 %"),
    "F41": ("same config, 20 repeats", "1 digest"),
}  # fmt: skip
"""Fault -> what is done, and the figure to reach."""


def main() -> int:
    """Print the table; the exit code."""
    lines = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    print(f"{date.today()}, `make faults`\n")
    print("| fault | required | reached |\n|---|---|---|")
    for fault, (what, required) in REQUIRED.items():
        reached = _reached(fault, lines) or "**NOT REACHED**"
        print(f"| {fault} {what} | {required} | {reached} |")
    missing = REQUIRED.keys() - {line["fault"] for line in lines}
    if missing:
        print(f"\nno result: {', '.join(sorted(missing))}", file=sys.stderr)
    return 1 if missing else 0


def _reached(fault: str, lines: list[dict[str, str]]) -> str:
    """The figures of a fault; equal ones once, with how often they came."""
    figures = Counter(line["figure"] for line in lines if line["fault"] == fault)
    return "; ".join(f"{n} x {text}" if n > 1 else text for text, n in sorted(figures.items()))


if __name__ == "__main__":
    sys.exit(main())
