"""A study that has run, in a folder that can be copied, with the commands that read it."""

from drive import run_all

OWN = """defaults: [train, override data: local, override tracker: "off", override hydra/sweeper: isoflop, _self_]
study: own
progress: "off"
eval: {tokens: 1024}
data: {path: TEXT, context: 64, max_epochs: 1000.0, tokenizer: {vocab_size: 260}}
hydra:
  mode: MULTIRUN
  sweeper:
    ladder: [{budget: 2e9, sizes: [d8_l2]}]
    variants: {dense: {}}
"""
TRAIN = (
    "peer-train", "--config-dir", "mine", "--config-name", "own", "hydra/launcher=basic",
)  # fmt: skip
COMMANDS = (
    ("peer-status", "own"), ("peer-analyze", "isoflop", "runs/own"), TRAIN, ("peer-status", "own"),
)  # fmt: skip


def trained_study(tmp_path_factory):
    """A folder with the study, its corpus and its one run."""
    folder = tmp_path_factory.mktemp("trained")
    text = tmp_path_factory.mktemp("text") / "text.txt"  # not copied: a corpus knows its path
    words = ("alpha", "beta", "gamma", "delta")
    lines = (f"{words[n % 4]} {words[n // 3 % 4]} {n % 17}" for n in range(4000))
    text.write_text("\n\n".join(lines))
    (folder / "mine").mkdir()
    (folder / "mine" / "own.yaml").write_text(OWN.replace("TEXT", str(text)))
    first, again = run_all([(folder, TRAIN)] * 2, "commands")
    assert first["code"] == 0, first["err"]
    assert "1 done" in again["out"]
    return folder


def failures(commands, outcomes):
    """Commands that ended in a traceback, a hang or an exit code that says nothing."""
    return [
        (str(folder), command, outcome)
        for (folder, command), outcome in zip(commands, outcomes, strict=True)
        if "Traceback" in outcome["err"] or outcome["code"] not in (0, 1, 2)
    ]
