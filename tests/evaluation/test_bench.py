import json
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from samadapt.data.cases import Case, find_cases
from samadapt.data.labels import LabelMap
from samadapt.errors import InputError
from samadapt.evaluation import bench, bench_report
from samadapt.evaluation.records import machine


def case(name, patient, path, labelled=True):
    return Case(name, path / name, path / name if labelled else None, patient=patient)


@given(st.lists(st.integers(1, 3), min_size=5, max_size=12), st.integers(1, 3), st.integers(1, 2), st.integers(0, 99))
def test_split_is_by_patient_and_disjoint(sizes, training, testing, seed):
    path = bench.Path("images")
    cases = [case(f"{n}_{k}", f"patient{n}", path) for n, size in enumerate(sizes) for k in range(size)]
    split = bench.split_by_patient(cases, training, testing, seed)
    taught, tested = ({case.patient for case in part} for part in (split.training, split.testing))
    assert not taught & tested
    assert (len(taught), len(tested)) == (training, testing)
    for part, patients in ((split.training, taught), (split.testing, tested)):
        assert {c.id for c in part} == {c.id for c in cases if c.patient in patients}
    assert bench.split_by_patient(cases[::-1], training, testing, seed) == split


def test_split_needs_enough_labelled_patients(tmp_path):
    cases = [case("a", None, tmp_path), case("b", None, tmp_path), case("c", None, tmp_path, labelled=False)]
    assert len(bench.split_by_patient(cases, 1, 1).testing) == 1
    with pytest.raises(InputError, match="2 labelled patients, where 2 \\+ 1 are needed"):
        bench.split_by_patient(cases, 2, 1)


def test_a_later_run_measures_only_what_is_missing(tmp_path):
    path, calls = tmp_path / "bench.json", []

    def run():
        calls.append(1)
        return {"seconds": len(calls)}

    first = bench.Records(path, "bench").measure("acdc/ours", {"minutes": 4}, run)
    resumed = bench.Records(path, "bench")
    assert resumed.measure("acdc/ours", {"minutes": 4}, run) == first
    assert len(calls) == 1
    assert resumed.measure("acdc/ours", {"minutes": 5}, run)["seconds"] == 2
    resumed.measure("busi/ours", {}, run)
    again = bench.Records(path, "bench", forget=["acdc"])
    assert again.get("acdc/ours") is None
    assert again.get("busi/ours")["seconds"] == 3
    measured_on = json.loads(path.read_text())["machine"]
    assert measured_on["cpu"]
    assert measured_on["cores"] >= 1


def test_a_broken_results_file_is_named(tmp_path):
    (tmp_path / "bench.json").write_text("{")
    with pytest.raises(InputError, match=r"bench\.json: not a file of results"):
        bench.Records(tmp_path / "bench.json", "bench")


@pytest.mark.parametrize("words", [["--only", "acdc,brats"], ["--minutes", "0"], ["--minutes", "x"]])
def test_wrong_arguments_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        bench.main(words)
    assert words[0] in capsys.readouterr().err


def test_clicks_come_after_the_sets_whose_models_they_use():
    assert bench._parts("clicks, busi,acdc") == ["acdc", "busi", "clicks"]


def test_a_target_is_one_class_or_all_as_one():
    truth = np.array([[[0, 1, 2, 3]]])
    ventricle, lesion = bench.TARGETS[0], bench.TARGETS[1]
    assert ventricle.mask(truth).tolist() == [[[False, False, False, True]]]
    assert lesion.mask(truth[..., :3]).tolist() == [[[False, True, True]]]


def test_clicks_are_measured_with_the_plain_and_with_the_adapted_model(tmp_path, monkeypatch, capsys):
    for folder, array in (("images", np.random.default_rng(0).random((9, 8, 5))), ("labels", np.zeros((9, 8, 5)))):
        array[3:6, 3:6, 2] = 3
        (tmp_path / "acdc_mr" / folder).mkdir(parents=True)
        for n in range(10):
            nibabel.save(nibabel.Nifti1Image(array, np.diag([1, 1, 5, 1])), tmp_path / f"acdc_mr/{folder}/{n}.nii.gz")
    asked = []

    def simulate(model, volume, truth, axis, index):
        asked.append((model.name, int(truth.sum()), axis, index))
        return [0.5, 0.6]

    def model(name):
        return SimpleNamespace(name=name, info=SimpleNamespace(image_size=64))

    monkeypatch.setattr(bench, "simulate_clicks", simulate)
    monkeypatch.setattr(bench.recipes, "build", lambda *_: model("plain"))
    monkeypatch.setattr(bench.AdaptedModel, "load", lambda path: model(path.name))
    monkeypatch.setattr(bench, "CLICKED_CASES", 2)
    records = bench.Records(tmp_path / "bench.json", "bench")
    bench.run_clicks(bench.TARGETS[0], tmp_path, tmp_path, records)
    assert "no adapted model of acdc yet" in capsys.readouterr().err
    records.measure("acdc/ours", {}, lambda: {"model": "v0001.safetensors"})
    bench.run_clicks(bench.TARGETS[0], tmp_path, tmp_path, records)
    assert asked == [("plain", 9, 2, 2)] * 2 + [("v0001.safetensors", 9, 2, 2)] * 2
    assert bench_report.median_dice(records.get("clicks/acdc/adapted")) == pytest.approx([0.5, 0.6])


def test_a_missing_data_folder_is_an_error_of_one_line(tmp_path, capsys):
    assert bench.main(["--shared", str(tmp_path / "none"), "--output", str(tmp_path)]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_page_and_pictures_come_from_the_results_alone(tmp_path):
    settings = {"training": ["a", "b"], "testing": ["c", "d"]}
    scores = {"c": {"rv": 0.5, "lv": None, bench.MERGED: 0.6}, "d": {"rv": 0.7, "lv": 0.9, bench.MERGED: 0.8}}
    nothing = {name: dict.fromkeys(values, 0.0) for name, values in scores.items()}
    ours = {"backbone": "lite_medsam", "image_size": 128, "trained_on": ["a"], "chosen_on": ["b"]}
    unet = {"input": [256, 256], "parameters": 1_600_000, "trained_on": ["a", "b"]}
    value = {
        "machine": machine(),
        "results": {
            "acdc/untrained": {"settings": settings, "cases": nothing},
            "acdc/ours": {"settings": settings, "cases": scores, "seconds": 240.0, "steps": 99, **ours},
            "acdc/unet": {"settings": settings, "cases": scores, "seconds": 240.1, "steps": 555, **unet},
            "clicks/acdc/plain": {"object": "lv", "cases": {"c": [0.5, 0.75], "d": [0.7, 0.75], "e": [0.9, 0.8]}},
        },
    }
    bench_report.write(value, tmp_path)
    page = (tmp_path / bench_report.PAGE).read_text()
    assert "| untrained model | 0.000 | 0.000 | 0.000 | 0.000 | - | - |" in page
    assert "| samadapt, default recipe | 0.600 | 0.900 | 0.750 | 0.700 | 240 s | 99 |" in page
    assert "trains on 1 of them and keeps 1" in page
    assert "trains on all 2" in page
    assert "| acdc | lv | plain | 3 | 0.700 | 0.750 |" in page
    assert (tmp_path / bench_report.CLICKS_PICTURE).stat().st_size > 1000


def test_overlay_is_drawn_for_volumes_and_for_classes_that_are_nowhere(tmp_path):
    labels = LabelMap(("organ",))
    random = np.random.default_rng(0)
    for folder in ("images", "labels", "ours", "unet"):
        (tmp_path / folder).mkdir()
        for name in ("full", "empty"):
            filled = np.zeros((12, 10, 4), dtype=np.uint8)
            filled[3:6, 3:6, 1:3] = name == "full"
            array = random.random((12, 10, 4)) if folder == "images" else filled
            nibabel.save(nibabel.Nifti1Image(array, np.diag([-1, 1, 5, 1])), tmp_path / folder / f"{name}.nii.gz")
    scores = {"full": {"organ": 1.0}, "empty": {"organ": None}}
    bench_report.overlay(find_cases(tmp_path), labels, tmp_path, scores, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
