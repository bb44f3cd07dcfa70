"""Results of long measurements in one JSON file that grows with every step, so that a later call goes on."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
from filelock import FileLock, Timeout

from samadapt import __version__
from samadapt.errors import ConfigError, InputError, StateError
from samadapt.evaluation.metrics import mean
from samadapt.files import write_json

PACKAGES = ("torch", "monai", "peft", "segment-anything", "numpy", "scipy")
"""Whose versions stand in the reports."""

PROGRAM = "samadapt"
RESULTS = "results.json"

Progress = Callable[[str, float, int], None]
"""Called with (what is done, runs done, runs in all); the second is a fraction within a run."""


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Make a folder of results and hold it: of two calls that measure into one, each would undo what the other wrote.

    Raises:
        ConfigError: a file has that name.
        StateError: another process holds it.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError("that is a file", where=folder, remedy="Name a folder as --output; it need not exist.")
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise StateError(
            "another call is at work there", where=folder, remedy="Wait until it ends, or name another --output."
        ) from error
    try:
        yield
    finally:
        lock.release()


class Records:
    """The JSON file of all results: one record per measured step, kept with the settings that it depends on.

    Args:
        path: the file; created by the first result.
        program: what measures, as people type it; kept with every record, followed by its arguments.
        forget: results whose key starts with one of these are measured again.

    Attributes:
        value: content of the file.

    Raises:
        InputError: the file is not such a record.
    """

    def __init__(self, path: Path, program: str, forget: Sequence[str] = ()) -> None:
        self._path = path
        self._program = program
        self.value: dict[str, Any] = {"machine": {}, "results": {}}
        if path.is_file():
            try:
                self.value = json.loads(path.read_text(encoding="utf-8"))
                results = self.value["results"].items()
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError("not a file of results", where=path, remedy="Remove it.") from error
            kept = {key: record for key, record in results if key.split("/")[0] not in forget}
            self.value["results"] = kept

    def get(self, key: str) -> dict[str, Any] | None:
        """The result of a step, None where it was not measured."""
        return self.value["results"].get(key)

    def typical_seconds(self) -> float | None:
        """Mean wall-clock time of the runs that are done; None before the first."""
        known = [float(one["wall_seconds"]) for one in self.value["results"].values() if one.get("wall_seconds")]
        return mean(known) if known else None

    def kept(self, key: str, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The result of a step that was measured with the same settings and did not fail, else None."""
        record = self.get(key)
        same = record is not None and record["settings"] == settings and "failed" not in record
        return record if same else None

    def claim(self, what: str, shared: Mapping[str, Any], where: Mapping[str, Any]) -> None:
        """Note under ``what`` (say "comparison") what all results of the folder share, with the packages' versions.

        Args:
            what: one word for people.
            shared: JSON.
            where: JSON; noted with it and never compared, as folders move.

        Raises:
            ConfigError: the results there share something else, or are of something else; the message names what.
        """
        before = self.value.get(what)
        if before is None and self.value["results"]:
            raise ConfigError(
                "the folder holds results of something else", where=self._path.parent, remedy="Name another --output."
            )
        if before is not None and (other := [name for name, value in shared.items() if before.get(name) != value]):
            raise ConfigError(
                f"the folder holds a {what} with other {' and other '.join(other)}",
                where=self._path.parent,
                remedy="Name another --output, or repeat the command that began this one.",
            )
        self.value[what] = {**where, **shared}
        self.value["versions"] = {name: metadata.version(name) for name in PACKAGES}

    def measure(self, key: str, settings: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The kept result of ``key`` if it was measured with the same settings, else that of ``run()``.

        A result with the key ``failed`` says why there is none; it is kept to be read, and measured again.
        """
        kept = self.kept(key, settings)
        if kept is not None:
            return kept
        load = os.getloadavg()[0]
        record = {
            "settings": settings,
            **run(),
            "load_before": round(load, 1),
            "command": shlex.join([*shlex.split(self._program), *sys.argv[1:]]),
            "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        self.value["machine"] = machine()
        self.value["results"][key] = record
        write_json(self._path, self.value)
        return record


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "samadapt": __version__,
    }


def describe_machine(machine: Mapping[str, Any]) -> str:
    """What ``machine`` gave, as one sentence."""
    device = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores, no GPU"
    software = f"torch {machine['torch']} on {machine['threads']} threads, Python {machine['python']}"
    return f"Measured on {device}, {machine['memory_gib']} GiB, {software}, samadapt {machine['samadapt']}."


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def in_words(seconds: float) -> str:
    """A time to wait, in hours and minutes; a minute at least."""
    minutes = max(1, round(seconds / 60))
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
