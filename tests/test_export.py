"""Exported folders: equal logits and generated tokens without the project, the card, refusals."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend
from tokenizers import processors
from transformers import AutoTokenizer

from exported_models import CASES, CAUSAL, CONTEXT, LOAD, NOT_CAUSAL, random_model, trained
from peer_scaling.errors import UserError
from peer_scaling.export import CODE, _config, _tensors, export, public_record
from peer_scaling.exported.modeling_peer_scaling import PeerScalingForCausalLM
from peer_scaling.record import read_record
from peer_scaling.tokenizer import END_OF_DOCUMENT, TokenizerConfig, make_tokenizer

VOCAB = 300
TEXT = "— the Union\nis 7 %"


def tokens_of(batch, time, seed=0):
    return torch.randint(VOCAB, (batch, time), generator=torch.Generator().manual_seed(seed))


def greedy(model, tokens, number):
    with torch.no_grad():
        for _ in range(number):
            following = model(tokens).logits_BTV[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, following], dim=1)
    return tokens


def inside(model):
    """The exported model of ours, made in this process."""
    exported = PeerScalingForCausalLM(_config(model, None)).eval()
    missing, unexpected = exported.load_state_dict(_tensors(model), strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    return exported


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    vocab = f"data.tokenizer.vocab_size={VOCAB}"
    return {n: trained(folder, vocab, *o, ffw=ffw) for n, (ffw, *o) in CASES.items()}


def with_tokenizer(model, tokenizer):
    run = replace(model.run, data=replace(model.run.data, tokenizer=tokenizer))
    record = replace(model.record, config=run.describe())
    return replace(model, run=run, record=record, model=random_model(run))


@pytest.fixture(scope="module")
def loaded(models, tmp_path_factory):
    """What a process that cannot import the project makes of the exported folders."""
    root = tmp_path_factory.mktemp("exported")
    bytes_ = TokenizerConfig("bytes", VOCAB)
    (root / "tokenizer.json").write_text(make_tokenizer(bytes_, ()).to_json())
    for name, model in models.items():
        if name == "peer":
            export(with_tokenizer(model, bytes_), root / name, root)
        else:
            export(model, root / name, None)
    tokens = {"all": tokens_of(3, CONTEXT), "prompt": tokens_of(2, 5, seed=1)}
    save_file(tokens, root / "tokens.safetensors")
    result = subprocess.run(
        [sys.executable, "-c", LOAD, str(root), *models],
        cwd=root, text=True, capture_output=True,
        env={**os.environ, "HF_HOME": str(root / "hub"), "HF_HUB_OFFLINE": "1",
             "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": ""},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return root, tokens, result.stderr


@pytest.mark.parametrize("name", CASES)
def test_logits_are_ours(models, loaded, name):
    root, tokens, _ = loaded
    results = load_file(root / "results.safetensors")
    with torch.no_grad():
        output = models[name].model(tokens["all"])
        ours = output.logits_BTV
    print(
        f"{name}: {float((results[f'{name}.logits'] - ours).abs().max()):.1e} of {ours.std():.2f}"
    )
    assert float(ours.std()) > 0.1
    torch.testing.assert_close(results[f"{name}.logits"], ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["peer", "dense_untied"])
def test_saved_again_and_without_the_head(models, loaded, name):
    root, tokens, _ = loaded
    results = load_file(root / "results.safetensors")
    assert torch.equal(results[f"{name}.again"], results[f"{name}.logits"])
    with torch.no_grad():
        hidden_BTD = models[name].model(tokens["all"]).hidden_BTD
    torch.testing.assert_close(results[f"{name}.hidden"], hidden_BTD, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CAUSAL)
def test_greedy_generation_is_ours_with_and_without_a_cache(models, loaded, name):
    root, tokens, _ = loaded
    results = load_file(root / "results.safetensors")
    expected = greedy(models[name].model, tokens["prompt"], 8)
    assert torch.equal(results[f"{name}.generated"], expected)
    assert torch.equal(results[f"{name}.uncached"], expected)


def test_loading_warns_of_nothing_and_the_cards_code_runs(loaded):
    root, _, printed = loaded
    assert printed == ""
    messages = json.loads((root / "messages.json").read_text())
    assert "tensor([[" in messages["dense.printed"]
    assert messages["peer.printed"].startswith("The")
    assert len(messages["peer.printed"]) > len("The")
    assert f"torch.Size([1, 8, {VOCAB}])" in messages["moe.printed"]


def test_expert_choice_does_not_generate(models, loaded):
    root, *_ = loaded
    messages = json.loads((root / "messages.json").read_text())
    assert [name for name in messages if not name.endswith(".printed")] == NOT_CAUSAL
    assert "which compares a token with others" in messages["moe"]
    exported = inside(models["moe"])
    with pytest.raises(ValueError, match="neither with a cache nor with padding"):
        exported(tokens_of(1, 4), attention_mask=torch.tensor([[0, 1, 1, 1]]))
    with pytest.raises(ValueError, match="neither with a cache"):
        exported(tokens_of(1, 4), use_cache=True)


@pytest.mark.parametrize("name", ["dense", "moe_token_choice", "pkm", "peer"])
def test_padding_changes_nothing(models, name):
    """On either side; a batch of unequal prompts generates what each does alone."""
    model, exported = models[name].model, inside(models[name])
    long, short = tokens_of(1, 9, seed=2), tokens_of(1, 4, seed=3)
    pad = torch.zeros(1, 5, dtype=torch.int64)
    left = torch.cat([long, torch.cat([pad, short], 1)])
    mask = torch.ones_like(left)
    mask[1, :5] = 0
    new = exported.generate(
        left, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    assert torch.equal(new[:1], greedy(model, long, 6))
    assert torch.equal(new[1:, 5:], greedy(model, short, 6))
    with torch.no_grad():
        right = exported(torch.cat([short, pad], 1), attention_mask=mask[1:].flip(1)).logits
        torch.testing.assert_close(right[:, :4], model(short).logits_BTV, rtol=1e-5, atol=1e-5)


def test_tokens_beyond_the_context_are_refused(models):
    exported = inside(models["peer"])
    tokens = tokens_of(1, CONTEXT)
    with pytest.raises(ValueError, match=f"{CONTEXT + 1} tokens exceed the model's context of 24"):
        exported(torch.cat([tokens, tokens[:, :1]], 1))
    with pytest.raises(ValueError, match="exceed the model's context"):
        exported.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=2)
    with pytest.raises(ValueError, match=r"attention_mask is \(1, 3\); it must be \(batch, 24\)"):
        exported(tokens, attention_mask=torch.ones(1, 3))


def test_a_static_cache_is_refused(models):
    tokens = tokens_of(1, 4)
    with pytest.raises(ValueError, match="a cache a DynamicCache"):
        inside(models["peer"]).generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            cache_implementation="static",
            max_new_tokens=2,
        )


@pytest.mark.parametrize("name", CASES)
def test_a_model_built_and_not_loaded_is_nearly_uniform(models, name):
    tokens = tokens_of(4, CONTEXT)
    with torch.no_grad():
        loss = (
            PeerScalingForCausalLM(_config(models[name], None)).eval()(tokens, labels=tokens).loss
        )
    assert abs(loss.item() - math.log(VOCAB)) < 0.05


def test_loss_gradients_and_hidden_states(models):
    exported = inside(models["peer"]).train()
    tokens = tokens_of(2, 8)
    output = exported(tokens, labels=tokens, output_hidden_states=True)
    expected = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    )
    assert torch.equal(output.loss, expected)
    output.loss.backward()
    assert [n for n, p in exported.named_parameters() if p.grad is None] == []
    assert len(output.hidden_states) == 1 + models["peer"].run.decoder.num_layers
    assert exported(tokens, logits_to_keep=1).logits.shape == (2, 1, VOCAB)
    assert exported(tokens, return_dict=False)[0].shape == (2, 8, VOCAB)


def test_bfloat16_is_close(models):
    with torch.no_grad():
        ours = models["peer"].model(tokens_of(2, 8)).logits_BTV
        theirs = inside(models["peer"]).bfloat16()(tokens_of(2, 8)).logits
    assert theirs.dtype == torch.bfloat16
    assert float((theirs.float() - ours).abs().mean() / ours.std()) < 0.1


def front_matter(card):
    _, front, text = card.split("---\n", 2)
    return yaml.safe_load(front), text


@pytest.mark.parametrize("name", ["peer", "moe"])
def test_the_card_says_what_the_record_knows(models, tmp_path, name):
    out, model = tmp_path / "out", models[name]
    if name == "moe":
        model = replace(model, record=replace(model.record, causal_losses={"top1": 3.5}))
    export(model, out, None)
    front, text = front_matter((out / "README.md").read_text())
    assert front["library_name"] == "transformers"
    assert front["tags"][-1] == name
    assert "license" not in front
    assert (front.get("pipeline_tag") == "text-generation") == (name == "peer")
    for fact in (
        "trust_remote_code=True", "| 3.1416 nats per token |", "| 23.14 |", "| 1.4142 |",
        "| 7,654,321 |", "| 54,321 |", "| 6,543,210 |", "| 1.001e+09 |", "| 987,654 |",
        "| synthetic |", f"vocab_size={VOCAB}", "| 0.625 of all", "| 0123456789abcdef |",
        f"At most {CONTEXT} tokens", "research model", "num_experts=",
    ):  # fmt: skip
        assert fact in text, fact
    assert ("**Not causal.**" in text) == (name == "moe")
    assert ("| loss if routed causally, by top1 | 3.5 nats per token |" in text) == (name == "moe")
    assert read_record(out / "record.json") == public_record(model.record)
    for file in CODE:
        assert "peer_scaling." not in (out / file).read_text().replace("peer_scaling.py", "")


def test_what_a_record_does_not_know_is_no_row(models, tmp_path):
    record = replace(models["peer"].record, bits_per_byte=None, expert_usage=None, git_commit=None)
    export(replace(models["peer"], record=record), tmp_path / "out", None)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| None |" not in text
    assert "=None" not in text
    assert "bits per byte" not in text
    assert "experts in use" not in text


def test_no_folder_and_no_secret_leaves_the_machine(models, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "hunter2hunter2")
    model = models["peer"]
    data = replace(
        model.run.data, source="local", path="../nobody/texts/*.jsonl",
        tokenizer=TokenizerConfig("file", VOCAB, "own/t5.model", "</s>"),
    )  # fmt: skip
    settings = replace(model.run.settings, runs_dir="/home/nobody/runs", device="hunter2hunter2")
    run = replace(model.run, data=data, settings=settings)
    record = replace(
        model.record, config={**run.describe(), "more": ["C:\\nobody\\x", "~/nobody/y"]}
    )
    export(replace(model, run=run, record=record), tmp_path / "out", None)
    for path in (tmp_path / "out").iterdir():
        if path.suffix != ".safetensors":
            assert not any(word in path.read_text() for word in ("nobody", "hunter2", "own/")), path
    config = json.loads((tmp_path / "out" / "record.json").read_text())["config"]
    assert config["runs_dir"] == "runs"
    assert config["data"]["path"] == "*.jsonl"
    assert config["data"]["tokenizer"]["name"] == "t5.model"
    assert config["more"] == ["x", "y"]
    assert "*.jsonl" in (tmp_path / "out" / "README.md").read_text()


def check_tokenizer(folder, ours, eod):
    """It encodes as in training, and its end of document ends generation. No code is run for it."""
    theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    encoded = theirs([TEXT, "a"], padding=True, return_tensors="pt")
    assert list(encoded) == ["input_ids", "attention_mask"]
    expected = ours.encode([TEXT])[0].tolist()
    assert [*encoded["input_ids"][0].tolist(), theirs.eos_token_id] == expected
    assert (theirs.eos_token, theirs.eos_token_id) == (eod, ours.eod)
    assert encoded["attention_mask"][1, 0] == 0  # padded on the left
    assert theirs.model_max_length == CONTEXT
    for file in ("config.json", "generation_config.json"):
        assert json.loads((folder / file).read_text())["eos_token_id"] == ours.eod
    return theirs


def test_the_tokenizer_encodes_as_in_training(models, tmp_path):
    config = TokenizerConfig("bytes", VOCAB)
    ours = make_tokenizer(config, ())
    (tmp_path / "tokenizer.json").write_text(ours.to_json())
    model = with_tokenizer(models["peer"], config)
    export(model, tmp_path / "out", tmp_path)
    theirs = check_tokenizer(tmp_path / "out", ours, END_OF_DOCUMENT)
    assert theirs.decode(theirs(TEXT)["input_ids"]) == TEXT
    text = (tmp_path / "out" / "README.md").read_text()
    assert "AutoTokenizer.from_pretrained" in text


def test_a_tokenizer_that_would_add_tokens_adds_none(models, tmp_path):
    backend = Backend.from_str(make_tokenizer(TokenizerConfig("bytes", VOCAB), ()).to_json())
    end = [(END_OF_DOCUMENT, backend.token_to_id(END_OF_DOCUMENT))]
    backend.post_processor = processors.TemplateProcessing(f"$A {END_OF_DOCUMENT}", None, end)
    path = tmp_path / "tokenizer.json"
    backend.save(str(path))
    config = TokenizerConfig("file", VOCAB, str(path), END_OF_DOCUMENT)
    export(with_tokenizer(models["peer"], config), tmp_path / "out", tmp_path)
    check_tokenizer(tmp_path / "out", make_tokenizer(config, ()), END_OF_DOCUMENT)


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "vocab_size", "eod"),
    [("gpt2_tokenizer.json", 50_257, "<|endoftext|>"), ("t5_spiece.model", 32_128, "</s>")],
)
def test_known_tokenizers_encode_as_in_training(
    models, reference_data, tmp_path, name, vocab_size, eod
):
    config = TokenizerConfig("file", vocab_size, str(reference_data / "tokenizers" / name), eod)
    ours = make_tokenizer(config, ())
    (tmp_path / "tokenizer.json").write_text(ours.to_json())
    export(with_tokenizer(models["dense"], config), tmp_path / "out", tmp_path)
    check_tokenizer(tmp_path / "out", ours, eod)


def test_refusals_write_nothing(models, tmp_path):
    model = models["peer"]
    full, file, link = tmp_path / "full", tmp_path / "file", tmp_path / "link"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    file.write_text("mine")
    link.symlink_to(tmp_path / "nowhere")
    for folder in (full, file, link):
        with pytest.raises(UserError, match="there is something already; give a new or an empty"):
            export(model, folder, None)
    with pytest.raises(UserError, match="cannot be written"):
        export(model, file / "below", None)
    with pytest.raises(UserError, match=r"tokenizer\.json: no tokenizer"):
        export(model, tmp_path / "out", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: no tokenizer"):
        export(model, tmp_path / "out", tmp_path)
    other = make_tokenizer(TokenizerConfig("bytes", VOCAB), ())
    (tmp_path / "tokenizer.json").write_text(other.to_json())
    small = with_tokenizer(model, replace(model.run.data.tokenizer, vocab_size=256))
    with pytest.raises(UserError, match=r"257 tokens.*not the tokenizer of peer.*vocab_size=256"):
        export(small, tmp_path / "out", tmp_path)
    with pytest.raises(UserError, match="ffw=mine has no exported form"):
        export(replace(model, run=replace(model.run, ffw_name="mine")), tmp_path / "out", None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "file",
        "full",
        "link",
        "tokenizer.json",
    ]


def test_an_empty_folder_is_taken(models, tmp_path):
    (tmp_path / "empty").mkdir()
    export(models["dense"], tmp_path / "empty", None)
    assert (tmp_path / "empty" / "model.safetensors").is_file()
    modes = {path.stat().st_mode & 0o444 for path in (tmp_path / "empty").iterdir()}
    assert modes == {0o444}


def test_code_that_does_not_fit_the_model_is_never_written(models, tmp_path):
    other = replace(models["peer"], model=models["pkm"].model)
    with pytest.raises(AssertionError, match=r"does not fit the model: model\.blocks"):
        export(other, tmp_path / "out", None)
    assert not (tmp_path / "out").exists()
