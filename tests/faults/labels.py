"""The fault points of the package, read from its source: a new one is found without being listed."""

import ast

from conftest import ROOT

SOURCES = sorted((ROOT / "peer_scaling").rglob("*.py"))
LABEL = "label"
"""Parameter through which `durable.py` is told what it writes."""


def fault_labels() -> list[str]:
    """Every label that `fault_point` is called with, in any file."""
    trees = [ast.parse(path.read_text()) for path in SOURCES]
    functions = _passing_on(trees)
    inside = {id(node) for f in functions.values() for node in ast.walk(f)}
    calls = [n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Call)]
    return sorted(
        set().union(*(_labels(call, functions, {}) for call in calls if id(call) not in inside))
    )


def run_labels() -> list[str]:
    """Those that a run passes; `peer-eval` has its own (tests/test_eval_command.py)."""
    return [label for label in fault_labels() if not label.startswith("evaluation.")]


def _passing_on(trees) -> dict[str, ast.FunctionDef]:
    """Functions with a label among their arguments that reach `fault_point`."""
    labelled = [
        node
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and LABEL in [a.arg for a in node.args.args]
    ]
    found = {"fault_point": next(f for f in labelled if f.name == "fault_point")}
    for _ in labelled:  # a chain is no longer
        found |= {f.name: f for f in labelled if _called(f) & found.keys()}
    return found


def _called(function) -> set[str]:
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    return {call.func.id for call in calls if isinstance(call.func, ast.Name)}


def _labels(call, functions, values) -> set[str]:
    """Labels that a call leads to, with the label of the function around it, if it has one."""
    name = getattr(call.func, "id", None)
    if name == "fault_point":
        return {_text(call.args[0], values)}
    if name not in functions:
        return set()
    function = functions[name]
    names = [a.arg for a in function.args.args]
    given = dict(zip(names, call.args, strict=False)) | {k.arg: k.value for k in call.keywords}
    own = {LABEL: _text(given[LABEL], values)}
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    return set().union(*(_labels(inner, functions, own) for inner in calls))


def _text(node, values) -> str:
    """The string that an expression stands for; fails for one that cannot be known from here."""
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, values) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return _text(node.value, values)
    if isinstance(node, ast.Name) and node.id in values:
        return values[node.id]
    assert isinstance(node, ast.Constant), f"not a label: {ast.unparse(node)}"
    return node.value
