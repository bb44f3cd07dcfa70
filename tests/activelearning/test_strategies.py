"""One contract for every strategy, and for each what it is for."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samadapt.activelearning import automatic
from samadapt.activelearning.hybrid import power
from samadapt.activelearning.registry import NAMES, strategy
from samadapt.activelearning.strategy import Candidate, Pool
from samadapt.errors import ConfigError
from samadapt.inference.examine import Examination

DIM = 6
CLASSES = ("big", "rare")


def examination(doubts, areas=None, class_doubts=None, overlap=(0.8, np.nan)):
    """Of slices with ``doubts``; all of them show class "big" unless ``areas`` says otherwise."""
    doubts = np.asarray(doubts, dtype=float)
    areas = np.array([[50, 0]] * len(doubts)) if areas is None else np.asarray(areas)
    class_doubts = np.where(areas > 0, doubts[:, None], 0.0) if class_doubts is None else np.asarray(class_doubts)
    return Examination(2, areas, doubts, class_doubts, np.asarray(overlap, dtype=float))


def unit(*values):
    vector = np.zeros(DIM)
    vector[: len(values)] = values
    return (vector / max(np.linalg.norm(vector), 1e-9)).astype(np.float32)


def around(direction, number, name, spread=0.02, seed=0):
    """``number`` candidates whose descriptors lie around one direction."""
    rng = np.random.default_rng(seed)
    return [Candidate(f"{name}{n}", unit(*(direction + spread * rng.normal(size=DIM)))) for n in range(number)]


def ids(proposals):
    return [proposal.id for proposal in proposals]


# ---- the contract


@st.composite
def candidates(draw, prefix):
    """Anything that may be known of up to eight cases, of one to seven slices, including nothing at all."""
    found = []
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    same = draw(st.booleans())
    for n in range(draw(st.integers(0, 8))):
        slices = draw(st.sampled_from([1, 1, 2, 7]))
        areas = rng.integers(0, 3, (slices, 2)) * rng.integers(0, 2, 2)
        doubts = rng.random(slices) * draw(st.sampled_from([0, 1]))
        examined = examination(doubts, areas, doubts[:, None] * (areas > 0), rng.choice([0.5, np.nan], 2))
        sampled = rng.normal(size=(slices, DIM)).astype(np.float32)
        sampled[draw(st.integers(0, slices)) :] = np.nan
        known = draw(st.sets(st.sampled_from(["descriptor", "slices", "examination", "spread", "heads", "dice"])))
        found.append(
            Candidate(
                f"{prefix}{n}",
                descriptor=None if "descriptor" not in known else unit(1) if same else unit(*rng.normal(size=DIM)),
                slice_descriptors=sampled if "slices" in known else None,
                examination=examined if "examination" in known else None,
                spread=rng.random(slices) if "spread" in known else None,
                disagreement=rng.choice([0.3, np.nan]) if "heads" in known else None,
                label_dice=rng.choice([0.3, 0.9, np.nan]) if "dice" in known else None,
                proposed=draw(st.sampled_from([0.0, 5.0])),
                patient=draw(st.sampled_from([None, "p0", "P0", "p1"])),
                confirmed=draw(st.booleans()),
            )
        )
    return found


def slices_of(case):
    known = case.examination.doubt if case.examination is not None else case.slice_descriptors
    return 0 if known is None else len(known)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(unlabelled=candidates("u"), labelled=candidates("l"), count=st.integers(0, 10), seed=st.integers(0, 3))
def test_contract(name, unlabelled, labelled, count, seed):
    pool = Pool(unlabelled, labelled, CLASSES, seed)
    proposals = strategy(name).rank(pool, count)
    mine = {case.id: case for case in (labelled if name == "revisit" else unlabelled)}
    assert len(proposals) == min(count, len(mine))
    assert len(set(ids(proposals))) == len(proposals)
    assert set(ids(proposals)) <= set(mine)
    scores = [proposal.score for proposal in proposals]
    assert scores == sorted(scores, reverse=True)
    assert np.isfinite(scores).all()
    for proposal in proposals:
        assert proposal.reason.endswith(".")
        assert "nan" not in proposal.reason
        total = slices_of(mine[proposal.id])
        assert len(set(proposal.slices)) == len(proposal.slices) <= 5
        assert all(type(number) is int and 0 <= number < total for number in proposal.slices)
        assert bool(proposal.slices) == bool(total)
    order = random.Random(seed)
    again = Pool(order.sample(unlabelled, len(unlabelled)), order.sample(labelled, len(labelled)), CLASSES, seed)
    assert strategy(name).rank(again, count) == proposals


def test_an_unknown_name_lists_those_that_there_are():
    with pytest.raises(ConfigError, match="typiclust") as error:
        strategy("epistemic")
    assert all(name in str(error.value) for name in NAMES)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("random", "first", "last")])
def test_who_knows_nothing_says_so(name):
    nothing = [Candidate("a"), Candidate("b")]
    for proposal in strategy(name).rank(Pool(nothing, nothing), 2):
        assert any(word in proposal.reason for word in ("not seen", "not been", "No model", "Nobody", "not looked"))


@pytest.mark.parametrize(("name", "needed"), [(n, field) for n in NAMES for field in sorted(strategy(n).needs)])
def test_needs_are_fields_of_a_candidate(name, needed):
    assert needed in Candidate.__dataclass_fields__


# ---- orders


def test_first_last_and_random_go_through_all():
    cases = [Candidate(name) for name in "dbace"]
    assert ids(strategy("first").rank(Pool(cases, []), 5)) == list("abcde")
    assert ids(strategy("last").rank(Pool(cases, []), 5)) == list("edcba")
    orders = {tuple(ids(strategy("random").rank(Pool(cases, [], seed=seed), 5))) for seed in range(6)}
    assert len(orders) > 2


def test_random_puts_off_what_was_proposed_lately():
    cases = [Candidate("a", proposed=20.0), Candidate("b", proposed=10.0), Candidate("c")]
    for seed in range(5):
        assert ids(strategy("random").rank(Pool(cases, [], seed=seed), 3)) == ["c", "b", "a"]


def test_random_fg_prefers_cases_and_slices_with_foreground():
    empty = [Candidate(f"empty{n}", examination=examination([0.9] * 4, [[0, 0]] * 4)) for n in range(5)]
    areas = [[0, 0]] * 10 + [[40, 0], [50, 0], [60, 0]] + [[0, 0]] * 10
    full = Candidate("full", examination=examination([0.1] * 23, areas))
    unseen = Candidate("unseen")
    for seed in range(10):
        ranked = strategy("random_fg").rank(Pool([*empty, unseen, full], [], seed=seed), 3)
        assert ids(ranked)[:2] == ["full", "unseen"]
        assert sorted(ranked[0].slices) == [10, 11, 12]


def test_random_fg_draws_slices_by_how_much_of_a_class_they_show():
    case = Candidate("a", examination=examination([0.1] * 10, [[100, 0]] + [[11, 0]] * 9))
    firsts = Counter(strategy("random_fg").rank(Pool([case], [], seed=seed))[0].slices[0] for seed in range(200))
    assert 70 < firsts[0] < 135  # half of all pixels lie in slice 0
    assert len(firsts) > 5


# ---- cold start

CLUSTERS = np.eye(DIM)[:3]


@pytest.mark.parametrize("name", ["kcenter", "typiclust", "probcover"])
def test_cold_start_takes_one_of_each_cluster(name):
    cases = [case for n, size in enumerate((30, 10, 4)) for case in around(CLUSTERS[n], size, "abc"[n], seed=n)]
    assert {chosen[0] for chosen in ids(strategy(name).rank(Pool(cases, []), 3))} == set("abc")


@pytest.mark.parametrize("name", ["kcenter", "typiclust", "probcover", "clue"])
def test_what_is_labelled_needs_no_other_of_its_kind(name):
    doubt = examination([0.5])
    cases = [
        Candidate(case.id, case.descriptor, examination=doubt)
        for n, size in enumerate((30, 10))
        for case in around(CLUSTERS[n], size, "ab"[n], seed=n)
    ]
    labelled, rest = cases[:2], cases[2:]
    assert strategy(name).rank(Pool(rest, labelled))[0].id.startswith("b")


def test_kcenter_takes_the_outlier_where_the_others_take_what_is_typical():
    cases = [*around(CLUSTERS[0], 30, "dense"), *around(CLUSTERS[1], 10, "few"), Candidate("odd", unit(-1, -1))]
    pool = Pool(cases, around(CLUSTERS[0], 1, "done", seed=9))
    assert ids(strategy("kcenter").rank(pool)) == ["odd"]
    assert strategy("typiclust").rank(pool)[0].id.startswith("few")
    assert strategy("probcover").rank(pool)[0].id.startswith("few")


def test_kcenter_halves_the_farthest_distance_that_random_leaves():
    rng = np.random.default_rng(0)
    cases = [Candidate(f"{n:03}", unit(*row)) for n, row in enumerate(rng.normal(size=(120, DIM)))]
    where = {case.id: case.descriptor for case in cases}

    def radius(name):
        chosen = np.stack([where[one] for one in ids(strategy(name).rank(Pool(cases, []), 40))])
        return max(np.linalg.norm(chosen - point, axis=1).min() for point in where.values())

    assert radius("kcenter") < radius("random")


def test_typiclust_takes_the_dense_cluster_first_and_its_middle():
    cases = [*around(CLUSTERS[0], 8, "few"), *around(CLUSTERS[1], 25, "many", seed=1)]
    edge = Candidate("many-edge", unit(0.5, 1))
    ranked = strategy("typiclust").rank(Pool([*cases, edge], []), 2)
    assert ranked[0].id.startswith("many")
    assert ranked[1].id.startswith("few")
    first = next(case for case in cases if case.id == ranked[0].id).descriptor
    distances = sorted(np.linalg.norm(case.descriptor - CLUSTERS[1]) for case in cases if case.id.startswith("many"))
    assert np.linalg.norm(first - CLUSTERS[1]) <= distances[12]


def test_probcover_covers_more_cases_than_random():
    sizes = (40, 20, 10, 5, 1, 1, 1, 1, 1, 1)
    directions = np.linalg.qr(np.random.default_rng(1).normal(size=(DIM, DIM)))[0]
    directions = np.concatenate([directions, -directions])[: len(sizes)]
    cases = [case for n, size in enumerate(sizes) for case in around(directions[n], size, f"{n}-", spread=0.01, seed=n)]
    chosen = {one.split("-")[0] for one in ids(strategy("probcover").rank(Pool(cases, []), 4))}
    assert chosen == {"0", "1", "2", "3"}


# ---- doubt


def test_entropy_is_not_misled_by_a_long_empty_volume():
    """Averaged over all slices the short one would win, summed over all the doubt of empty slices."""
    long = examination([0.0] * 300 + [0.8] * 5, [[0, 0]] * 300 + [[50, 0]] * 5)
    short = examination([0.4] * 8)
    haunted = examination([0.9] * 200 + [0.1] * 5, [[0, 0]] * 200 + [[50, 0]] * 5)
    cases = [Candidate("long", examination=long), Candidate("short", examination=short)]
    cases.append(Candidate("haunted", examination=haunted))
    assert ids(strategy("entropy").rank(Pool(cases, []), 3)) == ["long", "short", "haunted"]


def test_entropy_looks_at_suspicions_where_nothing_is_found():
    nothing = [[0, 0]] * 4
    missed = Candidate("missed", examination=examination([0, 0.7, 0, 0], nothing))
    clear = Candidate("clear", examination=examination([0, 0, 0, 0], nothing))
    found = Candidate("found", examination=examination([0.2] * 4))
    assert ids(strategy("entropy").rank(Pool([clear, found, missed], []), 3)) == ["missed", "found", "clear"]


def test_bald_goes_by_the_spread_and_not_by_the_doubt():
    unsure = Candidate("unsure", examination=examination([0.9] * 4), spread=np.full(4, 0.01))
    split = Candidate("split", examination=examination([0.3] * 4), spread=np.array([0, 0, 0.3, 0]))
    ranked = strategy("bald").rank(Pool([unsure, split], []), 2)
    assert ids(ranked) == ["split", "unsure"]
    assert ranked[0].slices[0] == 2


def test_disagreement_goes_by_the_heads():
    cases = [Candidate(name, disagreement=value) for name, value in [("a", 0.1), ("b", 0.6), ("c", np.nan)]]
    assert ids(strategy("disagreement").rank(Pool(cases, []), 3)) == ["b", "a", "c"]


def test_revisit_finds_the_shuffled_label():
    rng = np.random.default_rng(0)
    labelled = [Candidate(f"{n:02}", label_dice=value) for n, value in enumerate(rng.uniform(0.8, 0.95, 20))]
    labelled[13] = Candidate("13", label_dice=0.05)
    ranked = strategy("revisit").rank(Pool([Candidate("new")], labelled), 3)
    assert ranked[0].id == "13"
    assert "0.05" in ranked[0].reason


# ---- both


def two_classes(big, rare):
    """A case with one doubt about each class; 0: the class is not there."""
    areas = [[50, 4 if rare else 0]] * 3
    return examination([max(big, rare)] * 3, areas, [[big, rare]] * 3)


def pool_with_a_rare_class(labelled, seed=0):
    cases = [Candidate(f"big{n:02}", examination=two_classes(0.6, 0)) for n in range(40)]
    cases += [Candidate(f"rare{n}", examination=two_classes(0.1, 0.2)) for n in range(3)]
    return Pool(cases, [Candidate(f"l{n}") for n in range(labelled)], CLASSES, seed)


def test_claspe_serves_rare_classes_where_entropy_never_would():
    for labelled in (0, 6, 60):
        chosen = ids(strategy("claspe").rank(pool_with_a_rare_class(labelled), 3))
        assert sum(name.startswith("rare") for name in chosen) >= 1
    assert not any(name.startswith("rare") for name in ids(strategy("entropy").rank(pool_with_a_rare_class(0), 20)))


def test_claspe_asked_one_by_one_gives_every_class_its_turn():
    reasons = [strategy("claspe").rank(pool_with_a_rare_class(done))[0].reason for done in range(3)]
    assert any("rare" in reason for reason in reasons)
    assert any("big" in reason for reason in reasons)


def test_claspe_suggests_slices_of_the_class_whose_turn_it_is():
    areas = [[50, 0]] * 6 + [[50, 9]] * 2
    examined = examination([0.9] * 6 + [0.3] * 2, areas, [[0.9, 0]] * 6 + [[0.1, 0.5]] * 2)
    proposal = strategy("claspe").rank(Pool([Candidate("a", examination=examined)], [Candidate("l")], CLASSES))[0]
    assert "rare" in proposal.reason
    assert sorted(proposal.slices) == [6, 7]


def test_claspe_explores_first_and_exploits_later():
    doubts = np.linspace(0.3, 0.6, 30)
    cases = [Candidate(f"{n:02}", examination=examination([value])) for n, value in enumerate(doubts)]

    def firsts(labelled):
        done = [Candidate(f"l{n}") for n in range(labelled)]
        return {strategy("claspe").rank(Pool(cases, done, CLASSES, seed))[0].id for seed in range(20)}

    assert len(firsts(0)) > 8
    assert firsts(300) <= {"26", "27", "28", "29"}
    assert power(0) == 1
    assert power(300) == 100


def test_clue_takes_doubtful_cases_of_different_regions():
    sure, unsure = examination([0.01]), examination([0.8])
    cases = [
        Candidate(f"{kind}{case.id}", case.descriptor, examination=found)
        for n, (kind, found) in enumerate([("unsure-a", unsure), ("unsure-b", unsure), ("sure", sure)])
        for case in around(CLUSTERS[n], 12, str(n), spread=0.1, seed=n)
    ]
    ranked = ids(strategy("clue").rank(Pool(cases, []), 2))
    assert sorted(name[:8] for name in ranked) == ["unsure-a", "unsure-b"]


# ---- the default


def examined_pool(unlabelled, labelled, examined):
    cases = around(CLUSTERS[0], unlabelled, "c")
    known = [
        Candidate(case.id, case.descriptor, examination=examination([0.5]) if n < examined else None)
        for n, case in enumerate(cases)
    ]
    return Pool(known, around(CLUSTERS[1], labelled, "l"), CLASSES)


@given(candidates("l"), st.integers(1, 9))
def test_what_somebody_has_checked_is_revisited_last(labelled, count):
    ranked = ids(strategy("revisit").rank(Pool([], labelled, CLASSES), count))
    checked = {case.id: case.confirmed for case in labelled}
    assert [checked[case] for case in ranked] == sorted(checked.values())[: len(ranked)]


@settings(deadline=None)
@given(candidates("u"), candidates("l"), candidates("e"), st.integers(1, 9))
def test_auto_asks_for_new_patients_first(unlabelled, labelled, leased, count):
    """Images of one patient teach nearly the same."""
    by_patient = {case.id: (case.patient or case.id).lower() for case in [*unlabelled, *labelled, *leased]}
    chosen = Counter(by_patient[case.id] for case in [*labelled, *leased])
    waiting = {case.id for case in unlabelled}
    ranked = ids(strategy("auto").rank(Pool(unlabelled, labelled, CLASSES, leased=leased), count))
    assert len(ranked) == len(set(ranked)) == min(count, len(unlabelled))
    for case in ranked:
        assert chosen[by_patient[case]] == min(chosen[by_patient[other]] for other in waiting)
        chosen[by_patient[case]] += 1
        waiting.remove(case)


@pytest.mark.parametrize(
    ("unlabelled", "labelled", "examined", "like"),
    [
        (20, 0, 0, "typiclust"),
        (20, automatic.LABELLED, automatic.EXAMINED - 1, "typiclust"),
        (20, automatic.LABELLED - 1, 20, "typiclust"),
        (20, automatic.LABELLED, automatic.EXAMINED, "claspe"),
        (2, automatic.LABELLED, 2, "claspe"),
    ],
)
def test_auto_switches_by_itself_and_says_so(unlabelled, labelled, examined, like):
    pool = examined_pool(unlabelled, labelled, examined)
    ranked = strategy("auto").rank(pool, 2)
    assert ids(ranked) == ids(strategy(like).rank(pool, 2))
    assert ("By doubt" if like == "claspe" else "By variety") in ranked[0].reason
