"""A small study on disk for the page: records of two variants, and runs that do not count."""

import sys
from dataclasses import replace

from analysis import cli
from conftest import ROOT
from peer_scaling.publish import write_record
from peer_scaling.record import RunRecord
from surfaces import known, runs

LAPTOP = ROOT / "docs" / "figures" / "isoflop_laptop"
EVIL_ID = "<script>document.title = 'owned'</script>"
EVIL_REASON = '"><img src=x onerror="document.title = 1"> & {{7*7}}'


def record_of(row, **changes):
    names = ("run_id", "study", "status", "ffw", "variant", "size", "seed", "budget", "flops", "loss",
             "tokens", "num_params_total", "num_params_active", "causal")  # fmt: skip
    values = {name: row[name] for name in names} | {"reason": None, "epochs": 0.5, "lr": 0.01}
    config = {"ffw": {"name": row["ffw"]}, "batch_size": 4, "data": {"context": 128}}
    return replace(RunRecord(**values, protocol="p", config=config), **changes)


def write_study(folder, **options):
    """Records on known curves; then one that diverged, one far beyond
    the panel, an unreadable one, and one that is planned."""
    rows = runs(known, noise=0.001, seeds=2, **options).to_dict("records")
    records = [record_of(row) for row in rows]
    records += [
        record_of(rows[0], run_id=EVIL_ID, size="far", status="invalid", loss=50.0, reason=EVIL_REASON),
        record_of(rows[0], run_id="diverged-run", size="huge", status="diverged", loss=None, reason="nan"),
    ]  # fmt: skip
    for number, record in enumerate(records):
        write_record(record, folder / f"run{number:03d}")
    cells = [f"run{number:03d},peer,x2.0,1e12,0,1e12" for number in range(len(records) + 1)]
    (folder / "plan.csv").write_text("\n".join(["run_id,variant,size,budget,seed,flops", *cells]))
    (folder / "torn").mkdir()
    (folder / "torn" / "record.json").write_text('{"schema": 1, "run')
    return folder


def write_page(monkeypatch, source, out, *options):
    arguments = ["peer-analyze", "report", source, "--out", out, *options]
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    cli.main()
    return out.read_text(encoding="utf-8")
