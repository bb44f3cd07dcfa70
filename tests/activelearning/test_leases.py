"""Who is at which case."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from samadapt.activelearning import leases
from samadapt.activelearning.leases import Leases, somebody_at
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
    assert held.free(CASES, None) == ["c"]


@pytest.mark.parametrize("client", ["ann", None, somebody_at("10.0.0.7")])
def test_a_lone_person_who_asks_on_goes_round(held, clock, client):
    given_to = []
    for _ in range(7):
        clock[0] += 1
        given_to.append(held.free(CASES, client)[0])
        held.take(given_to[-1], client)
    assert given_to == [*CASES, *CASES, "a"]


@pytest.mark.parametrize("client", [None, somebody_at("10.0.0.7")])
def test_who_has_no_name_keeps_only_the_last_case_from_others(held, clock, client):
    for case in CASES:
        clock[0] += 1
        held.take(case, client)
    assert held.free(CASES, "ann") == ["a", "b"]
    held.take("a", "ann")
    assert held.free(CASES, "bob") == ["b"]
    held.take("b", "bob")
    assert held.free(CASES, "eve") == []
    assert held.free(CASES, somebody_at("10.0.0.8")) == []


def test_who_has_a_name_keeps_all_cases_from_others(held, clock):
    for case in CASES:
        clock[0] += 1
        held.take(case, "ann")
    assert held.free(CASES, "bob") == []
    assert held.free(CASES, somebody_at("10.0.0.8")) == []


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


@pytest.mark.parametrize(("who", "renewed"), [("ann", True), (None, True), ("bob", False)])
def test_work_on_a_case_keeps_it(held, clock, who, renewed):
    held.take("a", "ann")
    clock[0] += 50
    held.renew("a", who)
    held.renew("b", "ann")
    clock[0] += 50
    assert held.held() == ({"a"} if renewed else set())
    if renewed:
        assert held.free(["a"], "bob") == []


def test_a_restart_keeps_them(held, tmp_path):
    held.take("a", "ann")
    assert Leases(tmp_path / "leases.json", seconds=60).free(CASES, "bob") == ["b", "c"]


def test_a_lease_that_has_ended_stays_so_with_other_settings(held, clock, tmp_path):
    held.take("a", "ann")
    clock[0] += 59
    assert Leases(tmp_path / "leases.json", seconds=600).held() == {"a"}
    clock[0] += 2
    assert Leases(tmp_path / "leases.json", seconds=600).held() == set()


def test_leases_of_former_days_are_read(clock, tmp_path):
    (tmp_path / "leases.json").write_text('{"a": {"client": "ann", "since": 990.0}}')
    assert Leases(tmp_path / "leases.json", seconds=60).held() == {"a"}
    clock[0] += 51
    assert Leases(tmp_path / "leases.json", seconds=60).held() == set()


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
    at: dict[str | None, str] = {}
    for client, waited in asks:
        now[0] += waited
        for case in held.free(CASES, client)[:1]:
            other, since = given_to.get(case, (client, -1e9))
            left = other is None and at.get(other) != case
            assert now[0] - since >= 60 - 1e-6 or other == client or left
            held.take(case, client)
            given_to[case] = (client, now[0])
            at[client] = case
