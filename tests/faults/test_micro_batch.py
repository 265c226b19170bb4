"""F08: a run is stopped and goes on with another micro-batch. The same tokens, the same loss."""

from dataclasses import replace
from itertools import product

import pytest

from ledger import INDEPENDENT, SAVE_STEPS, Ledger, expected_ledger, short_run
from peer_scaling.adamw import AdamW
from peer_scaling.train import run_once
from scorecard import report
from tiers import count

CHANGES = ((4, 1), (1, 4), (2, 4))
VARIANTS = ("peer", "dense", "moe", "pkm")


def stop_at(patch, step):
    """As a kill does, at an update: nothing is saved on the way out."""
    real, calls = AdamW.step, []

    def stopping(optimizer, closure=None):
        calls.append(1)
        if len(calls) > step:
            raise SystemExit
        return real(optimizer, closure)

    patch.setattr(AdamW, "step", stopping)


def test_going_on_with_another_micro_batch_changes_rounding_only(tmp_path, monkeypatch, capsys):
    cases, largest = list(product(VARIANTS, CHANGES))[: count(4, 12)], 0.0
    for number, (variant, (before, after)) in enumerate(cases):
        whole = run_once(short_run(tmp_path / "whole", variant))
        first = short_run(tmp_path / str(number), variant, f"micro_batch={before}")
        settings = replace(first.run.settings, micro_batch=after)
        second = replace(first, run=replace(first.run, settings=settings))
        assert first.folder == second.folder
        with monkeypatch.context() as patch:
            ledger = Ledger(patch)
            with patch.context() as stopped:
                stop_at(stopped, 2 * SAVE_STEPS + 3)
                with pytest.raises(SystemExit):
                    run_once(first)
            record = run_once(second)
        assert "resumed from step 10" in capsys.readouterr().out
        assert ledger.steps == expected_ledger(first)
        assert record.val_tokens == whole.val_tokens
        for name in ("loss", "train_loss"):
            difference = abs(getattr(record, name) / getattr(whole, name) - 1)
            assert difference < 1e-5
            largest = max(largest, difference)
    report(
        "F08",
        f"{len(cases)} resumes with another micro-batch: 0 tokens differ, loss within {largest:.0e}",
    )


@pytest.mark.parametrize("variant", INDEPENDENT)
def test_every_micro_batch_reads_the_same_and_learns_the_same(tmp_path, monkeypatch, variant):
    ledgers, records = [], []
    for micro_batch in ("null", "4", "2", "1"):
        # 5 sequences to evaluate: one step's worth, for every micro-batch.
        options = (f"micro_batch={micro_batch}", "eval.tokens=320")
        planned = short_run(tmp_path / micro_batch, variant, *options)
        with monkeypatch.context() as patch:
            ledger = Ledger(patch)
            records.append(run_once(planned))
        ledgers.append(ledger.steps)
        assert records[-1].run_id == records[0].run_id
    assert ledgers == 4 * [expected_ledger(planned)]
    assert {record.val_tokens for record in records} == {256}
    for record in records[1:]:
        assert record.loss == pytest.approx(records[0].loss, rel=1e-6)
        assert record.train_loss == pytest.approx(records[0].train_loss, rel=1e-6)
