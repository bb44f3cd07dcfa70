"""The one trainer. The host runs it in a process of its own; viewers see of it what the project's status says."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.train import TrainTask
from monailabel.utils.async_tasks.utils import tasks

from samadapt import recipes
from samadapt.config import AppConfig, parse_values, with_backbone
from samadapt.data.cases import find_cases
from samadapt.errors import ConfigError, StateError
from samadapt.project import Project
from samadapt.server.labels import LabelSource
from samadapt.terminal import plain
from samadapt.training import train
from samadapt.training.cores import SpareCores
from samadapt.training.loop import ROUNDS
from samadapt.versions import Versions

RECIPE = "recipe"
SETTINGS = ("max_train_minutes", "max_steps", RECIPE)
"""What a request may change; the rest is settled when the server starts."""

PROMOTE, NONE = "promote", "none"
"""The option that puts a version in service in place of a training, for viewers, which can ask for nothing else. It
names the version, as a viewer keeps an option: "one back" would go back again with every later training."""

NICENESS = 10
"""Whoever waits for an answer of the server gets the processor before the training."""

Report = Callable[[dict[str, Any]], None]

FROM_THE_HOST = ("model", "name", "client_id", "device", "gpus", "multi_gpu", "local_rank")
"""What the host and its viewers put into a request beside the settings."""


class TrainSamAdapt(TrainTask):
    """Trains on every final label of the datastore and publishes the result if it is no worse than the last one.

    Args:
        name: under which the host lists it.
        settings: from ``--conf``.
        project: where models and progress are kept.
        labels: which structures to learn.
    """

    def __init__(self, name: str, settings: AppConfig, project: Project, labels: LabelSource) -> None:
        super().__init__("learns from every submitted label")
        self.name = name
        self._settings = settings
        self._project = project
        self._labels = labels
        self._versions = Versions(project)

    def info(self) -> dict[str, Any]:
        return {**super().info(), "recipes": self._recipes}

    def config(self) -> dict[str, Any]:
        """What viewers offer to change; of a list they make a choice, whose first is what holds without one."""
        values = {key: getattr(self._settings, key) for key in SETTINGS}
        shown = {key: "auto" if value is None else value for key, value in values.items()}
        offered = {RECIPE: list(self._recipes), PROMOTE: [NONE, *reversed(self._versions.names())]}
        return {**shown, **offered}

    @functools.cached_property
    def _recipes(self) -> dict[str, str]:
        """Recipes that the other settings fit, each with its summary; the server's own first."""
        ordered = dict.fromkeys([self._settings.recipe, *recipes.names()])
        return {name: recipes.get(name).summary for name in ordered if self._fits(name)}

    def _fits(self, recipe: str) -> bool:
        try:
            recipes.configured(self._with({RECIPE: recipe}))
        except ConfigError:
            return False
        return True

    def _with(self, values: Mapping[str, Any]) -> AppConfig:
        """The server's settings with those of a request.

        Raises:
            ConfigError: an unknown setting, a bad value, or a recipe of another backbone.
        """
        parsed = {"backbone": self._settings.backbone, **parse_values(values, SETTINGS)}
        return dataclasses.replace(self._settings, **with_backbone(parsed))

    def check(self, request: Mapping[str, Any], datastore: Datastore) -> AppConfig:
        """The settings of a training that can start now.

        Raises:
            ConfigError: an unknown setting, a bad value, or a recipe that the other settings do not fit.
            InputError: there is no version of the name that is to be put in service.
            StateError: nothing to learn from yet, or that version is in service already.
        """
        known = {key: value for key, value in request.items() if key not in (*FROM_THE_HOST, PROMOTE)}
        if RECIPE in known:
            known[RECIPE] = _chosen(known[RECIPE])
        config = self._with(known)
        recipes.check(config)  # refuses now what the training would refuse later
        if (wanted := _wanted_version(request)) is not None:
            if self._versions.get(wanted).in_service:
                raise StateError(
                    f"{wanted} is in service already", where=PROMOTE, remedy=f"To train, set {PROMOTE} to {NONE}."
                )
            return config
        if not datastore.get_labeled_images():
            raise StateError(
                "no image is labelled yet", where="datastore", remedy="Submit at least one label, then train."
            )
        if self._labels.current() is None:
            raise StateError(
                "the labels have no names",
                where="labels",
                remedy='Start the server with --conf labels "first,second", or submit labels with label_info.',
            )
        return config

    def stats(self) -> dict[str, Any]:
        """Progress as the viewers' bars read it.

        They show ``epoch / total_epochs`` as long as there is no ``total_time``, taking epoch 0 for 1 and a missing
        total for 1: an empty dictionary is shown as 100 %.
        """
        status = self._project.status()
        record = {
            "epoch": status.get("epoch", 0),
            "total_epochs": status.get("total_epochs", ROUNDS),
            "best_metric": status.get("best_metric") or 0.0,
            "message": status.get("message", "no training yet"),
            "state": status.get("state", "none"),
            "refused": status.get("refused"),
            "cross_validation": status.get("cross_validation"),
            "in_service": self._in_service(),
        }
        if _about_to_start(status):
            return {**record, "epoch": 0, "message": "starting", "state": "running"}
        elapsed = str(datetime.timedelta(seconds=int(status.get("seconds", 0))))
        # A training that has written its last record takes a moment to end, and until then the host refuses the next.
        if asked_for():
            record["state"] = "running"
        record["current_time" if record["state"] == "running" else "total_time"] = elapsed
        if status.get("loss") is not None:
            record["train"] = {"metrics": {"loss": status["loss"]}}
        if status:
            record["start_ts"] = int(status["started"])
            record["eval"] = {"metrics": status.get("dice", {}), "best_metric": record["best_metric"]}
        return dict(plain(record))  # the host cannot send the NaN of a structure that no held-out case shows

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Train, or put a version in service; everything printed here reaches ``GET /train/`` as ``details``."""
        # Of POST /train/ the host hands on the whole body, too, whose object for this trainer it has unfolded already.
        request = {key: value for key, value in request.items() if key != self.name}
        config = self.check(request, datastore)
        if (wanted := _wanted_version(request)) is not None:
            done = self._versions.promote(wanted, "a viewer", config)
            print(f"{wanted} is in service now, {done.events[-1]['reason']}", flush=True)
            return dict(plain(done.summary()))
        labels = self._labels.current()
        assert labels is not None
        report = _print_news()
        if threading.current_thread() is threading.main_thread():  # else this is the server itself (``run_sync``)
            os.nice(NICENESS)
            report = _on_spare_cores(report)
        datastore.datalist()  # over DICOMweb this fetches the labels that others have stored
        result = train(find_cases(self._project.root.parent), labels, config, self._project, report)
        print("\n".join([result.reason, *result.remarks]), flush=True)
        return {**plain(result), "model": result.model.stem}

    def _in_service(self) -> str | None:
        published = self._project.published()
        return published.stem if published else None


def _wanted_version(request: Mapping[str, Any]) -> str | None:
    """The version to put in service; None: train."""
    name = str(_chosen(request.get(PROMOTE) or NONE)).strip()
    return None if name == NONE else name


def _chosen(value: Any) -> Any:
    """A viewer may send a whole choice, whose first is meant."""
    return value[0] if isinstance(value, list) and value else value


def is_under_way(project: Project) -> bool:
    """Whether a training runs, or has been asked for and will."""
    return project.status().get("state") == "running" or asked_for()


def asked_for() -> bool:
    """Whether the host has a training that has not ended; its process may not be there yet."""
    return any(task["status"] in ("SUBMITTED", "RUNNING") for task in tasks("train"))


def _about_to_start(status: Mapping[str, Any]) -> bool:
    """Whether the host has started a training that has not written its first record yet."""
    started = tasks("train")
    if status.get("state") == "running" or not started or started[-1]["status"] not in ("SUBMITTED", "RUNNING"):
        return False
    since = time.mktime(time.strptime(started[-1]["start_ts"], "%Y-%m-%d %H:%M:%S"))
    return bool(status.get("started", 0) < since)


def _on_spare_cores(report: Report) -> Report:
    """The same callback, which also leaves other programs their cores."""
    cores = SpareCores()

    def adjusted(record: dict[str, Any]) -> None:
        cores.adjust()
        report(record)

    return adjusted


def _print_news() -> Report:
    """A progress callback that prints each message once, and ends this process when the server is gone."""
    last, server = "", os.getppid()

    def report(record: dict[str, Any]) -> None:
        nonlocal last
        if os.getppid() != server:
            raise SystemExit("the server is gone; the next training goes on from here")
        if record["message"] != last:
            last = record["message"]
            loss = f", loss {record['loss']:.3f}" if record.get("loss") is not None else ""
            print(f"{record['seconds']:6.0f} s  {last}{loss}", flush=True)

    return report
