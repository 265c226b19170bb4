"""What a study that chooses its sizes keeps, whatever its runs bring."""

from collections import Counter

from hypothesis import example, given, settings
from hypothesis import strategies as st

from choosing import BUDGETS, SIZES, VARIANTS, Oracle, candidates, of, study
from peer_scaling.adaptive import decide, history
from peer_scaling.candidates import Action, Adaptive

RUNS = {Action.START, Action.EXTEND, Action.REFINE, Action.REPEAT}
oracles = st.builds(
    Oracle, at=st.floats(0.5, 400), noise=st.floats(0, 0.05), failing=st.sets(st.sampled_from(SIZES), max_size=6),
)  # fmt: skip
configs = st.builds(
    Adaptive, st.just(SIZES), start=st.integers(4, 6), spacing=st.floats(1.4, 5),
    target_size=st.floats(0.03, 0.5), target_loss=st.floats(0.003, 0.1), ladders=st.floats(1, 4),
    max_seeds=st.integers(1, 6), runs_per_round=st.integers(1, 4),
)  # fmt: skip
ALL_OF_IT = Adaptive(
    SIZES, start=6, spacing=2.0, target_size=0.125, target_loss=0.0625, ladders=1.9, max_seeds=1,
    runs_per_round=1,
)  # fmt: skip
"""Spends its allowance to the last FLOP."""
infeasible = st.sets(
    st.tuples(st.sampled_from(VARIANTS), st.sampled_from(BUDGETS), st.sampled_from(SIZES)),
    max_size=40,
)


@settings(deadline=None, max_examples=40)
@given(oracle=oracles, config=configs, problems=infeasible)
@example(oracle=Oracle(1.0, 0.03125, set()), config=ALL_OF_IT, problems=set())
def test_what_every_study_keeps(oracle, config, problems):
    own = candidates(problems)
    decisions = study(oracle, config, own)
    runs = [d for d in decisions if d.key]
    assert {d.action for d in runs} <= RUNS
    assert {d.action for d in decisions if not d.key} <= {Action.DROP, Action.STOP}
    assert max(Counter(d.key for d in runs).values(), default=1) == 1, "a run was asked for twice"
    assert not {d.key[:3] for d in runs} & problems, "an infeasible size was asked for"
    # Rounded once, as the study's own: 1.9 x 6 x ... would come out below 1.9 x (6 x ...).
    allowance = config.ladders * (config.start * sum(BUDGETS) * len(VARIANTS))
    assert sum(d.budget for d in runs) <= allowance
    dropped = {(d.variant, d.budget, d.size) for d in of(decisions, Action.DROP) if d.size}
    assert dropped == problems
    stopped = Counter((d.variant, d.budget) for d in of(decisions, Action.STOP))
    assert stopped == Counter({(v, b): 1 for v in VARIANTS for b in BUDGETS})
    assert all(d.reason for d in decisions)
    counts = Counter()
    for d in runs:
        assert d.seed == counts[d.key[:3]], "seeds of a size are not 0, 1, 2, ..."
        counts[d.key[:3]] += 1


@settings(deadline=None, max_examples=40)
@given(oracle=oracles, config=configs, problems=infeasible)
def test_no_variant_is_tuned_more_than_another(oracle, config, problems):
    runs, spent = Counter(), Counter()
    for d in study(oracle, config, candidates(problems)):
        if d.key:
            runs[d.variant, d.budget] += 1
            spent[d.variant] += d.budget
        for budget in BUDGETS:
            assert abs(runs["dense", budget] - runs["peer", budget]) <= 1
        assert abs(spent["dense"] - spent["peer"]) <= max(BUDGETS)
    assert spent["dense"] == spent["peer"]


@settings(deadline=None, max_examples=25)
@given(oracle=oracles, config=configs, data=st.data())
def test_a_study_that_was_cut_anywhere_decides_the_same(oracle, config, data):
    whole = study(oracle, config)
    asked = [d.key for d in whole if d.key]
    cut = data.draw(st.integers(0, len(asked)))
    # Runs of a round end in any order; some of them may have ended when the study is cut.
    rounds = {d.key: d.round for d in whole if d.key}
    order = sorted(asked, key=lambda key: (rounds[key], data.draw(st.randoms()).random()))
    seen = [oracle(key) for key in order[:cut]]
    data.draw(st.randoms()).shuffle(seen)
    decided = history(config, candidates(), seen)
    assert list(decided) == whole[: len(decided)]
    now = decide(config, candidates(), seen)
    assert [d.key for d in now if d.key] == [
        d.key for d in decided if d.key and d.key not in set(order[:cut])
    ]
