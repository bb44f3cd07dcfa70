"""Who is at which case."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from samadapt.activelearning import leases
from samadapt.activelearning.leases import Leases
from samadapt.errors import InputError

CASES = ["a", "b", "c"]


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(leases.time, "time", lambda: now[0])
    return now


@pytest.fixture
def held(tmp_path, clock):
    return Leases(tmp_path / "leases.json", seconds=60)


def test_nobody_gets_what_somebody_else_has(held):
    held.take("a", "ann")
    assert held.free(CASES, "bob") == ["b", "c"]
    assert held.free(CASES, None) == ["b", "c"]


def test_only_when_nothing_else_is_left_one_s_own_case_comes_back(held):
    held.take("a", "ann")
    held.take("b", "bob")
    assert held.free(CASES, "ann") == ["c"]
    held.take("c", None)
    assert held.free(CASES, "ann") == ["a"]
    assert held.free(CASES, "eve") == []
    assert held.free(CASES, None) == []  # viewers without a name cannot be told apart


def test_a_lease_ends_by_itself_or_with_the_label(held, clock):
    held.take("a", "ann")
    clock[0] += 30
    held.take("b", "ann")
    assert held.first_end() == 1060
    clock[0] += 31
    assert held.free(CASES, "bob") == ["a", "c"]
    held.end("b")
    assert held.free(CASES, "bob") == CASES
    assert held.first_end() is None


def test_a_restart_keeps_them(held, tmp_path):
    held.take("a", "ann")
    assert Leases(tmp_path / "leases.json", seconds=60).free(CASES, "bob") == ["b", "c"]


@pytest.mark.parametrize("text", ["[]", "{", '{"a": 1}', '{"a": {"client": null}}'])
def test_another_file_is_refused_by_name(tmp_path, text):
    path = tmp_path / "leases.json"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        Leases(path, 60)
    assert caught.value.where == str(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(st.lists(st.tuples(st.sampled_from([None, "ann", "bob"]), st.floats(0, 40)), max_size=12))
def test_two_people_never_have_the_same_case_at_once(tmp_path_factory, monkeypatch, asks):
    now = [0.0]
    monkeypatch.setattr(leases.time, "time", lambda: now[0])
    held = Leases(tmp_path_factory.mktemp("leases") / "leases.json", seconds=60)
    given_to: dict[str, tuple[str | None, float]] = {}
    for client, waited in asks:
        now[0] += waited
        for case in held.free(CASES, client)[:1]:
            other, since = given_to.get(case, (client, -1e9))
            assert now[0] - since >= 60 or (other == client and client is not None)
            held.take(case, client)
            given_to[case] = (client, now[0])
