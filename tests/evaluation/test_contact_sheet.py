"""``samadapt synthesize``: one picture, nothing else changed, and errors that say what is missing."""

from __future__ import annotations

import json
import shutil
import sys

import nibabel as nib
import numpy as np
import pytest
from matplotlib.image import imread

from samadapt import cli
from tiny import write_studies

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def studies(tmp_path):
    write_studies(tmp_path / "studies", 5)
    (tmp_path / "studies" / "labels.json").write_text('["bright", "dark"]')
    return tmp_path / "studies"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command in this process: (exit code, its JSON object)."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["samadapt", "synthesize", *map(str, words), "--json"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0, json.loads(capsys.readouterr().out)

    return call


def test_the_sheet_shows_exemplars_and_samples(run, studies, tmp_path):
    code, value = run(studies, "--output", tmp_path / "out" / "sheet.png", "--count", 7, "--conf", "image_size=64")
    assert code == 0
    assert imread(tmp_path / "out" / "sheet.png").std() > 0.05
    assert {item["case"] for item in value["exemplars"]} == {"case_0", "case_1", "case_2", "case_4"}  # 3 is held out
    assert len(value["samples"]) == 7
    assert all(set(areas) == {"bright", "dark"} for areas in value["samples"])
    assert any(areas["bright"] for areas in value["samples"])
    assert value["backgrounds"] == 8
    assert not (studies / ".samadapt").exists()


def test_the_seed_decides(run, studies, tmp_path):
    def samples(*words):
        code, value = run(studies, "--output", tmp_path / "sheet.png", "--count", 4, "--conf", "image_size=64", *words)
        assert code == 0
        return value["samples"]

    assert samples() == samples("--seed", 0) != samples("--seed", 1)
    assert samples("--random-exemplars")


def test_another_picture_format_is_refused(run, studies, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, value = run(studies, "--output", "sheet.jpg")
    assert code != 0
    assert "PNG" in json.dumps(value)
    assert value["remedy"]


def test_labels_that_show_nothing_are_refused(run, studies, tmp_path):
    for path in (studies / "labels" / "final").iterdir():
        label = nib.load(path)
        nib.save(nib.Nifti1Image(np.zeros(label.shape, np.uint8), label.affine), path)
    code, value = run(studies, "--output", tmp_path / "sheet.png", "--conf", "image_size=64")
    assert code == 4
    assert "bright, dark" in value["what"]
    assert value["remedy"]
    assert not (tmp_path / "sheet.png").exists()


def test_a_class_that_no_case_shows_is_told(run, studies, tmp_path):
    words = ("--labels", "bright,dark,liver", "--count", 3, "--conf", "image_size=64", "--conf", "synthesis=lesions")
    code, value = run(studies, "--output", tmp_path / "sheet.png", *words)
    assert code == 0
    assert value["missing"] == ["liver"]
    assert value["synthesis"] == "lesions"
    assert (tmp_path / "sheet.png").is_file()


def test_nothing_labelled_is_refused(run, studies, tmp_path):
    shutil.rmtree(studies / "labels")
    code, value = run(studies, "--output", tmp_path / "sheet.png")
    assert code == 4
    assert "labelled" in value["what"]
    assert "Submit" in value["remedy"]
