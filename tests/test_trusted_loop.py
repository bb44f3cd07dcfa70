"""Ten rounds that nobody looks after: the default strategy, trainings that start by themselves, kills, and bad labels.

What annotators meet must never get worse on the held-out cases, whatever happens.
"""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil
import pytest
import requests
from monailabel.client import MONAILabelClient

from samadapt.project import Project
from serving import DATA, Server
from test_real_loop import NAMES, PERMUTED, submit
from waiting import wait_until

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.long,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the labelled volumes of {DATA}"),
]

ROUNDS, PER_ROUND = 10, 2
KILL_TRAINING, KILL_SERVER, POISON = 3, 5, 7
"""Rounds in which the training's process is killed, the server is killed during a training, and labels are shuffled."""

POISONED = 6
"""So many earlier labels are overwritten in that round."""

CONF = (
    ("auto_train", str(PER_ROUND)),
    ("recipe", "autosam_vit"),  # learns the head alone, so a round takes seconds
    ("max_steps", "80"),  # not a time, so that a busy machine changes nothing but how long it takes
    ("max_train_minutes", "1.9"),
    ("image_size", "64"),
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    studies = tmp_path_factory.mktemp("trusted") / "studies"
    studies.mkdir()
    for path in sorted((DATA / "images").glob("*.nii.gz"))[: ROUNDS * PER_ROUND + 4]:
        (studies / path.name).write_bytes(path.read_bytes())
    running = Server(studies, *CONF).start()
    yield running
    running.stop()


def shuffled(image: str, folder: Path) -> Path:
    """The true values of a label at places where they do not belong."""
    label = nib.load(DATA / "labels" / f"{image}.nii.gz")
    values = np.rint(label.get_fdata()).astype(np.uint8)
    path = folder / f"{image}.nii.gz"
    nib.save(nib.Nifti1Image(np.random.default_rng(0).permuted(np.roll(values, 9, axis=(0, 1, 2))), label.affine), path)
    return path


def wait_for_training(server: Server, after: float, seconds: float = 240) -> dict:
    """Wait for the end of a training that began after ``after``."""

    def ended() -> dict | None:
        now = Project(server.studies).status()
        return now if now.get("started", 0) > after and now["state"] in ("done", "failed") else None

    return wait_until(ended, seconds, lambda: (Project(server.studies).status(), server.log.read_text()[-3000:]))


def training_process(server: Server, after: float) -> psutil.Process:
    def running() -> psutil.Process | None:
        now = Project(server.studies).status()
        at_work = now.get("started", 0) > after and now["state"] == "running" and now.get("step", 0) > 0
        return psutil.Process(now["pid"]) if at_work else None

    return wait_until(running, 120, Project(server.studies).status)


def held_out_dice(client: MONAILabelClient, images: list[str], folder: Path) -> float:
    """Mean foreground Dice of what annotators get, on the cases that the ledger holds out."""
    scores = []
    for image in images:
        path, params = client.infer("samadapt", image, params={"result_extension": ".nii.gz"})
        mask = np.asarray(nib.load(path).dataobj)
        truth = np.rint(nib.load(DATA / "labels" / f"{image}.nii.gz").get_fdata()).astype(int)
        for value, name in enumerate(NAMES, start=1):
            found, true = mask == params["label_names"][name], truth == value
            scores.append(2 * (found & true).sum() / (found.sum() + true.sum()))
    return float(np.mean(scores))


def cases_of(server: Server, wanted: str) -> list[str]:
    roles = json.loads(Project(server.studies).ledger.read_text())
    return sorted(name.removeprefix("case ") for name, role in roles.items() if (name[:5], role) == ("case ", wanted))


def submit_shuffled(client: MONAILabelClient, images: list[str], folder: Path) -> None:
    """What a broken script sends: each case gets the label of another place and order."""
    for image in images:
        client.save_label(image, str(shuffled(image, folder)), params={"label_info": PERMUTED})


def pause(server: Server, paused: bool) -> None:
    requests.post(f"{server.url}/samadapt/auto_train", json={"paused": paused}, timeout=60).raise_for_status()


def test_ten_rounds_that_nobody_looks_after(server, tmp_path, record_property):
    client = MONAILabelClient(server.url, tmpdir=str(tmp_path), client_id="ann")
    told: set[str] = set()
    history: list[tuple[list[str], float]] = []
    for turn in range(1, ROUNDS + 1):
        before, served = time.time(), Project(server.studies).published()
        poisoned = cases_of(server, "train")[:POISONED] if turn == POISON else []
        if poisoned:
            pause(server, True)  # so that one training meets them all
            submit_shuffled(client, poisoned, tmp_path)
        for _ in range(PER_ROUND):
            sample = client.next_sample("random", {})
            assert sample["id"] not in told, "a case that has a label was proposed again"
            assert sample["reason"]
            told.add(sample["id"])
            submit(client, sample["id"], tmp_path)
        if poisoned:
            pause(server, False)
        if turn == KILL_TRAINING:
            training_process(server, before).kill()
        if turn == KILL_SERVER:
            worker = training_process(server, before)
            server.kill()
            worker.wait(30)
            server.start()
        ended = wait_for_training(server, before)
        assert ended["state"] == "done", ended
        cases = cases_of(server, "held-out")
        score = held_out_dice(client, cases, tmp_path) if cases else float("nan")
        history.append((cases, score))
        print(
            f"\nround {turn}: {len(told)} labels, Dice {score:.3f} on {len(cases)} held-out cases, {ended['message']}"
        )
        if poisoned:
            assert not ended["published"], ended
            assert Project(server.studies).published() == served
            shown = requests.get(f"{server.url}/info/", timeout=60).json()["train_stats"]["samadapt"]
            assert "not published" in shown["message"]
            look_again(client, poisoned, tmp_path)
    record_property("dice_by_round", [score for _, score in history])

    for (cases, earlier), (same, later) in itertools.pairwise(history):
        assert cases != same or not cases or later >= earlier - 1e-6
    assert history[-1][1] > 0.5
    assert requests.get(f"{server.url}/info/", timeout=60).json()["datastore"]["completed"] == len(told)


def look_again(client: MONAILabelClient, poisoned: list[str], folder: Path) -> None:
    """The strategy for label errors names the shuffled ones first; they are mended."""
    deadline = time.monotonic() + 240
    while (ahead := client.info()["embedded_ahead"])["images_done"] < ahead["images"]:  # while nobody waits
        assert time.monotonic() < deadline, ahead
        time.sleep(2)
    found = [client.next_sample("revisit", {})["id"] for _ in poisoned]
    assert len(set(found) & set(poisoned)) >= len(poisoned) - 1, (found, poisoned)
    for image in poisoned:
        submit(client, image, folder)


def test_rollback_brings_back_the_same_bytes(server, tmp_path):
    client = MONAILabelClient(server.url, tmpdir=str(tmp_path))
    image = cases_of(server, "held-out")[0]

    def answer() -> tuple[bytes, str]:
        path, params = client.infer("samadapt", image, params={"result_extension": ".nii.gz"})
        return np.asarray(nib.load(path).dataobj).tobytes(), params["model_version"]

    now, newest = answer()
    rolled = requests.post(f"{server.url}/samadapt/models/rollback", timeout=60)
    assert rolled.status_code == 200, rolled.text
    _, older = answer()
    assert older != newest
    promoted = requests.post(f"{server.url}/samadapt/models/{newest}/promote", timeout=60)
    assert promoted.status_code == 200, promoted.text
    assert answer() == (now, newest)
