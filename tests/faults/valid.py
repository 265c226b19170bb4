"""Configurations that can be run, from a seeded generator."""

from cases import Case, study, study_text
from tables import GROUPS, NAMED

VALID_LAYER = {
    "dense": {"ratio": ("1", "2", "8")},
    "moe": {"num_experts": ("4", "8", "16"), "router": ("expert_choice", "token_choice")},
    "pkm": {"num_experts": ("64", "1024"), "experts_per_head": ("8",), "key_dim": ("2", "64")},
    "peer": {"num_heads": ("1", "2", "4"), "query_norm": ("batch", "layer", "none")},
}
VALID = {
    "seed": ("0", "7", "9223372036854775807"),
    "budget": ("1e18", "3.5e17", "2000000000000000000"),
    "study": ("a", "2024", "my study", "v1.2", '"lr=0.1"', '"größe"', "a_b-c+d", "x" * 60),
    "variant": ("peer_16k", "wide", "16", "${ffw.name}"),
    "micro_batch": ("2", "null"),
    "threads": ("1", "${batch_size}"),
    "precision": NAMED["precision"],
    "progress": NAMED["progress"],
    "compile": ("true", "no"),
    "save_model": ("false", "True"),
    "runs_dir": ("runs", "/tmp/x y", "../elsewhere", "a/b/c"),
    "size": ("d64_l4", "d8_l2", "d256_l6"),
    "data": ("sotu", "synthetic", "c4"),
    "data.tokenizer.vocab_size": ("4096", "300"),
    "tracker": ("off", "wandb"),
    "tracker.entity": ("my-team", "null"),
    "eval.every": ("0", "0.5", "1"),
    "optim.lr": ("null", "1e-3", "3"),
    "optim.warmup": ("0", "0.1"),
    "optim.schedule": NAMED["optim.schedule"],
    "backbone.norm": NAMED["backbone.norm"],
    "hydra.verbose": ("true", "false"),
}


def valid(rng, number):
    """Cases that must not."""
    return [_valid_study(rng) if n % 4 == 3 else _valid_run(rng) for n in range(number)]


def _valid_run(rng):
    ffw = rng.choice(GROUPS["ffw"])
    own = [f"ffw.{key}={rng.choice(values)}" for key, values in VALID_LAYER[ffw].items()]
    keys = rng.sample(list(VALID), rng.randrange(1, 7))
    chosen = [f"{key}={rng.choice(VALID[key])}" for key in keys]
    budget = [] if "budget" in keys else ["budget=1e19"]
    return Case("valid", (f"ffw={ffw}", *own, *budget, *chosen))


def _valid_study(rng):
    sizes = rng.sample(("d8_l2", "d12_l2", "d16_l2", "d20_l2"), rng.randrange(1, 4))
    variants = rng.choice(
        ("{dense: {}}", "{dense: null, moe: {num_experts: 4}}", "{narrow: {ffw: dense, ratio: 2}}",
         "{peer: {num_experts: 256, experts_per_head: 4}}", "{dense: {}, a: {ffw: moe, top_k: 2}}")
    )  # fmt: skip
    top = rng.choice(
        ("batch_size: 4", "optim: {lr: 0.01}", "batch_size: &x 4\nlog_lines: *x", "seed: 3",
         "backbone: {bias: true}", "threads: 1\nprogress: 'off'", "variant: ${ffw.name}")
    )  # fmt: skip
    text = study_text(
        top,
        ladder=f"[{{budget: {rng.choice(('2e9', '2.5e9', '3000000000'))}, sizes: [{', '.join(sizes)}]}}]",
        variants=variants,
        seeds=rng.choice(("[0]", "[0, 1]", "[5]")),
        hydra=rng.choice(("", "  launcher: {workers: 2}", "  verbose: false")),
    )
    return study(text, *rng.choice(((), ("seed=1,2",), ("batch_size=8",))), kind="valid")
