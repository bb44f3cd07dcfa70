"""The command line from outside: results, errors, exit codes, and one JSON object wherever --json is given."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from make_dicom import write_rtstruct, write_stack
from samadapt import cli
from samadapt.config import AppConfig
from samadapt.dicomweb.child import Child
from samadapt.errors import ConfigError
from samadapt.files import write_json

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command in this process: (exit code, standard output, standard error)."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["samadapt", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        code = ended.value.code
        return (0 if code is None else code), out, err

    return call


@pytest.fixture
def studies(tmp_path):
    from tiny import write_studies

    folder = tmp_path / "studies"
    write_studies(folder, 4)
    return folder


QUICK = ["--conf", "image_size=64", "--conf", "max_steps=3"]


def test_help_is_light_and_names_every_command():
    code = (
        "import sys; sys.argv = ['samadapt', '--help']\n"
        "from samadapt.cli import main\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'monai', 'numpy', 'monailabel'} & set(sys.modules)), file=sys.stderr)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "lib")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr.strip() == "[]"
    for command in (
        "demo",
        "serve",
        "pretrain",
        "train",
        "synthesize",
        "infer",
        "evaluate",
        "compare",
        "simulate",
        "recipes",
        "cases",
        "doctor",
    ):
        assert command in done.stdout


def test_version(run):
    code, out, _ = run("--version")
    assert (code, out.split()[0]) == (0, "samadapt")


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (["trian"], 2, "Did you mean 'train'"),
        (["train"], 2, "Missing argument"),
        (["train", "nowhere"], 2, "no such folder"),
        (["train", "EMPTY"], 2, "no image found"),
        (["train", "EMPTY", "--conf", "max_steps"], 2, "not KEY=VALUE"),
        (["train", "EMPTY", "--conf", "max_step=3"], 2, "Did you mean 'max_steps'"),
        (["train", "EMPTY", "--conf", "max_steps=3", "--conf", "max_steps=4"], 2, "given twice"),
        (["train", "EMPTY", "--labels", "a,a"], 2, "same label name twice"),
        (["infer", "nowhere", "--output", "EMPTY"], 2, "no such file"),
        (["infer", "EMPTY", "--output", "EMPTY"], 2, "no image found"),
        (["infer", "EMPTY", "--output", "EMPTY", "--format", ".jpg"], 2, "'.jpg'"),
        (["evaluate", "nowhere"], 2, "no such folder"),
        (["serve", "--studies", "nowhere"], 2, "no such folder"),
        (["serve", "--studies", "EMPTY", "--port", "0"], 2, "--port"),
        (["serve", "--studies", "EMPTY", "--conf", "blocks=99"], 2, "[99] cannot be adapted"),
        (["serve", "--studies", "EMPTY", "--conf", "recipe=unet", "--conf", "blocks=late"], 2, "leaves every block"),
        (["serve", "--studies", "EMPTY", "--host", "not.a.host.invalid"], 4, "cannot be listened on"),
        (["recipes", "--backbone", "sam"], 2, "lite_medsam"),
        (["doctor", "--conf", "weights=nowhere.pth"], 2, "No such file"),
        (["demo", "--port", "eighty"], 2, "--port"),
    ],
)
def test_bad_input_is_one_message_and_an_exit_code(run, tmp_path, words, code, part):
    words = [str(tmp_path) if word == "EMPTY" else word for word in words]
    found, out, err = run(*words)
    assert found == code
    assert out == ""
    assert part in err
    assert "Traceback" not in err
    found, out, _ = run(*words, "--json")
    assert found == code
    assert part in json.dumps(json.loads(out), ensure_ascii=False)


def test_serve_refuses_a_port_in_use(run, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        code, _, err = run("serve", "--studies", tmp_path, "--port", other.getsockname()[1])
    assert code == 4
    assert "--port" in err


def test_serve_becomes_the_server(run, tmp_path, monkeypatch):
    started = []

    def become(studies, host, port, conf, variables):
        started.append((studies, host, port, conf, variables))
        raise SystemExit(0)

    served = Child("http://127.0.0.1:1/dicom-web", 7, ("python", "-m", "samadapt.dicomweb"))
    monkeypatch.setattr("samadapt.dicomweb.child.start", lambda folder, *options: served)
    monkeypatch.setattr("samadapt.server.launch.run", become)
    monkeypatch.setattr("samadapt.server.launch.require_free", lambda host, port: None)
    code, out, _ = run("serve", "--studies", tmp_path, "--conf", "labels=a,b")
    assert code == 0
    variables = {"SAMADAPT_DICOMWEB": "http://127.0.0.1:1/dicom-web", **served.variables()}
    assert started == [(str(tmp_path), "127.0.0.1", 8000, {"labels": "a,b"}, variables)]
    assert "http://127.0.0.1:8000" in out


def test_loose_dicom_files_are_told_where_they_belong(run, tmp_path):
    write_stack(tmp_path / "studies", np.zeros((3, 4, 4), np.int16), [(0, 0, z) for z in range(3)])
    code, _, err = run("train", tmp_path / "studies")
    assert code == 2
    assert "DIR/<case>/*.dcm" in err
    assert "samadapt serve" in err


def test_several_series_in_a_case_s_folder_are_named_with_what_to_do(run, tmp_path):
    case = tmp_path / "studies" / "case"
    for title in ("thorax", "abdomen"):
        write_stack(case / title, np.zeros((3, 4, 4), np.int16), [(0, 0, z) for z in range(3)], SeriesDescription=title)
    write_rtstruct(case / "structures.dcm")
    code, _, err = run("train", tmp_path / "studies", "--conf", "labels=a")
    told = " ".join(err.split())
    assert code == 2
    assert "2 DICOM series in one folder" in told
    assert "'thorax'" in told
    assert "Put each series into its own folder" in told


def test_unexpected_errors_show_no_traceback(run, tmp_path, monkeypatch):
    def broken(studies):
        raise RuntimeError("broken inside")

    monkeypatch.delenv("SAMADAPT_DEBUG", raising=False)
    monkeypatch.setattr("samadapt.data.cases.find_cases", broken)
    code, out, err = run("train", tmp_path)
    assert (code, out) == (1, "")
    assert "broken inside" in err
    assert "SAMADAPT_DEBUG" in err
    assert "Traceback" not in err


def test_ctrl_c_is_no_error_message(run, tmp_path, monkeypatch):
    def stopped(studies):
        raise KeyboardInterrupt

    monkeypatch.setattr("samadapt.data.cases.find_cases", stopped)
    code, out, err = run("train", tmp_path)
    assert (code, out, err) == (cli.STOPPED, "", "samadapt: Stopped.\n")


def test_train_infer_evaluate(run, studies, tmp_path, tiny_backbone):
    """The three library commands in turn on tiny data, in JSON and in words."""
    code, _, err = run("evaluate", studies)
    assert (code, "nothing has been trained" in err) == (4, True)
    code, _, err = run("train", studies, *QUICK)
    assert (code, "--labels" in err) == (2, True)

    code, out, err = run("train", studies, "--labels", "bright,dark", *QUICK, "--json")
    assert code == 0, err
    trained = json.loads(out)
    assert trained["published"]
    assert trained["labels"] == ["bright", "dark"]
    assert Path(trained["model"]).is_file()

    code, out, err = run("evaluate", studies, "--json")
    assert code == 0, err
    judged = json.loads(out)
    assert [case["case"] for case in judged["cases"]] == ["case_3"]  # every fourth is held out
    assert set(judged["mean"]["dice"]) == {"bright", "dark"}
    assert judged["estimates"]["calibrated_on"] == ["case_3"]
    code, out, _ = run("evaluate", studies, "--all")
    assert code == 0
    assert all(word in out for word in ("case_0", "case_3", "mean", "HD95", "set right on 1 of these 4 cases"))

    (studies / "broken.nii.gz").write_bytes(b"not an image")
    code, out, err = run("infer", studies, "--output", tmp_path / "masks", "--format", ".nrrd", "--json")
    found = json.loads(out)
    assert code == 2
    assert [item["id"] for item in found["failed"]] == ["broken"]
    assert {item["id"] for item in found["masks"]} == {f"case_{n}" for n in range(4)}
    assert all(Path(item["mask"]).is_file() for item in found["masks"])

    image = studies / "case_0.nii.gz"
    code, out, err = run("infer", image, "--studies", studies, "--output", tmp_path / "one", "--structure", "dark")
    assert code == 0, err
    assert (tmp_path / "one" / "case_0.nii.gz").is_file()
    code, _, err = run("infer", image, "--studies", studies, "--output", tmp_path / "one", "--structure", "drak")
    assert (code, "bright, dark" in err) == (2, True)


def test_cases(run, studies):
    code, out, _ = run("cases", studies)
    assert code == 0
    assert "the next training decides" in out
    write_json(studies / ".samadapt" / "ledger.json", {"case case_0": "held-out", "case gone": "train"})
    told = {one["case"]: one for one in json.loads(run("cases", studies, "--json")[1])["cases"]}
    assert (told["case_0"]["role"], told["case_0"]["labelled"]) == ("held-out", True)
    assert (told["gone"]["role"], told["gone"]["labelled"]) == ("train", False)
    code, _, err = run("cases", studies / "nowhere")
    assert code != 0
    assert "no such folder" in err


def test_a_second_training_of_a_folder_is_refused(run, studies, monkeypatch):
    from samadapt.project import Project

    monkeypatch.setattr("samadapt.training.run.LOCK_SECONDS", 0.1)
    project = Project(studies)
    project.write_status(state="running", message="training")
    before = project.status()
    with FileLock(project.training / "lock"):
        code, _, err = run("train", studies, "--labels", "bright,dark")
    assert code == 4
    assert "runs already" in err
    assert project.status() == before


def test_recipes(run):
    code, out, _ = run("recipes", "--json")
    assert code == 0
    found = json.loads(out)
    assert {"lora"} <= {recipe["name"] for recipe in found}
    counted = [recipe for recipe in found if recipe["trainable_parameters"] is not None]
    assert all(0 < recipe["trainable_parameters"] <= recipe["parameters"] for recipe in counted)
    assert {"lora", "samed", "s_sam", "sam_lst", "autosam_vit", "unet", "peft/dora"} <= {r["name"] for r in counted}
    clicks = {recipe["name"]: recipe["takes_prompts"] for recipe in counted}
    assert (clicks["lora_late"], clicks["s_sam"], clicks["autosam_vit"]) == (True, False, False)


def test_a_folder_without_clip_is_refused_before_the_cases_are_prepared(run, studies, tmp_path):
    (tmp_path / "empty").mkdir()
    code, _, err = run(
        "train", studies, "--labels", "a,b", "--recipe", "s_sam", "--conf", f"clip={tmp_path / 'empty'}", *QUICK
    )
    assert code == 3
    assert "clip-vit-base-patch32" in err
    assert "preparing case" not in err


def test_the_names_of_recipes_stay_whole_in_a_pipe(run):
    _, out, _ = run("recipes", "--reference")
    assert "ft/lite_medsam/encoder+decoder/vanilla" in out


@pytest.mark.parametrize(("word", "meant"), [("SAMed", "samed"), ("S-SAM", "s_sam"), ("AutoSAM_CNN", "autosam_cnn")])
def test_a_recipe_may_be_looked_for_as_its_paper_writes_it(word, meant):
    with pytest.raises(ConfigError, match=f"Did you mean '{meant}'"):
        AppConfig.from_strings({"recipe": word})


def test_parameter_counts_in_the_papers_form(run):
    words = ("--backbone", "sam_vit_b", "--image-size", "256", "--classes", "3", "--reference")
    code, out, _ = run("recipes", "--json", *words)
    assert code == 0
    counts = {recipe["name"]: recipe["trainable_parameters"] for recipe in json.loads(out)}
    expected = {"s_sam": 444_672, "sam_lst": 2_856_737, "autosam_vit": 3_646_880, "autosam_cnn": 20_686_340}
    assert expected.items() <= counts.items()
