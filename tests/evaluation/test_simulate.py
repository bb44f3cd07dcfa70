"""The simulation as people meet it: what runs, what is kept, what the report says."""

import csv
import json
import re
import sys
from html.parser import HTMLParser

import pytest

from samadapt import cli
from samadapt.data.labels import LabelMap
from samadapt.errors import ConfigError, InputError
from samadapt.evaluation import simulate_pool
from samadapt.evaluation.simulate import Simulation, simulate
from samadapt.evaluation.simulate_report import areas_of, stretches_of
from samadapt.evaluation.simulate_run import Protocol
from tiny import write_studies

pytestmark = pytest.mark.usefixtures("one_thread")

ODD = LabelMap(("bright <b>$x_1$</b>", '_dark "&" side'))
PROTOCOL = Protocol(rounds=3, per_round=1, slices_per_case=2, steps=2, copies=0, annotator="robot")


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setattr(
        simulate_pool, "names", lambda: ["auto", "random", "random_fg", "entropy", "epistemic", "first"]
    )


@pytest.fixture
def studies(tmp_path):
    write_studies(tmp_path / "studies", 6)
    return tmp_path / "studies"


def simulation(studies, **changes):
    whole = {
        "studies": studies,
        "labels": ODD,
        "strategies": ("random", "entropy"),
        "recipes": ("autosam_linear",),
        "units": ("volumes",),
        "seeds": (0, 1),
        "testing": 2,
        "pool": None,
        "protocol": PROTOCOL,
        "settings": {"image_size": "64"},
    }
    return Simulation(**(whole | changes))


def silent(text, done, total):
    """Progress for nobody."""


class Runs:
    """Stands in for whole runs: notes what ran; ``entropy`` is better than the others; ``broken`` ones fail."""

    def __init__(self, broken=()):
        self.jobs = []
        self.broken = broken

    @property
    def done(self):
        return [(job.recipe, job.strategy, job.unit, job.seed) for job in self.jobs]

    def __call__(self, job, folder, tell):
        self.jobs.append(job)
        tell(0.5)
        if job.strategy in self.broken:
            return {"failed": "no <memory> left", "peak_gib": 0.1, "wall_seconds": 60.0}
        rounds = []
        for number, case in enumerate(job.pool[: job.protocol.rounds], start=1):
            dice = 0.1 * number + (0.4 if job.strategy == "entropy" else 0.2) + 0.01 * job.seed
            classes = dict(zip(job.labels, (dice + 0.1, dice - 0.1), strict=True))
            slices = None if job.unit == "volumes" else [1, 2]
            rounds.append(
                {
                    "chosen": [{"id": case, "slices": slices, "reason": f"{case} is <odd>"}],
                    "volumes": number,
                    "slices": 6 * number,
                    "clicks": 10.5 * number,
                    "outlines": 0.0,
                    "seconds": 60.0 * number,
                    "dice": dice,
                    "by_class": classes,
                    "cases": dict.fromkeys(job.testing, classes),
                    "compute": {"choosing": 1.0, "annotator": 2.0, "training": 3.0, "testing": 4.0},
                }
            )
        return {"rounds": rounds, "peak_gib": 0.5, "wall_seconds": 600.0}


def test_every_run_is_done_once_and_a_later_call_does_what_is_missing(studies, tmp_path):
    runs, seen = Runs(), []
    simulate(simulation(studies, strategies=("random",)), tmp_path / "out", silent, runs)
    assert runs.done == [("autosam_linear", "random", "volumes", seed) for seed in (0, 1)]
    later = Runs()
    simulate(simulation(studies), tmp_path / "out", lambda *told: seen.append(told), later)
    assert {strategy for _, strategy, _, _ in later.done} == {"entropy"}
    assert seen[0][1:] == (2, 4)
    assert seen[1][1:] == (2.5, 4)
    assert re.search(r"3 of 4: entropy, autosam_linear, seed 0; about 20 min left", seen[0][0])
    assert "about 15 min left" in seen[1][0]
    assert seen[-1][1:] == (4, 4)
    third = Runs()
    simulate(simulation(studies.rename(tmp_path / "moved")), tmp_path / "out", silent, third)
    assert third.done == []


def test_an_interruption_loses_one_run_and_leaves_a_report(studies, tmp_path):
    runs = Runs()

    def interrupted(job, folder, tell):
        if len(runs.done) == 2:
            raise KeyboardInterrupt
        return runs(job, folder, tell)

    with pytest.raises(KeyboardInterrupt):
        simulate(simulation(studies), tmp_path / "out", silent, interrupted)
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["results"]) == 2
    assert "Summary" in (tmp_path / "out" / "report.html").read_text()
    later = Runs()
    simulate(simulation(studies), tmp_path / "out", silent, later)
    assert len(later.done) == 2
    assert not set(later.done) & set(runs.done)


def test_an_interruption_of_the_first_run_leaves_a_report_and_what_it_had_done(studies, tmp_path):
    def interrupted(job, folder, tell):
        (folder / "rounds.json").write_text("[]")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(simulation(studies), tmp_path / "out", silent, interrupted)
    assert "Nothing was measured yet" in (tmp_path / "out" / "report.html").read_text()
    found = []

    def later(job, folder, tell):
        found.append((folder / "rounds.json").is_file())
        return Runs()(job, folder, tell)

    simulate(simulation(studies), tmp_path / "out", silent, later)
    assert found == [True, False, False, False]


def test_all_strategies_get_the_same_cases_and_seeds_draw_others(studies, tmp_path):
    runs = Runs()
    simulate(simulation(studies, pool=3), tmp_path / "out", silent, runs)
    by_seed = {seed: {(*job.pool, *job.testing) for job in runs.jobs if job.seed == seed} for seed in (0, 1)}
    assert all(len(found) == 1 for found in by_seed.values())
    assert by_seed[0] != by_seed[1]
    assert all(len(job.pool) == 3 and not set(job.pool) & set(job.testing) for job in runs.jobs)


def test_scattered_slices_need_no_strategy(studies, tmp_path):
    runs = Runs()
    simulate(simulation(studies, units=("volumes", "slices", "scattered")), tmp_path / "out", silent, runs)
    arms = [(strategy, unit) for _, strategy, unit, seed in runs.done if seed == 0]
    assert sorted(arms) == [
        ("", "scattered"),
        ("entropy", "slices"),
        ("entropy", "volumes"),
        ("random", "slices"),
        ("random", "volumes"),
    ]


def test_a_failed_run_is_reported_the_others_stand_and_it_is_tried_again(studies, tmp_path):
    report = simulate(simulation(studies), tmp_path / "out", silent, Runs(broken=("entropy",)))
    assert [row.arm for row in report.rows] == ["random"]
    assert [(one["arm"], one["seed"]) for one in report.failed] == [("entropy", 0), ("entropy", 1)]
    assert "no &lt;memory&gt; left" in report.page.read_text()
    again = Runs()
    mended = simulate(simulation(studies), tmp_path / "out", silent, again)
    assert {strategy for _, strategy, _, _ in again.done} == {"entropy"}
    assert mended.failed == []
    assert "Failed runs" not in mended.page.read_text()


def test_the_summary_puts_the_best_first_and_says_who_won(studies, tmp_path):
    report = simulate(simulation(studies), tmp_path / "out", silent, Runs())
    assert [row.arm for row in report.rows] == ["entropy", "random"]
    best = report.rows[0]
    assert best.areas["slices"].mean == pytest.approx((0.6 + 0.61) / 2)  # 0.5, 0.6, 0.7 at 6, 12, 18 slices
    assert best.final.mean == pytest.approx((0.7 + 0.71) / 2)
    assert (best.slices, best.volumes, best.clicks, best.minutes) == (18, 3, 31.5, 3)
    (duel,) = report.duels["autosam_linear"]
    assert (duel.first, duel.second, duel.wins, duel.losses) == ("random", "entropy", 0, 2)
    assert duel.difference == pytest.approx(-0.2)


def record(strategy, seed, budget, dice):
    rounds = [
        {"dice": d, **dict.fromkeys(("slices", "volumes", "clicks", "seconds"), b)}
        for b, d in zip(budget, dice, strict=True)
    ]
    return {"settings": {"recipe": "r", "strategy": strategy, "unit": "volumes", "seed": seed}, "rounds": rounds}


def test_areas_are_taken_where_all_of_a_seed_reach():
    runs = [
        record("short", 0, [10, 20], [0.4, 0.6]),
        record("long", 0, [5, 15, 35], [0.0, 0.2, 0.6]),
        record("long", 1, [5, 15], [0.2, 0.4]),
    ]
    found = areas_of(runs)["slices"]
    assert found["short"][0] == pytest.approx(0.5)
    # from 10 (0.1) by 15 (0.2) to 20 (0.3)
    assert found["long"] == pytest.approx({0: 0.2, 1: 0.3})
    assert stretches_of(runs)["slices"] == {0: (10, 20), 1: (5, 15)}


def test_the_page_says_over_which_part_of_the_budget_it_compares(studies, tmp_path):
    runs = Runs()

    def early(job, folder, tell):
        result = runs(job, folder, tell)
        return {**result, "rounds": result["rounds"][: 2 if job.strategy == "first" else 3]}

    strategies = ("random", "entropy", "first")
    report = simulate(simulation(studies, strategies=strategies), tmp_path / "out", silent, early)
    stretches = {(duel.first, duel.second): duel.stretch for duel in report.duels["autosam_linear"]}
    assert stretches == {("random", "entropy"): (6, 18), ("random", "first"): (6, 12), ("entropy", "first"): (6, 12)}
    assert report.stretches["autosam_linear"]["slices"] == (6, 12)
    text = " ".join(re.sub(r"<[^>]+>", " ", report.page.read_text(encoding="utf-8")).split())
    assert "labelled slices 6 to 12" in text
    assert "annotation, minutes 1 to 2" in text
    assert "random entropy 6 to 18 0 2 -0.2000 - -" in text  # two seeds: no p-value
    assert text.count("6 to 18") == 1


def test_the_sheet_has_one_row_for_each_run_round_and_class(studies, tmp_path):
    report = simulate(simulation(studies), tmp_path / "out", silent, Runs())
    with open(report.sheet, newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == 2 * 2 * 3 * 2  # strategies, seeds, rounds, classes
    assert len({(r["strategy"], r["seed"], r["round"], r["class"]) for r in rows}) == len(rows)
    last = next(r for r in rows if r["strategy"] == "entropy" and r["seed"] == "1" and r["round"] == "3")
    assert (last["volumes"], last["slices"], last["clicks"], last["annotation_seconds"]) == ("3", "18", "31.5", "180.0")
    assert last["computation_seconds"] == "10.0"
    assert float(last["dice"]) == pytest.approx(0.81)


class Outside(HTMLParser):
    """Notes everything that a browser would fetch or run, and every text."""

    def __init__(self):
        super().__init__()
        self.found, self.pictures, self.texts, self.tags = [], [], [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "action"):
                (self.pictures if value.startswith("data:image/png;base64,") else self.found).append(value)

    def handle_data(self, data):
        self.texts.append(" ".join(data.split()))


def test_the_page_needs_nothing_outside_it_and_lists_every_run(studies, tmp_path):
    report = simulate(simulation(studies, units=("volumes", "slices")), tmp_path / "out", silent, Runs())
    page = Outside()
    text = report.page.read_text(encoding="utf-8")
    page.feed(text)
    assert page.found == []
    assert not page.tags & {"script", "link", "iframe", "b"}
    assert not re.search(r"https?://|url\(|@import", text)
    # a chart for each of four budgets; a case for each of three rounds of four ways to choose
    assert len(page.pictures) == 4 + 3 * 4
    assert set(ODD.names) <= set(page.texts)
    for name in ("random", "entropy", "random, slices", "entropy, slices"):
        for seed in (0, 1):
            assert f"autosam_linear, {name}, seed {seed}:" in page.texts
    assert any("is <odd>" in part for part in page.texts)
    assert report.curves.read_bytes().startswith(b"\x89PNG")


@pytest.mark.requires_browser
def test_the_page_opens_in_a_browser_without_a_network(studies, tmp_path, offline):
    report = simulate(simulation(studies), tmp_path / "out", silent, Runs())
    offline.page.goto(report.page.as_uri())
    assert offline.page.get_by_text("autosam_linear, entropy, seed 1:").count() == 1
    pictures = offline.pictures()
    assert pictures
    assert all(pictures)
    assert offline.complaints == []


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"settings": {"image_size": "96"}}, "other settings"),
        ({"labels": LabelMap(("bright", "dark"))}, "other labels"),
        ({"testing": 1}, "other number of test cases"),
        ({"pool": 2}, "other size of the pool"),
        ({"protocol": Protocol(3, 1, 2, 5, 0, "robot")}, "other protocol"),
    ],
)
def test_a_folder_with_another_simulation_is_left_alone(studies, tmp_path, changes, part):
    simulate(simulation(studies), tmp_path / "out", silent, Runs())
    before = (tmp_path / "out" / "results.json").read_bytes()
    runs = Runs()
    with pytest.raises(ConfigError, match=part):
        simulate(simulation(studies, **changes), tmp_path / "out", silent, runs)
    assert runs.done == []
    assert (tmp_path / "out" / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"strategies": ("entrpy",)}, "--strategies.*Did you mean 'entropy'"),
        ({"recipes": ("autosam_lin",)}, "--recipes.*Did you mean 'autosam_linear'"),
        ({"units": ("volume",)}, "--unit.*Did you mean 'volumes'"),
        ({"protocol": Protocol(3, 1, 2, 5, 0, "robots")}, "--annotator.*Did you mean 'robot'"),
        ({"strategies": ()}, "--strategies.*comma list"),
        ({"seeds": ()}, "--seeds.*comma list"),
    ],
)
def test_what_cannot_be_simulated_is_refused(studies, changes, part):
    with pytest.raises(ConfigError, match=part):
        simulation(studies, **changes)


@pytest.mark.parametrize(("changes", "part"), [({"pool": 5}, "where 5 are needed"), ({"testing": 6}, "leaves none")])
def test_too_few_labelled_cases_are_refused_before_any_run(studies, tmp_path, changes, part):
    runs = Runs()
    with pytest.raises(InputError, match=part):
        simulate(simulation(studies, **changes), tmp_path / "out", silent, runs)
    assert runs.done == []


@pytest.fixture
def run(monkeypatch, capsys, studies, tmp_path):
    """``samadapt simulate`` with a budget of seconds: (exit code, standard output, standard error)."""

    def call(*words):
        fixed = ["simulate", studies, "--labels", "bright,dark", "--seeds", "1", "--test", "2", "--rounds", "2"]
        quick = ["--recipes", "autosam_linear", "--image-size", "64", "--steps", "2", "--output", tmp_path / "out"]
        monkeypatch.setattr(sys, "argv", ["samadapt", *map(str, [*fixed, *quick, *words])])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return (ended.value.code or 0, *capsys.readouterr())

    return call


def test_a_simulation_from_the_command_line(run, tmp_path):
    """The default strategy, in a process of its own, with the robot clicking on the plain model."""
    code, out, err = run("--strategies", "auto", "--unit", "slices", "--json")
    assert code == 0, err
    value = json.loads(out)
    (row,) = value["rows"]
    assert (row["arm"], row["slices"], value["failed"]) == ("auto, slices", 12, [])
    assert row["clicks"] > 0
    (result,) = json.loads((tmp_path / "out" / "results.json").read_text())["results"].values()
    assert result["peak_gib"] > 0.2
    assert all(one["reason"] for done in result["rounds"] for one in done["chosen"])
    assert "1 of 1: auto, slices, autosam_linear, seed 1" in err


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--strategies", "entrpy"], "Did you mean 'entropy'"),
        (["--seeds", "1,two"], "'two' is no whole number"),
        (["--conf", "seed=3"], "option of its own"),
        (["--conf", "planes=all"], "cannot be simulated"),
        (["--image-size", "100"], "multiple of 32"),
        (["--unit", "pixels"], "Valid: volumes, slices, scattered"),
        (["--test", "6"], "leaves none to learn from"),
    ],
)
def test_wrong_words_are_one_message_and_an_exit_code(run, tmp_path, words, part):
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert part in err
    assert not (tmp_path / "out").exists()
