"""The model card of an exported run: what it is, how to load it, and the record's facts."""

from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

from peer_scaling.record import RECORD, RunRecord, budget_label

FRONT = """\
---
library_name: transformers
{pipeline}tags:
- peer-scaling
- isoflop
- scaling-laws
- {ffw}
# license: the model's is yours to choose
---

# {run_id}

A decoder language model of an IsoFLOP scaling study, trained to compare feed-forward layers at
equal compute: the feed-forward of block {block} of {layers} is `{ffw}`, every other one is dense.

## Load

The code lies in this folder (`modeling_peer_scaling.py` and the two files beside it): read it, then
trust it. It needs torch and transformers alone; written with transformers {transformers}.

"""
MODEL = """\
```python
import torch
from transformers import AutoModelForCausalLM{tokenizer}

folder = "."  # this folder
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
"""
GENERATE = """\
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer("The", return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False)
print(tokenizer.decode(tokens[0]))
"""
GENERATE_TOKENS = """\
tokens = torch.arange(8)[None] % {vocab_size}  # no tokenizer was at hand: token numbers
print(model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=16))
"""
FORWARD = """\
tokens = torch.arange(8)[None] % {vocab_size}
print(model(tokens).logits.shape)
"""
NOT_CAUSAL = """
- **Not causal.** Each expert chooses its tokens among {group},
  so that the loss is no language model's, and `generate`, a cache and padding are refused. It is
  the loss of {sequences} sequences per forward pass: another number may give another loss.
"""
GROUPS = {
    "batch": "all of a forward pass, later ones and other sequences included",
    "sequence": "all of a sequence, later ones included",
    "position": "those at one position of all sequences",
}
LIMITS = """\
## Limits

- A research model of a scaling study: trained for one number, its validation loss. It is neither
  tuned to follow instructions nor checked for what it may say.
- At most {context} tokens, prompt and continuation together; more is an error.
- Trained in {precision}; the weights are float32.{seen}
"""


def model_card(record: RunRecord, *, has_tokenizer: bool) -> str:
    """The text of `README.md`, Markdown with YAML front matter as the Hugging Face hub reads it.

    Args:
        record: without the folders of the machine that it was made on; what it does not know is
            left out of the card.
        has_tokenizer: whether the tokenizer lies beside the model.
    """
    config = record.config
    layers = config["decoder"]["num_layers"]
    front = FRONT.format(
        pipeline="pipeline_tag: text-generation\n" if record.causal else "",
        ffw=record.ffw,
        run_id=record.run_id,
        block=(layers + 1) // 2,
        layers=layers,
        transformers=version("transformers"),
    )
    return "\n".join(
        [
            front + _loading(record, has_tokenizer) + "```\n",
            *_table("Facts", _facts(record)),
            *_table("Architecture", _architecture(config)),
            *_table("Training", _training(record)),
            f"`{RECORD}` has all of the record.\n",
            _limits(record),
        ]
    )


def _loading(record: RunRecord, has_tokenizer: bool) -> str:
    tokenizer = has_tokenizer and bool(record.causal)
    use = GENERATE if tokenizer else GENERATE_TOKENS if record.causal else FORWARD
    text = MODEL.format(tokenizer=", AutoTokenizer" if tokenizer else "")
    text = text.replace("import torch\n", "") if tokenizer else text
    return text + use.format(vocab_size=record.config["data"]["tokenizer"]["vocab_size"])


def _facts(record: RunRecord) -> Iterator[tuple[str, str | None]]:
    yield "validation loss", _number(record.loss, "nats per token")
    yield "perplexity", _number(record.perplexity)
    yield "bits per byte", _number(record.bits_per_byte)
    yield "over", _count(record.val_tokens, "validation tokens")
    yield "causal", {True: "yes", False: "no", None: None}[record.causal]
    for route, loss in record.causal_losses.items():
        yield f"loss if routed causally, by {route}", _number(loss, "nats per token")
    yield "parameters", _count(record.num_params_total)
    yield "of them active per token", _count(record.num_params_active)
    yield "of them in lookup tables", _count(record.num_params_lookup)
    yield "of them embedding and head", _count(record.num_params_embedding)
    yield "experts in use", _number(record.expert_usage, "of all, by validation tokens")
    yield "unevenness of their use", _number(record.expert_unevenness, "nats from uniform")


def _architecture(config: Mapping[str, Any]) -> Iterator[tuple[str, str | None]]:
    decoder, ffw = config["decoder"], config["ffw"]
    for name in ("d_model", "num_layers", "num_heads", "norm", "rotary_base", "bias"):
        yield name, str(decoder[name])
    for name in ("tie_embeddings", "normalize_embeddings"):
        yield name, str(decoder[name])
    yield "dense feed-forwards", _named(decoder["ffw"])
    yield f"swapped feed-forward, `{ffw['name']}`", _named({**ffw, "name": None})


def _training(record: RunRecord) -> Iterator[tuple[str, str | None]]:
    config = record.config
    data, tokenizer = config["data"], config["data"]["tokenizer"]
    yield "training FLOPs", None if record.flops is None else f"{record.flops:.4g}"
    yield "budget", budget_label(record.budget)
    yield "tokens", _count(record.tokens)
    yield "steps", _count(record.steps)
    yield "epochs", _number(record.epochs)
    yield "data", " ".join(str(data[n]) for n in ("source", "path") if data.get(n))
    yield "tokenizer", _named({n: tokenizer[n] for n in ("kind", "vocab_size", "name")})
    yield "context", str(data["context"])
    yield "peak learning rate", _number(record.lr)
    yield "seed", str(record.seed)
    yield "study", record.study
    yield "git commit of peer-scaling", record.git_commit
    yield "finished", record.finished_at


def _limits(record: RunRecord) -> str:
    config = record.config
    seen = ""
    if record.causal is False:
        sequences = config["micro_batch"] or config["batch_size"]
        group = GROUPS[config["ffw"].get("group", "batch")]
        seen = NOT_CAUSAL.rstrip("\n").format(group=group, sequences=sequences)
    return LIMITS.format(
        context=config["data"]["context"], precision=config["precision"], seen=seen
    )


def _table(title: str, rows: Iterator[tuple[str, str | None]]) -> Iterator[str]:
    yield f"## {title}\n"
    yield "| what | value |\n|---|---|"
    yield from (f"| {name} | {_cell(value)} |" for name, value in rows if value is not None)
    yield ""


def _cell(value: str) -> str:
    return " ".join(value.split()).replace("|", "\\|").replace("<", "&lt;")


def _named(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items() if value is not None)


def _count(value: int | None, unit: str = "") -> str | None:
    return None if value is None else f"{value:,} {unit}".rstrip()


def _number(value: float | None, unit: str = "") -> str | None:
    return None if value is None else f"{value:.5g} {unit}".rstrip()
