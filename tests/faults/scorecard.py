"""Measured figures of the faults, for whoever prints the scorecard."""

import json
import os


def report(fault_id: str, figure: str) -> None:
    """Append one JSON line to the file that PEER_SCALING_SCORECARD names; nothing without it."""
    path = os.environ.get("PEER_SCALING_SCORECARD")
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"fault": fault_id, "figure": figure}) + "\n")
