"""Our layers against other implementations of the same layers: time, memory and exactness.

    python -m benchmarks.layers [--quick]
    python -m benchmarks.layers --layers peer --num-experts 16384 262144 --json layers.json

Each implementation has our weights and is checked against float64 first, outputs and gradients; one
that is wrong is not timed, and ends the benchmark. Then all take turns. Quote ratios, not
milliseconds. The last line is one JSON object: every implementation over ours.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.backends import available
from benchmarks.peers.cases import LAYERS, cases, contenders
from benchmarks.peers.check import TOLERANCE, relative_error
from benchmarks.peers.contender import Case, Contender, inputs
from benchmarks.peers.memory import extra_bytes, limit_memory, start_server
from benchmarks.peers.report import Result, machine_facts
from benchmarks.peers.timing import MEASURES, Turns
from peer_scaling.machine import is_out_of_memory

QUICK = {"d_model": [64], "num_experts": [64**2], "tokens": [256], "moe_experts": 8, "rounds": 3}


def main() -> int:
    """Print a table per comparison and the JSON line."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    facts = machine_facts()
    if not arguments.no_memory:
        start_server()
    limit_memory()
    backends = tuple(arguments.backends) if arguments.backends else available()
    results: list[Result] = []
    for case in _cases(arguments, backends):
        result = _compare(case, arguments)
        if result is None:
            return 1
        results.append(result)
        if arguments.json:
            _write(arguments.json, facts, results)
    print(json.dumps({key: ratio for r in results for key, ratio in r.ratios().items()}))
    return 0


def _compare(case: Case, arguments: argparse.Namespace) -> Result | None:
    """All measurements of one comparison; None, and a line, if an implementation is wrong."""
    found = contenders(case)
    result = _checked(case, found)
    wrong = [n for n, error in result.errors.items() if error is not None and error > TOLERANCE]
    for name in wrong:
        problem = f"relative error {result.errors[name]:.1e} exceeds {TOLERANCE:.0e}"
        print(f"error: {case.label}: {name} is wrong: {problem}; not timed", file=sys.stderr)
    if wrong:
        return None
    if not arguments.no_memory:
        for contender in found:
            extra = extra_bytes(case, contender.name, arguments.threads)
            result.peak_bytes[contender.name] = extra
            if extra is None:
                print(f"{case.label}: {contender.name} is skipped: out of memory", flush=True)
        found = [c for c in found if result.peak_bytes[c.name] is not None]
    _time(result, found, arguments)
    shape = f"width {case.d_model}, {case.num_experts:,} experts, {case.tokens:,} tokens"
    print(f"\n{case.layer}: {shape}, {arguments.threads} thread(s)\n{result.text()}", flush=True)
    return result


def _time(result: Result, found: list[Contender], arguments: argparse.Namespace) -> None:
    try:
        turns = Turns(found, *inputs(result.case), arguments.measures)
        result.times = turns.run(arguments.rounds)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        print(f"{result.case.label} is not timed: out of memory; try fewer --measures", flush=True)


def _checked(case: Case, found: list[Contender]) -> Result:
    return Result(
        case,
        notes={c.name: c.note for c in found},
        errors={c.name: relative_error(c, case) for c in found},
        baselines=[c.name for c in found if c.groups and c.name.startswith("ours")],
    )


def _cases(arguments: argparse.Namespace, backends: tuple[str, ...]) -> list[Case]:
    return cases(
        arguments.layers,
        arguments.d_model,
        arguments.tokens,
        arguments.num_experts,
        arguments.moe_experts,
        backends,
    )


def _write(path: Path, facts: dict[str, Any], results: list[Result]) -> None:
    """After every comparison: a campaign that is stopped keeps what it has."""
    document = {"machine": facts, "results": [result.as_json() for result in results]}
    path.write_text(json.dumps(document, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    many = {"type": int, "nargs": "+"}
    parser.add_argument("--quick", action="store_true", help="one small shape, under a minute")
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--d-model", **many, default=[256])
    parser.add_argument("--num-experts", **many, default=[2**18], help="of PEER and PKM")
    parser.add_argument("--moe-experts", type=int, default=16)
    parser.add_argument("--tokens", **many, default=[4096])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--measures", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--backends", nargs="+", help="of ours (default: all that run here)")
    parser.add_argument("--no-memory", action="store_true", help="skip the peak memory")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    if (arguments := parser.parse_args()).quick:
        vars(arguments).update(QUICK)
    return arguments


if __name__ == "__main__":
    sys.exit(main())
