"""The evaluation sets: what is read, counted and scored of each."""

import json
from collections import Counter

import pytest

from peer_scaling import eval_sets
from peer_scaling.errors import UserError
from peer_scaling.eval_command import options_from
from peer_scaling.eval_sets import EvalSet, detokenized, pages, texts
from peer_scaling.evaluation import Counter as Counting
from peer_scaling.evaluation import encoded
from peer_scaling.tokenizer import TokenizerConfig, make_tokenizer

PAGE = """ = Cat = 

 A cat @-@ like animal , of 1 @,@ 000 kinds ( or more ) . It weighs 2 @.@ 5 kg : " heavy " . 

 = = Food = = 

 It 's fond of fish ; N times . 
"""


def named(name, *overrides):
    return options_from([f"eval.only=[{name}]", *overrides])[1][name]


def counts_of(found):
    counting = Counting()
    for text in found:
        counting.add(text, 1)
    return counting.counts


def rows_file(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_five_sets_are_there_with_their_protocols():
    _, sets = options_from([])
    assert {name: own.scored for name, own in sets.items()} == {
        "c4": "document",
        "wikitext": "document",
        "pile": "document",
        "lambada": "last_word",
        "curation_corpus": "summary",
    }


@pytest.mark.data
def test_wikitext_is_counted_as_it_is_distributed(reference_data):
    path = reference_data / "wikitext" / "wiki.test.raw"
    found = list(texts("wikitext", named("wikitext", f"eval.sets.wikitext.path={path}")))
    counts = counts_of(found)
    raw = path.read_text()
    assert (counts.words, raw.count("\n")) == (241_211, 4_358)
    # The blank one before the first article is in none; the end of the file has one more.
    assert counts.lines == 4_358 - 1 + 1
    assert len(found) == 62
    assert "".join(t.counted for t in found).split() == raw.split()
    assert all(t.context is None for t in found)
    assert not any(mark in t.scored for t in found for mark in (" @-@ ", " @,@ ", " , ", " 's"))


@pytest.mark.data
def test_lambada_is_counted_as_it_is_distributed(reference_data):
    path = reference_data / "lambada" / "lambada_test.jsonl"
    found = list(texts("lambada", named("lambada", f"eval.sets.lambada.path={path}")))
    assert len(found) == 5_153
    assert all(t.context + t.scored == json.loads(line)["text"] for t, line in zip(found, path.read_text().splitlines(), strict=True))  # fmt: skip
    assert all(t.scored[0] == " " and " " not in t.scored[1:] for t in found)


@pytest.mark.data
def test_c4_and_pile_like_text_is_read(reference_data):
    c4 = named("c4", f"eval.sets.c4.path={reference_data}/c4/c4_validation_first1000.jsonl.gz")
    assert counts_of(texts("c4", c4)).documents == 1000
    pattern = f"eval.sets.pile.path={reference_data}/pile_like/*.jsonl.gz"
    pile = named(
        "pile", pattern, "eval.sets.pile.title=pile_like", "eval.sets.pile.max_documents=7"
    )
    assert (counts_of(texts("pile", pile)).documents, pile.title) == (7, "pile_like")


def test_articles_are_told_apart_by_their_titles(tmp_path):
    other = PAGE.replace("Cat", "Dog")
    path = tmp_path / "wiki.raw"
    path.write_text(" \n" + PAGE + other)
    found = list(pages(iter(path.read_text().split("\n"))))
    assert [page.strip() for page in found] == [PAGE.strip(), other.strip()]
    assert found == [t.counted for t in texts("w", EvalSet("W", "h", "s", path=str(path), layout="wikitext"))]  # fmt: skip


def test_an_article_reads_like_written_text():
    assert detokenized(PAGE) == (
        ' = Cat =\n\nA cat-like animal, of 1,000 kinds (or more). It weighs 2.5 kg: "heavy". \n\n'
        "== Food ==\n\nIt's fond of fish; 1 times. \n"
    ).replace(" \n", "\n")


def test_only_the_last_word_is_scored(tmp_path):
    path = rows_file(tmp_path, {"text": "He went back home"}, {"text": "Yes"})
    found = list(texts("l", EvalSet("L", "h", "s", path=str(path), scored="last_word")))
    assert [tuple(t) for t in found] == [("He went back", " home", " home"), ("", "Yes", "Yes")]


def test_only_the_summary_is_scored(tmp_path):
    path = rows_file(tmp_path, {"article_content": "Long story.", "summary": "Short."})
    found = list(texts("c", named("curation_corpus", f"eval.sets.curation_corpus.path={path}")))
    assert [tuple(t) for t in found] == [("Long story.\nTL;DR:", " Short.", " Short.")]


def test_scored_tokens_start_where_the_context_ends(tmp_path):
    tokenizer = make_tokenizer(TokenizerConfig("bytes", 257), ())
    path = rows_file(tmp_path, {"text": "He went home"}, {"text": "Yes"})
    (home, yes) = encoded(list(texts("l", EvalSet("L", "h", "s", path=str(path), scored="last_word"))), tokenizer)  # fmt: skip
    assert (len(home.tokens), home.first) == (12, 7)
    assert (yes.tokens[0], len(yes.tokens), yes.first) == (tokenizer.eod, 4, 1)
    (whole,) = encoded(list(texts("d", EvalSet("D", "h", "s", path=str(path), max_documents=1))), tokenizer)  # fmt: skip
    assert (whole.tokens[0], len(whole.tokens), whole.first) == (tokenizer.eod, 13, 1)


def test_the_hash_is_of_the_texts_and_not_of_the_file(tmp_path):
    rows = [{"text": "One two"}, {"text": "Three four"}]
    own = EvalSet("L", "h", "s", path=str(rows_file(tmp_path, *rows)), scored="last_word")
    before = counts_of(texts("l", own))
    rows_file(tmp_path, *({**row, "id": 7} for row in rows))
    assert counts_of(texts("l", own)) == before
    rows_file(tmp_path, {"text": "One Two"}, rows[1])
    assert counts_of(texts("l", own)).sha256 != before.sha256


def test_the_hub_is_asked_once_and_its_lines_are_like_the_file_s(tmp_path, monkeypatch):
    calls = Counter()

    def load_dataset(*what, **how):
        calls[what, how["split"]] += 1
        return [{"text": f"{line}\n" if line else ""} for line in PAGE.split("\n")[:-1]]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr(eval_sets, "_unreachable", lambda hub: None)
    found = list(texts("wikitext", named("wikitext")))
    assert calls == {(("Salesforce/wikitext", "wikitext-103-raw-v1"), "test"): 1}
    assert [t.counted for t in found] == [PAGE.removesuffix("\n")]


def test_what_is_missing_is_said_with_the_way_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(eval_sets, "_unreachable", lambda hub: "ConnectTimeout")
    with pytest.raises(UserError, match=r"allenai/c4 cannot be reached .* give eval.sets.c4.path="):
        next(texts("c4", named("c4")))
    with pytest.raises(UserError, match=r"eval.sets.c4.path=.*nowhere.*: no such file"):
        next(texts("c4", named("c4", f"eval.sets.c4.path={tmp_path}/nowhere/*.jsonl")))
    path = rows_file(tmp_path, {"title": "x", "body": "y"})
    with pytest.raises(UserError, match="c4: a row has no `text`; its fields: title, body"):  # fmt: skip
        next(texts("c4", named("c4", f"eval.sets.c4.path={path}")))


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("eval.only=[c5]", "eval.only=c5 is unknown; use c4, wikitext"),
        ("eval.strid=3", "eval.strid"),
        ("eval.stride=0", "eval.stride=0 must be positive"),
        ("eval.sets.c4.scored=half", "eval.sets.c4.scored='half' is unknown; use document"),
        ("eval.sets.c4.title=${oc.env:HOME}", "calls a resolver"),
        ("eval.sets.c4._target_=os.system", "_target_"),
    ],
)
def test_wrong_options_are_one_line(override, line):
    with pytest.raises(UserError, match=line.replace("[", r"\[")):
        options_from([override])
