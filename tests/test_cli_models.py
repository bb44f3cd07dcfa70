"""``samadapt models`` from outside."""

from __future__ import annotations

import json
import sys

import pytest

from samadapt import cli, recipes
from samadapt.data.labels import LabelMap
from samadapt.project import Project
from samadapt.versions import Versions
from tiny import BACKBONES

pytestmark = pytest.mark.usefixtures("tiny_backbone")


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command in this process: (exit code, standard output, standard error)."""

    def call(*words):
        monkeypatch.setenv("COLUMNS", "140")
        monkeypatch.setattr(sys, "argv", ["samadapt", "models", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return call


@pytest.fixture
def studies(tmp_path):
    """v0001 and v0002 published, v0003 refused."""
    backbone = BACKBONES["per_head"]()
    backbone.weights_sha256 = "0" * 64
    model = recipes.build("lora_late", LabelMap(("bright", "dark")), backbone)
    estimate = {"mean": 0.75, "low": 0.7, "high": 0.8, "count": 2}
    scores = {"case_3": {"bright": 0.8, "dark": 0.7}}
    manifest = {
        "cases": ["case_0", "case_1"],
        "held_out": ["case_3"],
        "held_out_interval": {"mean": estimate},
        "held_out_by_case": scores,
        "rounds": [{"round": 1, "step": 5, "loss": 0.9, "dice": {"bright": 0.5, "dark": None}}],
        "finished": "2026-01-02T03:04:05+0000",
    }
    model.describe(trained=True, training=manifest)
    project = Project(tmp_path)
    own = Versions(project)
    before = None
    for number in range(3):
        path = project.next_model()
        model.save(path)
        if number < 2:
            own.publish(path, "published: better", str(number), before)
            before = path.stem
        else:
            own.refuse(path, "not published, it is worse: held-out Dice 0.100", "2")
    return tmp_path


def test_list_and_show(run, studies):
    code, out, _ = run("list", studies, "--json")
    assert code == 0
    found = json.loads(out)["versions"]
    assert [(v["version"], v["verdict"], v["in_service"]) for v in found] == [
        ("v0001", "published", False),
        ("v0002", "published", True),
        ("v0003", "refused", False),
    ]
    assert found[0]["dice"] == {"mean": 0.75, "low": 0.7, "high": 0.8, "count": 2}
    code, out, _ = run("list", studies)
    assert "0.750 (0.700 to 0.800) held-out" in out
    assert "held-out Dice 0.100" in out
    code, out, _ = run("show", studies, "v0003")
    assert code == 0
    for part in ("refused", "held-out Dice 0.100", "case_3", "0.800", "bright, dark"):
        assert part in out
    _, out, _ = run("show", studies, "v0003", "--json")
    assert json.loads(out)["model"]["training"]["cases"] == ["case_0", "case_1"]


def test_promote_and_rollback(run, studies):
    code, out, _ = run("promote", studies, "v0003", "--json")
    assert (code, json.loads(out)["in_service"]) == (0, True)
    assert Project(studies).published().stem == "v0003"
    code, out, _ = run("rollback", studies)
    assert code == 0
    assert "v0002 is in service again, instead of v0003." in out
    assert Project(studies).published().stem == "v0002"


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (["promote", "v0042"], 2, "v0001, v0002, v0003"),
        (["promote", "../v0001"], 2, "v0001, v0002, ..."),
        (["promote", "v0002"], 4, "in service already"),
        (["show", "newest"], 2, "no version"),
        (["show"], 2, "Missing argument"),
    ],
)
def test_errors_name_the_remedy(run, studies, words, code, part):
    found, out, err = run(words[0], studies, *words[1:])
    assert (found, out) == (code, "")
    assert part in err
    found, out, _ = run(words[0], studies, *words[1:], "--json")
    assert (found, set(json.loads(out))) == (code, {"error", "what", "where", "remedy"})


def test_a_folder_without_models(run, tmp_path):
    code, out, _ = run("list", tmp_path)
    assert (code, out.strip()) == (0, "Nothing has been trained there yet.")
    code, _, err = run("rollback", tmp_path)
    assert code == 4
    assert "Train first" in err
    assert run("list", tmp_path / "nowhere")[0] == 2
