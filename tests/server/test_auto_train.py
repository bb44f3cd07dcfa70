"""Trainings that start by themselves."""

from __future__ import annotations

import os
import time

import pytest

from samadapt.project import Project
from samadapt.server.auto_train import RESUMES, AutoTrain


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
        self.project.write_status(state="done", started=time.time() + 1)
        if state != "done":
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
    os.utime(played.files[0], (time.time() + 10**6,) * 2)  # submitted again
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


def test_a_start_that_fails_is_not_repeated_at_once(played):
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
