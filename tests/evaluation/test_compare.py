"""The comparison as people meet it: what runs, what is kept, what the report says."""

import csv
import json
import math
import re
import sys
from html.parser import HTMLParser

import nibabel
import numpy as np
import pytest

from samadapt import cli, recipes
from samadapt.data.labels import LabelMap
from samadapt.data.volume import read_volume, write_mask
from samadapt.errors import ConfigError, InputError, StateError
from samadapt.evaluation import compare_run
from samadapt.evaluation.compare import Comparison, compare
from tiny import write_studies

pytestmark = pytest.mark.usefixtures("one_thread")

ODD = LabelMap(("bright <b>$x_1$</b>", '_dark "&" side'))


@pytest.fixture
def studies(tmp_path):
    write_studies(tmp_path / "studies", 6)
    return tmp_path / "studies"


def comparison(studies, **changes):
    settings = {"max_train_minutes": "0.05", "image_size": "64", "max_steps": "2"}
    whole = {
        "studies": studies,
        "labels": ODD,
        "recipes": ("lora", "unet"),
        "labelled": (1, 3),
        "seeds": (0, 1),
        "testing": 3,
        "settings": settings,
    }
    return Comparison(**(whole | changes))


def silent(text, done, total):
    """Progress for nobody."""


class Runs:
    """Stands in for trainings: notes what ran, and leaves empty masks; a recipe of ``broken`` fails."""

    def __init__(self, broken=()):
        self.done = []
        self.broken = broken

    def __call__(self, job, folder, tell):
        self.done.append((job.recipe, len(job.training), job.seed))
        tell(0.5)
        if job.recipe in self.broken:
            return {"failed": "no <memory> left", "peak_gib": 0.1, "wall_seconds": 1.0}
        for case in job.testing:
            volume = read_volume(f"{job.studies}/{case}.nii.gz")
            write_mask(folder / "masks" / f"{case}.nii.gz", np.zeros(volume.geometry.shape, np.uint8), volume.geometry)
        dice = 0.5 + 0.1 * len(job.training)
        pairs = [{"dice": dice, "hd95_mm": 4.0}, {"dice": 0.0, "hd95_mm": None}]
        return {
            "trainable_parameters": 1234,
            "file_bytes": 5_000_000,
            "seconds_per_step": 0.25,
            "steps": 2,
            "seconds": 3.0,
            "rounds": [{"round": n, "step": n, "loss": 1 / n, "dice": {"a": 0.1 * n, "b": None}} for n in (1, 2)],
            "input": [64, 64],
            "backbone": "lite_medsam",
            "trained_on": job.training,
            "held_out": [],
            "remarks": ["case_0: 'tumor' is <no> label"],
            "cases": {case: dict(zip(job.labels, pairs, strict=True)) for case in job.testing},
            "peak_gib": 0.5,
            "wall_seconds": 5.0,
        }


def test_every_run_is_done_once_and_a_later_call_does_what_is_missing(studies, tmp_path):
    runs, seen = Runs(), []
    compare(comparison(studies, recipes=("lora",)), tmp_path / "out", silent, runs)
    assert sorted(runs.done) == [("lora", 1, 0), ("lora", 1, 1), ("lora", 3, 0), ("lora", 3, 1)]
    later = Runs()
    report = compare(comparison(studies), tmp_path / "out", lambda *told: seen.append(told), later)
    assert {recipe for recipe, _, _ in later.done} == {"unet"}
    assert len(report.rows) == 4
    assert seen[0][1:] == (4, 8)
    assert seen[1][1:] == (4.5, 8)
    assert re.search(r"5 of 8: unet, 1 case, seed 0; about \d+ min left", seen[0][0])
    assert seen[-1][1:] == (8, 8)
    third = Runs()
    compare(comparison(studies.rename(tmp_path / "moved")), tmp_path / "out", silent, third)
    assert third.done == []


def test_an_interruption_loses_one_run_and_leaves_a_report(studies, tmp_path):
    runs = Runs()

    def interrupted(job, folder, tell):
        if len(runs.done) == 2:
            raise KeyboardInterrupt
        return runs(job, folder, tell)

    with pytest.raises(KeyboardInterrupt):
        compare(comparison(studies), tmp_path / "out", silent, interrupted)
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["results"]) == 2
    assert "Summary" in (tmp_path / "out" / "report.html").read_text()
    later = Runs()
    compare(comparison(studies), tmp_path / "out", silent, later)
    assert len(later.done) == 6
    assert not set(later.done) & set(runs.done)


def test_an_interruption_of_the_first_run_leaves_a_report_too(studies, tmp_path):
    def interrupted(job, folder, tell):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(comparison(studies), tmp_path / "out", silent, interrupted)
    assert "Nothing was measured yet" in (tmp_path / "out" / "report.html").read_text()


def test_a_failed_run_is_reported_the_others_stand_and_it_is_tried_again(studies, tmp_path):
    report = compare(comparison(studies), tmp_path / "out", silent, Runs(broken=("unet",)))
    assert [row.recipe for row in report.rows] == ["lora", "lora"]
    assert len(report.failed) == 4
    assert report.failed[0] == {"recipe": "unet", "labelled": 1, "seed": 0, "why": "no <memory> left"}
    assert "no &lt;memory&gt; left" in report.page.read_text()
    again = Runs()
    mended = compare(comparison(studies), tmp_path / "out", silent, again)
    assert {recipe for recipe, _, _ in again.done} == {"unet"}
    assert mended.failed == []
    assert "Failed runs" not in mended.page.read_text()


def test_all_recipes_get_the_same_cases_and_more_labels_contain_fewer(studies, tmp_path):
    jobs = {}

    def note(job, folder, tell):
        jobs[job.recipe, len(job.training), job.seed] = job
        return Runs()(job, folder, tell)

    compare(comparison(studies), tmp_path / "out", silent, note)
    assert len({tuple(job.testing) for job in jobs.values()}) == 1
    for seed in (0, 1):
        for count in (1, 3):
            assert jobs["lora", count, seed].training == jobs["unet", count, seed].training
        assert set(jobs["lora", 1, seed].training) < set(jobs["lora", 3, seed].training)
    assert all(not set(job.training) & set(job.testing) for job in jobs.values())
    assert recipes.configured(jobs["lora", 1, 1].config).seed == 1


def test_the_sheet_has_one_row_for_each_run_case_and_class(studies, tmp_path):
    report = compare(comparison(studies), tmp_path / "out", silent, Runs())
    with open(report.sheet, newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == 2 * 2 * 2 * 3 * 2  # recipes, numbers of cases, seeds, test cases, classes
    keys = {(r["recipe"], r["labelled_cases"], r["seed"], r["test_case"], r["class"]) for r in rows}
    assert len(keys) == len(rows)
    assert {r["class"] for r in rows} == set(ODD.names)
    missed = [r for r in rows if r["class"] == ODD.names[1]]
    assert {(float(r["dice"]), r["hd95_mm"], r["missed"]) for r in missed} == {(0.0, "", "1")}
    assert {(r["steps"], r["training_seconds"], r["peak_gib"]) for r in rows} == {("2", "3.0", "0.5")}


def test_the_summary_means_classes_and_seeds_then_cases(studies, tmp_path):
    report = compare(comparison(studies), tmp_path / "out", silent, Runs())
    one, three = (row for row in report.rows if row.recipe == "lora")
    assert (one.labelled, three.labelled) == (1, 3)
    assert one.scores.dice.mean == pytest.approx(0.6 / 2)
    assert three.by_class[ODD.names[0]].dice.mean == pytest.approx(0.8)
    assert (one.scores.hd95.mean, one.scores.defined, one.scores.missed) == (4.0, 6, 6)
    assert math.isnan(one.by_class[ODD.names[1]].hd95.mean)


def test_two_calls_do_not_measure_into_one_folder(studies, tmp_path):
    def second_call(job, folder, tell):
        with pytest.raises(StateError, match="another call"):
            compare(comparison(studies), tmp_path / "out", silent, Runs())
        return Runs()(job, folder, tell)

    assert compare(comparison(studies), tmp_path / "out", silent, second_call).rows
    compare(comparison(studies), tmp_path / "out", silent, Runs())


def test_a_file_in_place_of_the_folder_is_refused(studies, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ConfigError, match="that is a file"):
        compare(comparison(studies), tmp_path / "out", silent, Runs())
    assert (tmp_path / "out").read_text() == "mine"


def test_too_few_steps_to_judge_by_are_told(studies, tmp_path):
    def long_enough(job, folder, tell):
        return {**Runs()(job, folder, tell), "steps": 2 if (job.recipe, len(job.training)) == ("unet", 3) else 500}

    report = compare(comparison(studies), tmp_path / "out", silent, long_enough)
    (remark,) = report.remarks
    assert "unet with 3 (2)" in remark
    assert "lora" not in remark
    assert remark.split(":")[0] in report.page.read_text()
    assert compare(comparison(studies, recipes=("lora",)), tmp_path / "lora", silent, long_enough).remarks == []


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
        self.texts.append(data.strip())


def test_the_page_needs_nothing_outside_it_and_shows_names_as_they_are(studies, tmp_path):
    report = compare(comparison(studies), tmp_path / "out", silent, Runs())
    page = Outside()
    text = report.page.read_text(encoding="utf-8")
    page.feed(text)
    assert page.found == []
    assert not page.tags & {"script", "link", "iframe", "b"}
    assert not re.search(r"https?://|url\(|@import", text)
    # a chart of Dice, learning curves for 1 and 3 cases; best, median and worst with image, truth and two recipes
    assert len(page.pictures) == 3 + 3 * 4
    assert set(ODD.names) <= set(page.texts)
    assert "case_0: 'tumor' is <no> label" in page.texts
    assert all(any(case in part for part in page.texts) for case in ("case_0", "case_3"))


@pytest.mark.requires_browser
def test_the_page_opens_in_a_browser_without_a_network(studies, tmp_path, offline):
    report = compare(comparison(studies), tmp_path / "out", silent, Runs())
    offline.page.goto(report.page.as_uri())
    pictures = offline.pictures()
    assert pictures
    assert all(pictures)
    assert offline.complaints == []


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"settings": {"max_train_minutes": "2", "image_size": "64", "max_steps": "2"}}, "other settings"),
        ({"labels": LabelMap(("bright", "dark"))}, "other labels"),
        ({"testing": 1}, "other test cases"),
    ],
)
def test_a_folder_with_another_comparison_is_left_alone(studies, tmp_path, changes, part):
    compare(comparison(studies), tmp_path / "out", silent, Runs())
    before = (tmp_path / "out" / "results.json").read_bytes()
    runs = Runs()
    with pytest.raises(ConfigError, match=part):
        compare(comparison(studies, **changes), tmp_path / "out", silent, runs)
    assert runs.done == []
    assert (tmp_path / "out" / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"recipes": ("lora_lat",)}, "Did you mean 'lora_late'"),
        ({"recipes": ("unet_4d",)}, "Did you mean 'unet_[23]d'"),
        ({"recipes": ()}, "--recipes"),
        ({"labelled": (0, 1)}, "--cases"),
        ({"seeds": ()}, "--seeds"),
    ],
)
def test_what_cannot_be_compared_is_refused(studies, changes, part):
    with pytest.raises(ConfigError, match=part):
        comparison(studies, **changes)


def test_too_few_labels_and_settings_that_do_not_fit_are_refused_before_any_run(studies, tmp_path):
    runs = Runs()
    with pytest.raises(InputError, match="where 5 are needed"):
        compare(comparison(studies, labelled=(1, 5)), tmp_path / "out", silent, runs)
    settings = {"backbone": "lite_medsam"}
    with pytest.raises(ConfigError, match="belongs to mobile_sam"):
        compare(
            comparison(studies, recipes=("lora", "ft/mobile_sam/decoder/lora"), settings=settings),
            tmp_path / "out",
            silent,
            runs,
        )
    assert runs.done == []


def test_pace_is_the_median_over_steps():
    pace = compare_run.Pace()
    for step, seconds in ((2, 1.0), (2, 9.0), (4, 2.0), (14, 7.0), (15, 27.0)):
        pace.see(step, seconds)
    assert pace.seconds_per_step() == pytest.approx(0.5)
    assert math.isnan(compare_run.Pace().seconds_per_step())


def test_metrics_of_a_case_are_in_millimetres_and_say_what_is_missing(studies, tmp_path):
    from samadapt.data.cases import find_cases

    cases, labels = find_cases(studies)[:1], LabelMap(("bright", "dark"))
    nothing = compare_run.score(lambda v: np.zeros(v.geometry.shape, np.uint8), cases, labels, tmp_path)
    assert nothing["case_0"]["bright"]["dice"] == 0
    assert math.isnan(nothing["case_0"]["bright"]["hd95_mm"])
    truth = np.asarray(read_volume(cases[0].label).array[0], np.uint8)
    shifted = compare_run.score(lambda v: np.roll(truth, 1, axis=2), cases, labels, tmp_path)
    assert shifted["case_0"]["dark"]["hd95_mm"] == pytest.approx(3.0)  # one slice of 3 mm
    assert read_volume(tmp_path / "case_0.nii.gz").geometry.shape == truth.shape


@pytest.fixture
def run(monkeypatch, capsys, studies, tmp_path):
    """``samadapt compare`` with a budget of seconds: (exit code, standard output, standard error)."""

    def call(*words):
        cases = ["--labels", "bright,dark", "--cases", "1", "--seeds", "1", "--test", "2"]
        quick = ["--minutes", "0.05", "--image-size", "64", "--conf", "max_steps=2"]
        fixed = ["compare", studies, *cases, *quick, "--output", tmp_path / "out"]
        monkeypatch.setattr(sys, "argv", ["samadapt", *map(str, [*fixed, *words])])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return (ended.value.code or 0, *capsys.readouterr())

    return call


def test_a_comparison_from_the_command_line(run, tmp_path):
    """A recipe and a U-Net, each in a process of its own."""
    code, out, err = run("--recipes", "lora_late,unet", "--json")
    assert code == 0, err
    value = json.loads(out)
    rows = {row["recipe"]: row for row in value["rows"]}
    assert rows.keys() == {"lora_late", "unet"}
    assert value["failed"] == []
    assert all(row["peak_gib"] > 0.2 and row["seconds_per_step"] > 0 for row in rows.values())
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    ours = next(r for r in results.values() if r["settings"]["recipe"] == "lora_late")
    assert len(ours["trained_on"]) == 1
    assert 1 <= ours["rounds"][-1]["step"] == ours["steps"] <= 2
    assert "2 of 2: unet, 1 case, seed 1" in err


def test_a_run_that_cannot_be_done_says_why(run, studies):
    """Single slices for a 3D network: the U-Net's own refusal, from its own process."""
    for path in studies.glob("**/case_*.nii.gz"):
        image = nibabel.load(path)
        nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj)[:, :, 2:3], image.affine), path)
    code, out, _ = run("--recipes", "unet_3d")
    assert code == 1
    assert "failed: unet_3d, 1 labelled, seed 1" in out
    assert "several slices" in out


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--recipes", "lora_lat"], "Did you mean 'lora_late'"),
        (["--recipes", "lora", "--cases", "1,four"], "'four' is no whole number"),
        (["--recipes", "lora", "--conf", "seed=3"], "option of its own"),
        (["--recipes", "lora", "--image-size", "100"], "multiple of 32"),
        (["--recipes", "lora", "--test", "6"], "leaves none to learn from"),
        (["--recipes", "lora", "--cases", "1,5"], "where 5 are needed"),
    ],
)
def test_wrong_words_are_one_message_and_an_exit_code(run, tmp_path, words, part):
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert part in err
    assert not (tmp_path / "out").exists()
