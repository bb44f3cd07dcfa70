"""Trainings that start by themselves."""

from __future__ import annotations

import os
import time

import pytest

from samadapt import recipes
from samadapt.data.labels import LabelMap
from samadapt.files import sha256_of
from samadapt.project import Project
from samadapt.server.auto_train import RESUMES, RETRY_SECONDS, AutoTrain
from tiny import BACKBONES


class Played:
    """A studies folder in which a test submits labels and plays the host's part."""

    def __init__(self, folder):
        self.folder = folder
        self.project = Project(folder)
        self.busy = False
        self.started = 0
        self.files = []

    def submit(self, count=1):
        for _ in range(count):
            path = self.folder / f"{len(self.files)}.nii.gz"
            path.write_bytes(b"mask")
            os.utime(path, (time.time() + 0.5, time.time() + 0.5))  # file times are coarser than the clock
            self.files.append(path)

    def start(self):
        self.started += 1
        self.busy = True

    def ends(self, state="done"):
        """The training that runs has begun a second from now, which is after every label so far, and ends."""
        self.busy = False
        self.project.write_status(state="failed" if state == "failed" else "done", started=time.time() + 1)
        if state == "cut short":
            status = self.project.status()
            self.project.write_status(**{**status, "state": "running", "pid_started": 0.0})


@pytest.fixture
def played(tmp_path):
    return Played(tmp_path)


def auto(played, every=2):
    return AutoTrain(every, played.project, lambda: played.files, lambda: played.busy, played.start)


def test_it_starts_after_every_so_many_labels(played):
    watching = auto(played)
    played.submit()
    assert not watching.look()
    played.submit()
    assert watching.look()
    played.ends()
    assert not watching.look()
    assert watching.state() == {"every": 2, "new_labels": 0, "paused": False}


def test_never_two_at_once_and_labels_of_meanwhile_count_for_the_next(played):
    watching = auto(played)
    played.submit(2)
    assert watching.look()
    played.ends()
    later = time.time() + 10
    played.submit(2)
    for path in played.files[-2:]:
        os.utime(path, (later, later))
    played.busy = True
    assert not watching.look()
    played.busy = False
    assert watching.look()
    assert played.started == 2


def test_a_label_dated_in_the_future_counts_once(played):
    watching = auto(played)
    played.submit(2)
    for path in played.files:
        os.utime(path, (time.time() + 10**6,) * 2)
    assert watching.look()
    played.ends()
    assert not watching.look()
    assert not auto(played).look()  # after a restart, too
    os.utime(played.files[0], (time.time() + 2 * 10**6,) * 2)
    assert watching.new_labels() == 0
    played.files[0].write_bytes(b"mended")
    assert watching.new_labels() == 1


def test_a_pause_outlasts_a_restart(played):
    played.submit(2)
    auto(played).pause(True)
    assert not auto(played).look()
    assert auto(played).state()["paused"]
    auto(played).pause(False)
    assert auto(played).look()


def test_it_never_starts_by_itself_unless_asked_to(played):
    played.submit(9)
    assert not auto(played, every=None).look()


def test_a_training_that_was_cut_short_goes_on_a_few_times(played):
    watching = auto(played)
    played.submit(2)
    assert watching.look()
    for _ in range(RESUMES):
        played.ends("cut short")
        assert watching.look()
    played.ends("cut short")
    assert not watching.look()


def test_a_training_that_somebody_stopped_does_not_go_on(played, monkeypatch):
    watching = auto(played)
    played.submit(2)
    assert watching.look()
    played.ends("cut short")
    after = time.time() + 5
    monkeypatch.setattr("samadapt.server.auto_train.time.time", lambda: after)
    watching.stopped_by_hand()
    assert not watching.look()
    assert not auto(played).look()


@pytest.fixture
def clock(monkeypatch):
    """Moves the time on."""
    now = [time.time()]
    monkeypatch.setattr("samadapt.server.auto_train.time.time", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_what_a_failed_training_has_not_learned_is_tried_again_later_and_later(played, clock):
    watching = auto(played)
    played.submit(2)
    assert watching.look()
    for wait in (RETRY_SECONDS, 2 * RETRY_SECONDS):
        played.ends("failed")
        assert watching.new_labels() == 2
        assert not watching.look()
        clock(wait - 1)
        assert not watching.look()
        clock(2)
        assert watching.look()
    played.ends()
    assert watching.new_labels() == 0
    assert not watching.look()


def test_a_training_that_never_wrote_a_word_is_not_started_at_every_look(played, clock):
    watching = auto(played)
    played.submit(2)
    assert watching.look()
    played.busy = False
    assert not watching.look()
    clock(RETRY_SECONDS + 1)
    assert watching.look()


def test_a_label_that_comes_as_a_training_begins_counts_for_the_next(played):
    """After its labels were listed, and before it noted when it began."""
    watching = auto(played)
    played.submit(2)
    assert watching.look()
    played.submit()
    played.ends()
    assert watching.new_labels() == 1


def test_labels_that_a_training_by_hand_has_learned_are_not_new(played, tiny_backbone):
    played.submit(3)
    model = recipes.build("lora_late", LabelMap(("bright",)), BACKBONES["per_head"]())
    learned = {str(number): sha256_of(played.files[number]) for number in range(2)}
    for noted in ({"label_sha256": learned}, {"label_sha256": {**learned, "2": "0"}, "preview": True}):
        model.describe(training=noted)
        model.save(played.project.next_model())
    played.project.write_status(state="failed", started=time.time() + 1)  # a later one
    assert auto(played).new_labels() == 1


def test_a_label_is_read_again_only_if_it_has_changed(played, monkeypatch):
    read = []
    monkeypatch.setattr("samadapt.files.sha256_of", lambda path: read.append(path) or sha256_of(path))
    watching = auto(played)
    played.submit(2)
    for _ in range(3):
        watching.new_labels()
    assert read == played.files
    played.files[0].write_bytes(b"mended")
    watching.new_labels()
    assert read == [*played.files, played.files[0]]


def test_a_start_that_fails_is_not_repeated_at_once(played, clock):
    def refuse():
        played.started += 1
        raise RuntimeError("the host is not ready")

    watching = AutoTrain(1, played.project, lambda: played.files, lambda: False, refuse)
    played.submit()
    for path in played.files:
        os.utime(path, (time.time() - 1, time.time() - 1))
    with pytest.raises(RuntimeError):
        watching.look()
    assert not watching.look()
    assert played.started == 1
    assert watching.new_labels() == 1
    clock(RETRY_SECONDS + 1)
    with pytest.raises(RuntimeError):
        watching.look()
