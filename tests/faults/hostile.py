"""Configurations that try to run code, read secrets or write outside, from a seeded generator.

Each works in a folder of its own and, if it got what it wants, leaves a file `CANARY` somewhere, a
file outside `runs/<study>`, or the value of a secret variable in what it writes or prints.
"""

import json

from cases import Case, study, study_text
from planned_runs import make_planned

SECRET = "canary-5f2a9c71e0b84d36"
CANARY = "CANARY"
TOUCH = f"touch {CANARY}"
FAST = (
    "data=synthetic", "data.num_tokens=100000", "eval.tokens=2048", "tracker=off", "size=d8_l2",
    "budget=7e8", "ffw=dense", "progress=off",
)  # fmt: skip
CALLS = (
    "{_target_: planted_module.x}",
    f"{{_target_: os.system, command: {TOUCH}}}",
    f"{{_target_: subprocess.run, args: [touch, {CANARY}]}}",
    f"{{_target_: builtins.open, file: {CANARY}, mode: w}}",
    f"{{_target_: pathlib.Path.touch, self: {{_target_: pathlib.Path, _args_: [{CANARY}]}}}}",
    f"{{_target_: builtins.exec, _args_: [\"open('{CANARY}', 'w')\"]}}",
)
"""As `hydra.utils.instantiate` would make them. Hydra 1.3.8 itself refuses some; of a module that
happens to be installed, as `planted_module`, it knows nothing."""
HANDLERS = (
    f"{{(): os.system, command: {TOUCH}}}",
    f"{{class: logging.FileHandler, filename: {CANARY}}}",
    "{class: logging.FileHandler, filename: ../escaped.log}",
    f"{{class: subprocess.Popen, args: [touch, {CANARY}]}}",
    "{class: logging.StreamHandler, stream: 'ext://planted_module.x'}",
)
"""As `logging.config.dictConfig` would make them."""
TAGS = (
    f"!!python/object/apply:os.system [{TOUCH}]",
    f"!!python/object/new:os.system [{TOUCH}]",
    f"!!python/object/apply:subprocess.run [[touch, {CANARY}]]",
    "!!python/name:os.system",
    "!!python/module:planted_module",
    f"!!python/object/apply:builtins.exec [\"open('{CANARY}', 'w')\"]",
)
NAMES = (
    "../escaped", "../../escaped", "a/../../../escaped", "/{root}/escaped", "..", ".", "a/b", "a\\b",
    "~/escaped", "a\nb", "a\n#SBATCH --wrap=x", f"a; {TOUCH}", f"a && {TOUCH}", f"$({TOUCH})",
    f"`{TOUCH}`", "a\0b", "-rf", "a|b", "a > ../escaped", "${HOME}/escaped", "a\x1b]0;b\x07", "%j",
    "file:///escaped", "\u202eb", "a'b", 'a"b', "../" * 20 + "tmp/escaped", "*", "CON\t",
)  # fmt: skip
REFERENCES = (
    "${oc.env:WANDB_API_KEY}", "x${oc.env:WANDB_API_KEY}", "${oc.env:WANDB_API_KEY,none}",
    "${oc.decode:${oc.env:WANDB_API_KEY}}", "${oc.create:{a: ${oc.env:WANDB_API_KEY}}}",
    "${oc.${.e}:WANDB_API_KEY}", "${oc.decode:'${oc.env:WANDB_API_KEY}'}", "${oc.env:HF_TOKEN}",
    "${oc.env:AWS_SECRET_ACCESS_KEY}", "${oc.select:x,${oc.env:HF_TOKEN}}",
)  # fmt: skip
NAMED_KEYS = ("study", "variant", "tracker.project", "tracker.entity", "size", "hydra.job.name")
FOLDERS = (
    "hydra.run.dir=../escaped", "hydra.sweep.dir=../escaped", "hydra.sweep.subdir=../../escaped",
    "hydra.output_subdir=../escaped", "hydra.job.chdir=true", "hydra.runtime.output_dir=../escaped",
    "+hydra.job.env_set.PATH=.", "hydra.job.env_copy=[WANDB_API_KEY]",
    "hydra.searchpath=[pkg://planted_module]", "hydra.searchpath=[file://.]",
    "hydra/job_logging=default", "hydra/hydra_logging=hydra_debug", "hydra/output=default",
    "+hydra.launcher.submitit_folder=../escaped", "hydra.launcher._target_=os.system",
    "hydra.sweeper._target_=subprocess.run", "hydra.launcher={_target_: os.system, command: x}",
)  # fmt: skip


def _file(line, *arguments, kind, hydra="", **files):
    return _with(study(study_text(line, hydra=hydra), *arguments, kind=kind), **files)


def _with(case, **files):
    """The same, to be trained, not only planned."""
    own = tuple(a for a in case.arguments if a != "dry_run=true")
    return Case(case.kind, own, case.files | files, links=case.links)


def target(rng):
    call = rng.choice(CALLS)
    where = rng.randrange(7)
    if where == 0:
        return Case("target", (*FAST, f"+{rng.choice(('x', 'optim.x', 'data.x', 'ffw.x'))}={call}"))
    if where == 1:
        return Case("target", (*FAST, f"+hydra.callbacks.x={call}"))
    if where == 2:
        return _file(f"callbacks_of_mine: {call}", kind="target")
    if where == 3:
        return _file("", hydra=f"  callbacks: {{x: {call}}}", kind="target")
    if where == 4:
        text = study_text(variants=f"{{dense: {{}}, x: {call}}}")
        return _with(study(text, kind="target"))
    if where == 5:
        text = study_text(ladder=f"[{{budget: 2e9, sizes: [d8_l2], x: {call}}}]")
        return _with(study(text, kind="target"))
    return _file("", hydra=f"  launcher: {{workers: {call}}}", kind="target")


def logging_class(rng):
    handler, node = rng.choice(HANDLERS), rng.choice(("job_logging", "hydra_logging"))
    if rng.random() < 0.3:
        made = f"{{x: {{(): os.system, command: {TOUCH}}}}}"
        return _file("", hydra=f"  {node}: {{formatters: {made}}}", kind="logging")
    if rng.random() < 0.5:
        return Case("logging", (*FAST, f"+hydra.{node}.handlers.x={handler}"))
    text = f"  {node}: {{handlers: {{x: {handler}}}, root: {{handlers: [x]}}}}"
    return _file("", hydra=text, kind="logging")


def tag(rng):
    value = rng.choice(TAGS)
    key = rng.choice(("study", "variant", "batch_size", "x", "defaults"))
    return _file(f"{key}: {value}", kind="tag")


def reference(rng):
    text, where = rng.choice(REFERENCES), rng.randrange(5)
    if where == 0:
        key = rng.choice(("tracker.project", "variant", "study", "runs_dir", "data.path"))
        return Case("reference", (*FAST, f"{key}={text}", "tracker=wandb"))
    if where == 1:
        key = rng.choice(("variant", "device", "note", "precision"))
        return _file(f"e: env\n{key}: {json.dumps(text)}", kind="reference")
    if where == 2:
        text = study_text(variants=f"{{dense: {{activation: {json.dumps(text)}}}}}")
        return _with(study(text, kind="reference"))
    if where == 3:
        return _file("", hydra=f"  job: {{name: {json.dumps(text)}}}", kind="reference")
    return _file("", hydra=f"  launcher: {{workers: {json.dumps(text)}}}", kind="reference")


def name(rng):
    text, key = rng.choice(NAMES), rng.choice(NAMED_KEYS)
    if "\0" not in text and rng.random() < 0.5:
        quoted = "'" + text.replace("'", "\\'") + "'"
        more = ("-m", "seed=0,1") if rng.random() < 0.3 else ()
        own = [a for a in FAST if not a.startswith(f"{key}=")]
        return Case("name", (*more, *own, f"{key}={quoted}"))
    if key == "size":
        text = study_text(ladder=f"[{{budget: 2e9, sizes: [{json.dumps(text)}]}}]")
        return _with(study(text, kind="name"))
    if key == "variant":
        text = study_text(variants=f"{{{json.dumps(text)}: {{ffw: dense}}}}")
        return _with(study(text, kind="name"))
    *sections, last = key.split(".")
    if sections == ["hydra", "job"]:
        return _file("", hydra=f"  job: {{{last}: {json.dumps(text)}}}", kind="name")
    if sections:
        return _file(f"{sections[0]}: {{{last}: {json.dumps(text)}}}", kind="name")
    own = study_text().replace("study: own", f"study: {json.dumps(text)}")
    return _with(study(own, kind="name"))


def folder(rng):
    text = rng.choice(FOLDERS)
    more = rng.choice(((), ("-m", "seed=0,1")))
    return Case("folder", (*more, *FAST, text))


def job_script(rng):
    field = rng.choice(("partition", "comment", "account", "qos", "name", "mail_user", "x"))
    text = rng.choice((f"a\n{TOUCH}", f"a\r\n{TOUCH}", "a\n#SBATCH --wrap=x", "a\x0bb", "a\u2028b"))
    return _file("", hydra=f"  launcher: {{{field}: {json.dumps(text)}}}", kind="job script")


def package(rng):
    """A group's option that lands where Hydra makes objects."""
    at = rng.choice(("hydra.callbacks.x", "hydra.job_logging.handlers.x", "_global_"))
    call, handler = CALLS[1][1:-1].split(", "), HANDLERS[0][1:-1].split(", ")
    body = "\n".join(handler if "logging" in at else call)
    if at == "_global_":
        body = f"hydra: {{callbacks: {{x: {CALLS[0]}}}}}"
    files = {"mine/size/evil.yaml": f"# @package {at}\n{body}\n"}
    if rng.random() < 0.5:
        case = study(study_text(ladder="[{budget: 2e9, sizes: [evil]}]"), kind="package")
        return _with(case, **files)
    more = ("-m", "seed=0,1") if rng.random() < 0.5 else ()
    own = [a for a in FAST if not a.startswith("size")]
    return Case("package", (*more, "--config-dir", "mine", *own, "size=evil"), files)


def link(rng):
    """A folder or file of a run that is written on the way, elsewhere."""
    run_id = planned_id()
    place, target = rng.choice((
        ("runs/own", "../outside"), (f"runs/own/{run_id}", "../../outside"),
        (f"runs/own/{run_id}/history.jsonl", "../../../outside/file"),
        (f"runs/own/{run_id}/record.json", "../../../outside/file"),
        (f"runs/own/{run_id}/model.tmp", "../../../outside/file"),
        (f"runs/own/{run_id}/error.txt", "/{root}/escaped"),
        (f"runs/own/{run_id}/wandb", "../../../outside"), (f"runs/own/{run_id}/a/b/c", "/{root}"),
        ("runs/own/plan.csv", "../../outside/file"), ("runs/own/plan.tmp", "../../outside/file"),
        ("runs/own/loop", "../own/../../outside"),
    ))  # fmt: skip
    files = {"outside/.keep": "", "outside/file": "untouched"}
    links = {place: target}
    if place.startswith(f"runs/own/{run_id}") and rng.random() < 0.7:
        return Case("link", (*FAST, "study=own"), files, links=links)
    case = study(study_text(variants="{dense: {}}"), kind="link")
    return Case("link", tuple(a for a in case.arguments if a != "dry_run=true"), case.files | files, links=links)  # fmt: skip


def planned_id():
    """The folder that `FAST` trains in."""
    with_defaults = [a for a in FAST if not a.startswith(("ffw", "progress"))]
    return make_planned("runs", *with_defaults, "data.num_tokens=100000", ffw="dense").run_id


HOSTILE = (target, logging_class, tag, reference, name, name, folder, job_script, package, link)


def hostile(rng, number):
    """Cases of all kinds alike."""
    return [HOSTILE[n % len(HOSTILE)](rng) for n in range(number)]
