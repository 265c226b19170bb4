"""Configurations that cannot be run, from a seeded generator."""

from functools import cache
from itertools import pairwise

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from cases import Case, study, study_text
from peer_scaling.paths import config_folder
from tables import (
    BAD_DEFAULTS,
    BAD_STUDIES,
    BOOLS,
    CROSS,
    FLOATS,
    GROUPS,
    INTS,
    NAMED,
    NONSENSE,
    ODD,
    RANGES,
    SYNTAX,
)  # fmt: skip


@cache
def known_keys() -> tuple[str, ...]:
    """Dotted keys of a run with PEER that hold a value."""
    with initialize_config_dir(str(config_folder("conf")), version_base="1.3"):
        plain = OmegaConf.to_container(compose("train", ["ffw=peer"]))
    return tuple(_flat(plain, ""))


def _flat(node, prefix):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def mistyped(rng, word, known):
    """One slip of the fingers: a letter left out, doubled, swapped with the next, or its neighbour."""
    rows = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
    near = {a: b for row in rows for a, b in zip(row, row[1:] + row[-2], strict=True)}
    while True:
        at = rng.randrange(len(word))
        slips = [
            word[:at] + word[at + 1 :],
            word[:at] + word[at] + word[at:],
            word[:at] + word[at + 1 : at + 2] + word[at] + word[at + 2 :],
            word[:at] + near.get(word[at], word[at]) + word[at + 1 :],
        ]
        slip = rng.choice(slips)
        if slip != word and slip not in known and slip.isidentifier():
            return slip


def key_typo(rng):
    key = rng.choice(known_keys())
    parent, _, leaf = key.rpartition(".")
    siblings = {k.rpartition(".")[2] for k in known_keys()} | set(GROUPS)
    wrong = f"{parent}.{mistyped(rng, leaf, siblings)}".lstrip(".")
    how = rng.choice(("override", "added", "file"))
    if how == "file":
        *sections, last = wrong.split(".")
        text = "".join("  " * n + f"{s}:\n" for n, s in enumerate(sections))
        text += "  " * len(sections) + f"{last}: 1"
        return study(
            study_text(text, variants="{peer: {num_experts: 64, experts_per_head: 2}}"),
            kind="key typo", names=wrong, meant=key,
        )  # fmt: skip
    prefix = "+" if how == "added" else ""
    return Case("key typo", (f"{prefix}{wrong}=1",), names=wrong, meant=key)


def section_typo(rng):
    section = rng.choice(("ffw", "size", "data", "optim", "eval", "tracker", "backbone"))
    wrong = mistyped(rng, section, {*GROUPS, "size"})
    if rng.random() < 0.5:
        return study(
            study_text(f"{wrong}: {{a: 1}}"), kind="group typo", names=wrong, meant=section
        )
    option = {"size": "d64_l4", "backbone": "x"}.get(section) or GROUPS[section][0]
    return Case("group typo", (f"{wrong}={option}",), names=wrong, meant=section)


def option_typo(rng):
    group = rng.choice([g for g in GROUPS for _ in GROUPS[g]])
    option = rng.choice([o for o in GROUPS[group] if len(o) > 2 and o != "off"])
    wrong = mistyped(rng, option, GROUPS[group])
    if rng.random() < 0.3:
        text = study_text().replace("- train\n", f"- train\n  - override {group}: {wrong}\n")
        text = text.replace("  - override data: synthetic\n", "")
        text = text.replace('  - override tracker: "off"\n', "")
        return study(text, kind="option typo", names=group, meant=option)
    return Case("option typo", (f"{group}={wrong}",), names=group, meant=option)


def value_typo(rng):
    key = rng.choice(list(NAMED))
    wrong = mistyped(rng, rng.choice([v for v in NAMED[key] if len(v) > 2]), NAMED[key])
    return Case("value typo", (f"{key}={wrong}",), names=key)


def wrong_type(rng):
    kinds = {INTS: ("abc", "[1]", "{a: 1}", "true", "1.5", "''", "1e400", "0x"),
             FLOATS: ("abc", "[1.0]", "{a: 1}", "true", "''", "1,5e", "1/2"),
             BOOLS: ("maybe", "7", "[true]", "{a: 1}", "2.5"),
             tuple(NAMED): ("[a]", "{a: b}", "3", "1.5", "true")}  # fmt: skip
    keys = rng.choice(list(kinds))
    key, value = rng.choice(keys), rng.choice(kinds[keys])
    if rng.random() < 0.5:
        return Case("type", (f"{key}={value}",), names=key)
    return in_file(key, value.replace("'", '"'), "type")


def in_file(key, value, kind):
    *sections, last = key.split(".")
    text = "".join("  " * n + f"{s}:\n" for n, s in enumerate(sections))
    text = study_text(f"{text}{'  ' * len(sections)}{last}: {value}")
    if key.startswith(("budget", "seed", "size.")):  # a study gives these itself
        return Case("type", (f"{key}={value}",), names=key)
    variants = "{peer: {num_experts: 64, experts_per_head: 2}}"
    if key.startswith("ffw."):
        own = {"num_experts": "64", "experts_per_head": "2", last: value}
        settings = ", ".join(f"{name}: {given}" for name, given in own.items())
        return study(study_text(variants=f"{{peer: {{{settings}}}}}"), kind=kind, names=key)
    return study(text.replace("{dense: {}, moe: {num_experts: 8}}", variants), kind=kind, names=key)


def out_of_range(rng):
    key = rng.choice(list(RANGES))
    return Case("range", (f"{key}={rng.choice(RANGES[key])}",), names=key)


def several(rng):
    """Two faults at once: both must be named; the case asks for the second."""
    first, second = rng.sample([k for k in RANGES if not k.startswith("size")], 2)
    values = [f"{k}={rng.choice([v for v in RANGES[k] if len(v) < 30])}" for k in (first, second)]
    return Case("several", tuple(values), names=second)


def missing(rng):
    key = rng.choice([*INTS, *FLOATS, *BOOLS, *NAMED])
    form = rng.choice(("=???", "=", "=null"))
    optional = ("micro_batch", "threads", "progress")
    if form == "=null" and key in (*optional, "data.num_tokens"):
        form = "=???"
    return Case("missing", (f"{key}{form}",), names=key)


def null(rng):
    section = rng.choice(("ffw", "size", "data"))
    key = {"ffw": "ffw.name", "size": "size.d_model", "data": "data.source"}[section]
    if section == "data":
        return Case("null", (f"{key}=null",), names=key)
    if rng.random() < 0.5:
        return Case("null", (f"{section}=null",), names=section)
    value = rng.choice(("null", "3", "text", "[1, 2]", "true"))
    return Case("null", (f"++{section}={value}",), names=section)


def unicode_text(rng):
    text = rng.choice(ODD)
    key = rng.choice((*INTS[:6], *FLOATS[:4], "precision", "optim.schedule"))
    how = rng.random()
    if how < 0.4:
        wrong = key.rpartition(".")[0] + ("." if "." in key else "") + "sé" + "ed"
        return in_file(wrong, "1", "unicode")
    if how < 0.7 and key in NAMED:
        return Case("unicode", (f"{key}={text}",), names=key)
    if how < 0.8:
        name = rng.choice(("a\u202eb", "\u200b", "a\nb", "a\x1b[31m", "..", "é/é", "x" * 61))
        text = study_text().replace("study: own", f'study: "{_escaped(name)}"')
        return study(text, kind="unicode", names="study")
    return Case("unicode", (f"{key}={text}x",), names=key)


def _escaped(text):
    return "".join(c if c.isprintable() and c != "\\" else f"\\U{ord(c):08x}" for c in text)


def long_text(rng):
    size = rng.choice((5_000, 50_000, 120_000))
    key = rng.choice(("study", "variant", "precision", "device", "optim.schedule", "data.path"))
    return Case("long", (f"{key}={'x' * size}",), names=key)


def long_in_file(rng):
    size = rng.choice((5_000, 15_000, 1_000_000))
    key = rng.choice(("variant", "precision", "device", "kernels", "progress"))
    names = key if size < 16_000 else "own.yaml"
    return study(study_text(f"{key}: {'x' * size}"), kind="long", names=names)


def bomb(rng):
    """Few lines that stand for more values than a memory holds."""
    width, depth = rng.randrange(5, 12), rng.randrange(8, 30)
    how, own = rng.choice(("alias", "merge", "reference", "references")), "own.yaml"
    if how == "alias":
        lines = ["v0: &v0 [x]"]
        lines += [f"v{n}: &v{n} [{_times(f'*v{n - 1}', width)}]" for n in range(1, depth)]
    elif how == "merge":
        lines = ["v0: &v0 {a: 1}"]
        lines += [f"v{n}: &v{n} {{l: *v{n - 1}, <<: *v{n - 1}}}" for n in range(1, 15 + depth)]
    elif how == "reference":
        keys = ("progress", "kernels", "device", "runs_dir", "precision", "variant")
        lines, own = ["progress: xxxxxxxxxx"], "kernels"
        lines += [f"{b}: {f'${{{a}}}' * width}" for a, b in pairwise(keys)]
    else:
        lines, own = ["v0: [x, x]"], "v1"
        lines += [f"v{n}: [{_times(quoted_reference(n - 1), width)}]" for n in range(1, depth)]
    return study(study_text("\n".join(lines)), kind="bomb", names=own)


def _times(text, number):
    return ", ".join([text] * number)


def quoted_reference(number):
    return f'"${{v{number}}}"'


def unknown_group(rng):
    group = rng.choice(("model", "launcher", "experts", "dataset/x", "a/b/c", "hydra/nope"))
    name = group.split("/")[0] if group.startswith("hydra") else group
    if rng.random() < 0.5:
        return Case("unknown group", (f"{rng.choice(('', '+'))}{group}=x",), names=name)
    text = study_text().replace("  - _self_\n", f"  - {group}: x\n  - _self_\n")
    return study(text, kind="unknown group", names=group)


def cross_field(rng):
    overrides, key = rng.choice(CROSS)
    own = [] if overrides[0].startswith("ffw=") else ["ffw=peer"]
    return Case("cross-field", (*own, *overrides), names=key)


def syntax(rng):
    return study(rng.choice(SYNTAX), kind="syntax", names="own.yaml")


def references(rng):
    text = rng.choice(("${nope}", "${", "${}", "${ffw.nope}", "${oc.env:HOME}", "${now:%Y}", "${a b}",
                       "${hydra:runtime.cwd}", "${oc.decode:1}", "${${x}}", "${seed", "${.x}"))  # fmt: skip
    key = rng.choice(("variant", "precision", "batch_size", "threads", "device", "runs_dir"))
    if rng.random() < 0.5:
        return Case("reference", (f"{key}={text}",), names=key)
    return study(study_text(f"{key}: '{text}'"), kind="reference", names=key)


def recursion(rng):
    a, b = rng.sample(("variant", "precision", "device", "runs_dir", "progress"), 2)
    return study(study_text(f"{a}: ${{{b}}}\n{b}: ${{{a}}}"), kind="reference", names=a)


def nonsense(rng):
    text, key = rng.choice(NONSENSE)
    return Case("nonsense", (text,), names=key or None)


def bad_study(rng):
    part, value, key = rng.choice(BAD_STUDIES)
    text = study_text(**{part: value})
    if value.startswith("  mode"):
        text = text.replace("  mode: MULTIRUN\n", "")
    return study(text, kind="study", names=key)


def bad_defaults(rng):
    old, new, key = rng.choice(BAD_DEFAULTS)
    return study(study_text().replace(old, new), kind="defaults", names=key)


MALFORMED = (
    key_typo, key_typo, key_typo, section_typo, option_typo, value_typo, wrong_type, wrong_type,
    out_of_range, out_of_range, several, missing, null, unicode_text, long_text, long_in_file, bomb,
    unknown_group, cross_field, syntax, references, recursion, nonsense, bad_study, bad_study,
    bad_defaults,
)  # fmt: skip


def malformed(rng, number):
    """Cases that must be refused, all kinds alike."""
    return [MALFORMED[n % len(MALFORMED)](rng) for n in range(number)]
