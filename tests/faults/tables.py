"""Keys by kind, and values and lines that a user may get wrong, with the key that is to blame."""

GROUPS = {
    "ffw": ("dense", "moe", "pkm", "peer"),
    "data": ("sotu", "c4", "local", "synthetic"),
    "optim": ("adamw",),
    "eval": ("validation",),
    "tracker": ("wandb", "off"),
}
INTS = (
    "seed", "batch_size", "micro_batch", "threads", "log_lines", "ffw.num_experts", "ffw.num_heads",
    "ffw.experts_per_head", "ffw.key_dim", "size.d_model", "size.num_layers", "size.num_heads",
    "data.context", "data.seed", "data.validation_tokens", "data.shard_tokens", "eval.tokens",
    "data.tokenizer.vocab_size", "backbone.ffw.ratio",
)  # fmt: skip
FLOATS = (
    "budget", "optim.lr_max", "optim.lr_scale", "optim.beta1", "optim.weight_decay", "optim.clip",
    "optim.warmup", "data.validation_fraction", "data.max_epochs", "eval.every",
    "backbone.rotary_base", "ffw.table_lr_multiplier",
)  # fmt: skip
BOOLS = ("compile", "save_model", "ffw.shared_keys", "backbone.bias", "deterministic")
NAMED = {
    "precision": ("float32", "bfloat16"),
    "progress": ("auto", "bar", "lines", "off"),
    "kernels": ("auto", "torch", "plain"),
    "optim.schedule": ("cosine", "wsd", "constant"),
    "optim.table_update": ("dense", "lazy"),
    "ffw.query_norm": ("batch", "layer", "none"),
    "ffw.activation": ("gelu", "relu"),
    "backbone.norm": ("rms", "layer"),
    "data.order": ("shuffled", "stream"),
    "tracker.mode": ("auto", "online", "offline"),
}
RANGES = {
    "budget": ("0", "-1e12", "inf", "nan", "1e999", "1e3"),
    "seed": ("-1", "9223372036854775808", "1" + "0" * 400),
    "batch_size": ("0", "-4", "1" + "0" * 30),
    "threads": ("0", "-2"),
    "log_lines": ("0", "-9"),
    "ffw.num_experts": ("0", "-4", "1000", "1048577", "9" * 5000),
    "ffw.num_heads": ("0", "-1"),
    "ffw.experts_per_head": ("0", "2000"),
    "ffw.key_dim": ("0", "1", "7", "-2"),
    "size.d_model": ("0", "-64", "1" + "0" * 25),
    "size.num_layers": ("0", "-1"),
    "size.num_heads": ("0", "3", "64"),
    "data.context": ("0", "-1"),
    "data.seed": ("-1", "9223372036854775808"),
    "data.validation_fraction": ("0", "1", "1.5", "-0.1", "nan"),
    "data.max_epochs": ("0", "-1", "nan"),
    "data.tokenizer.vocab_size": ("0", "256", "-1"),
    "optim.lr": ("0", "-1e-3", "nan", "inf"),
    "optim.clip": ("0", "-1", "nan", "inf"),
    "optim.beta1": ("1", "-0.1", "nan"),
    "optim.warmup": ("1", "-0.5", "2"),
    "optim.final": ("-1", "1.1", "nan"),
    "optim.weight_decay": ("-1", "nan", "inf"),
    "eval.tokens": ("0", "-1"),
    "eval.every": ("-0.1", "1.1", "nan"),
    "backbone.rotary_base": ("0", "-1", "nan"),
    "backbone.ffw.ratio": ("0", "-4"),
}
CROSS = (
    (["batch_size=6", "micro_batch=4"], "micro_batch"),
    (["size.num_heads=5"], "size.num_heads"),
    (["size.d_model=60", "size.num_heads=4"], "size.d_model"),
    (["ffw.num_experts=64", "ffw.experts_per_head=9"], "ffw.experts_per_head"),
    (["data.shard_tokens=64", "data.context=64"], "data.shard_tokens"),
    (["optim.schedule=wsd", "optim.warmup=0.6", "optim.decay=0.6"], "optim.warmup"),
    (["ffw=moe", "ffw.num_experts=4", "ffw.capacity_factor=8"], "ffw.capacity_factor"),
    (["ffw=moe", "ffw.router=token_choice", "ffw.num_experts=4", "ffw.top_k=5"], "ffw.top_k"),
    (["data=c4", "data.order=shuffled"], "data.order"),
    (["data=local"], "data.path"),
    (["data=local", "data.path=/nowhere/*.txt"], "data.path"),
    (["data.tokenizer.kind=hf"], "data.tokenizer.kind"),
    (["data.tokenizer.kind=file", "data.tokenizer.name=x.json"], "data.tokenizer.kind"),
    (["data.tokenizer.kind=bytes", "data.tokenizer.vocab_size=256"], "data.tokenizer.vocab_size"),
    (["ffw=moe", "ffw.num_experts=3", "batch_size=4"], "ffw"),
)
ODD = (
    "ﬁ", "\uff11\uff12", "\u202e", "\u200b", "é" * 30, "\U0001f600", "½", "\u0660", "\U0001d7d9", "\ufeff3",
)  # fmt: skip
SYNTAX = (
    "a: [1, 2", "a: b: c", "\ta: 1", "a: 'x", "- a\n- b", "just text", "a: 1\na: 2", "{a: 1",
    "? [1, 2]\n: 3", "a: !!python/name:os.system", "!!python/object/new:os.system [true]",
    "a: !mine 3", "a: *nowhere", "a: \udcff\udcfe", "\x00\x01", "\udcff\udcfea\x00:\x00",
    "%YAML 9.9\n---\na: 1", "a: 1\n---\nb: 2", "a: |\n  x\n b: 2", "42", "[]", "a: &x [*x]",
    "a: " + "[" * 3000, "a: " + "{b: " * 400, "a:\n" + "".join(" " * n + "b:\n" for n in range(1, 200)),
    "batch_size: " + "x" * 1_000_000, "study: '" + "x" * 1_000_000 + "'", "x" * 1_000_000 + ": 1",
)  # fmt: skip


NONSENSE = (
    ("=5", ""), ("seed", "seed"), ("seed==1", "seed"), ("ffw.=1", "ffw"), (".seed=1", "seed"),
    ("seed:1", "seed"), ("seed=1=2", "seed"), ("a b=1", "a b"), ("~budget", "budget"), ("~seed=7", "seed"),
    ("seed=[1", "seed"), ("seed={1", "seed"), ("seed='1", "seed"), ("seed=f(", "seed"), ("seed=int(x)", "seed"),
    ("seed=range(0)", "seed"), ("seed=glob(", "seed"), ("hydra.nope=1", "hydra.nope"), ("ffw@x=peer", "ffw"),
    ("hydra/launcher=nope", "hydra/launcher"), ("hydra.sweeper.nope=1", "hydra.sweeper.nope"),
    ("seed=" + "[" * 300 + "]" * 300, "seed"), ("seed=" + "(" * 500, "seed"), ("optim.lr=1..2", "optim.lr"),
    ("seed=1,2", "seed"), ("hydra.mode=NOPE", "hydra.mode"), ("hydra.run.dir=elsewhere", "hydra.run"),
    ("hydra.job.env_copy=[NOPE]", "hydra.job.env_copy"), ("hydra.verbose={a: 1", "hydra.verbose"),
    ("hydra.searchpath=[file:///tmp]", "hydra.searchpath"), ("hydra.output_subdir=x", "hydra.output_subdir"),
)  # fmt: skip
BAD_STUDIES = (
    ("ladder", "[]", "ladder"), ("ladder", "null", "ladder"), ("ladder", "5", "ladder"), ("ladder", "???", "ladder"),
    ("ladder", "{budget: 2e9, sizes: [d8_l2]}", "ladder"), ("ladder", "[d8_l2]", "ladder"),
    ("ladder", "[{budget: 2e9}]", "ladder.0.sizes"), ("ladder", "[{sizes: [d8_l2]}]", "ladder.0.budget"),
    ("ladder", "[{budget: much, sizes: [d8_l2]}]", "ladder.0.budget"), ("ladder", "[{budget: 2e9, sizes: d8_l2}]", "ladder.0.sizes"),
    ("ladder", "[{budget: 2e9, sizes: []}]", "budget"), ("ladder", "[{budget: 2e9, sizes: [d8_l2, d8_l2]}]", "size"),
    ("ladder", "[{budget: 2e9, sizes: [8]}]", "ladder.0.sizes"), ("ladder", "[{budget: 2e9, sizes: [d9_l9]}]", "size"),
    ("ladder", "[{bugdet: 2e9, budget: 2e9, sizes: [d8_l2]}]", "bugdet"), ("ladder", "[{budget: -2e9, sizes: [d8_l2]}]", "budget"),
    ("ladder", "[{budget: true, sizes: [d8_l2]}]", "budget"), ("ladder", "[{budget: .nan, sizes: [d8_l2]}]", "budget"),
    ("ladder", "[{budget: 2e9, sizes: [../data/sotu]}]", "size"), ("ladder", "[{budget: 2e9, sizes: [null]}]", "ladder.0.sizes"),
    ("variants", "{}", "variants"), ("variants", "null", "variants"), ("variants", "[dense, moe]", "variants"),
    ("variants", "dense", "variants"), ("variants", "{dense: 3}", "variants.dense"), ("variants", "{mlp: {}}", "ffw"),
    ("variants", "{wide: {ffw: mlp}}", "ffw"), ("variants", "{moe: {num_exprts: 8}}", "ffw.num_exprts"),
    ("variants", "{moe: {num_experts: many}}", "ffw.num_experts"), ("variants", "{moe: {num_experts: [8]}}", "ffw.num_experts"),
    ("variants", "{a b;c: {ffw: dense}}", "variant"), ("variants", "{dense: {}, twin: {ffw: dense}}", "twin"),
    ("variants", "{moe: {num_experts: null}}", "ffw.num_experts"), ("variants", "{moe: {num_experts: 'a: b'}}", "ffw.num_experts"),
    ("seeds", "[]", "seeds"), ("seeds", "0", "seeds"), ("seeds", "[a]", "seeds"), ("seeds", "[0, 0]", "seed"),
    ("seeds", "[-1]", "seed"), ("seeds", "null", "seeds"), ("seeds", "[1.5]", "seeds"), ("seeds", "[true]", "seeds"),
    ("hydra", "    laddder: []", "laddder"), ("hydra", "    max_batch_size: x", "max_batch_size"),
    ("hydra", "  launcher: {workers: -1}", "workers"), ("hydra", "  launcher: {workres: 2}", "workres"),
    ("hydra", "  launcher: {workers: many}", "workers"), ("hydra", "  launcher: 5", "launcher"),
    ("hydra", "  mode: SOMETIMES", "mode"), ("hydra", "  nope: 1", "nope"), ("hydra", "  run: {dir: /tmp}", "run"),
)  # fmt: skip
BAD_DEFAULTS = (
    ("- train", "- tarin", "tarin"), ("hydra/sweeper: isoflop", "hydra/sweeper: isoflpo", "hydra/sweeper"),
    ("hydra/launcher: local", "hydra/launcher: locale", "hydra/launcher"), ("- _self_", "- _slef_", "_slef_"),
    ("override data: synthetic", "data: synthetic", "data"), ("override data", "overide data", "data"),
    ("- train", "- train: {a: b}", "own"), ("- train", "- 7", "own"), ("defaults:", "defualts:", "defualts"),
    ("- train", "- own", "own"), ("override data: synthetic", "override data: null", "data"),
)  # fmt: skip
