import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from samadapt.data.cases import Case
from samadapt.errors import InputError
from samadapt.evaluation.split import nested_split

PATIENTS = st.lists(st.integers(1, 3), min_size=3, max_size=10)


def labelled(sizes):
    """Cases of patients 0, 1, ...; a patient of one case is one whose name is unknown."""
    path = Path("x")
    return [
        Case(f"{n}_{k}", path, path, patient=f"p{n}" if size > 1 else None)
        for n, size in enumerate(sizes)
        for k in range(size)
    ]


def owner(case):
    return case.id.split("_")[0]


@given(PATIENTS, st.integers(1, 4), st.integers(0, 9))
def test_training_sets_are_nested_and_of_other_patients_than_the_test_cases(sizes, testing, seed):
    cases = labelled(sizes)
    try:
        split = nested_split(cases, testing)
    except InputError:
        assert testing > sum(sizes) - max(sizes)  # else one patient is left, whichever comes last
        return
    assert len(split.testing) == testing
    sets = [[case.id for case in split.training(n, seed)] for n in range(1, len(split.available) + 1)]
    assert all(len(set(ids)) == len(ids) == n for n, ids in enumerate(sets, start=1))
    assert all(smaller == larger[: len(smaller)] for smaller, larger in itertools.pairwise(sets))
    assert not {owner(case) for case in split.testing} & {owner(case) for case in split.available}
    assert sorted(sets[-1]) == [case.id for case in split.available]


@given(PATIENTS, st.integers(1, 4), st.randoms())
def test_the_split_depends_on_the_cases_and_not_on_their_order(sizes, testing, random):
    cases = labelled(sizes)
    mixed = random.sample(cases, len(cases))
    try:
        split = nested_split(cases, testing)
    except InputError:
        return
    assert nested_split(mixed, testing) == split
    assert nested_split(mixed, testing).training(1, 3) == split.training(1, 3)


def test_the_seed_varies_what_is_labelled_and_not_what_is_tested():
    split = nested_split(labelled([1] * 12), 4)
    drawn = {tuple(case.id for case in split.training(2, seed)) for seed in range(6)}
    assert len(drawn) > 1


def test_too_few_cases_are_counted_in_the_message():
    with pytest.raises(InputError, match=r"4 labelled cases of 4 patients, which leaves none .* beside 4 test cases"):
        nested_split(labelled([1] * 4), 4)
    with pytest.raises(InputError, match=r"2 labelled cases beside the 2 test cases .* where 3 are needed"):
        nested_split(labelled([1] * 4), 2).training(3, 0)


def test_another_seed_draws_other_test_cases_and_the_same_the_same():
    cases = labelled([2] * 8)
    drawn = [[case.id for case in nested_split(cases, 4, seed).testing] for seed in range(6)]
    assert len({tuple(ids) for ids in drawn}) > 1
    assert drawn == [[case.id for case in nested_split(cases, 4, seed).testing] for seed in range(6)]
    for seed in range(6):
        split = nested_split(cases, 4, seed)
        assert not {owner(case) for case in split.testing} & {owner(case) for case in split.available}
