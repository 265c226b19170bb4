"""Models to export, and the script that loads them where the project cannot be imported."""

import torch

from peer_scaling.record import RunRecord
from peer_scaling.trained import Trained
from planned_runs import make_run

CONTEXT = 24
CASES = {
    "dense": ("dense",),
    "dense_layer_norm": ("dense", "backbone.norm=layer", "ffw.activation=relu", "ffw.bias=true"),
    "dense_untied": ("dense", "backbone.tie_embeddings=false", "backbone.bias=true"),
    "dense_unscaled": ("dense", "backbone.normalize_embeddings=false", "backbone.rotary_base=500"),
    "moe": ("moe",),
    "moe_sequence": ("moe", "ffw.group=sequence"),
    "moe_position": ("moe", "ffw.group=position", "ffw.capacity_factor=2"),
    "moe_token_choice": ("moe", "ffw.router=token_choice"),
    "moe_top_2": ("moe", "ffw.router=token_choice", "ffw.top_k=2", "ffw.activation=silu"),
    "pkm": ("pkm",),
    "pkm_shared": ("pkm", "ffw.shared_keys=true", "ffw.query_norm=layer"),
    "peer": ("peer",),
    "peer_layer": ("peer", "ffw.query_norm=layer", "ffw.activation=relu"),
    "peer_none": ("peer", "ffw.query_norm=none", "backbone.bias=true", "backbone.norm=layer"),
    "peer_own_keys": ("peer", "ffw.shared_keys=false", "backbone.tie_embeddings=false"),
}
NOT_CAUSAL = ["moe", "moe_sequence", "moe_position"]
CAUSAL = [name for name in CASES if name not in NOT_CAUSAL]

LOAD = """
import contextlib, io, json, os, sys
sys.modules["peer_scaling"] = None  # an import of it raises
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

torch.set_num_threads(1)
root, cases = sys.argv[1], sys.argv[2:]
tokens, results, messages = load_file(f"{root}/tokens.safetensors"), {}, {}
for name in cases:
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(f"{root}/{name}", trust_remote_code=True)
        assert not model.training
        results[f"{name}.logits"] = model(tokens["all"]).logits
        try:
            greedy = dict(max_new_tokens=8, do_sample=False, eos_token_id=None)
            mask = torch.ones_like(tokens["prompt"])
            new = model.generate(tokens["prompt"], attention_mask=mask, **greedy)
            again = model.generate(tokens["prompt"], attention_mask=mask, use_cache=False, **greedy)
            beams = model.generate(tokens["prompt"], attention_mask=mask, num_beams=2, **greedy)
            assert beams.shape == new.shape
            results[f"{name}.generated"], results[f"{name}.uncached"] = new, again
        except ValueError as error:
            messages[name] = str(error)
        if name in ("peer", "dense_untied"):
            again = f"{root}/{name}/again"
            model.save_pretrained(again)
            model = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
            results[f"{name}.again"] = model(tokens["all"]).logits
            body = AutoModel.from_pretrained(f"{root}/{name}", trust_remote_code=True)
            results[f"{name}.hidden"] = body(tokens["all"]).last_hidden_state
    os.chdir(f"{root}/{name}")
    code = open("README.md").read().split("```python")[1].split("```")[0]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, {})
    messages[f"{name}.printed"] = printed.getvalue()
save_file(results, f"{root}/results.safetensors")
with open(f"{root}/messages.json", "w") as file:
    json.dump(messages, file)
"""


def random_model(run, seed=0):
    """Its model in eval mode with every tensor random: gains, biases and running statistics too."""
    model = run.model().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2.0, generator=generator)
            elif tensor.is_floating_point() and tensor.dim() == 1:
                tensor.add_(torch.empty_like(tensor).normal_(0.0, 0.3, generator=generator))
        for table in (model.embedding_VD, model.head_VD):
            if table is not None:
                table.mul_(20.0)  # logits as far apart as a trained model's
    return model


def trained(folder, *overrides, ffw="peer"):
    run = make_run(folder / "runs", f"data.context={CONTEXT}", "size=d16_l2", *overrides, ffw=ffw)
    record = RunRecord(
        run_id=f"{ffw}-d16_l2-1e9-s0-00000000", study="default", status="done", reason=None, ffw=ffw,
        variant=ffw, size="d16_l2", seed=0, budget=1e9, flops=1.0012e9, num_params_total=7_654_321,
        num_params_active=54_321, num_params_lookup=6_543_210, num_params_embedding=4_321,
        tokens=987_654, steps=321, loss=3.14159, perplexity=23.14, bits_per_byte=1.4142,
        val_tokens=2048, causal=run.ffw.causal, expert_usage=0.625, expert_unevenness=0.75,
        git_commit="0123456789abcdef", config=run.describe(),
    )  # fmt: skip
    return Trained(folder, record, run, random_model(run))
