"""``samadapt compare``: recipes trained on the same cases, for the same time, with the same seeds.

The test cases are drawn once, by patient, with a fixed seed. Of the others the seed of a run decides which ones are
labelled: the first one, the first four, and so on, so that a larger training set contains the smaller ones. Every run
is a process of its own, so that its memory is its own and its crash is one line in the report. What was measured is
kept at once; a later call does what is missing, and what had failed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from samadapt import recipes
from samadapt.config import closest
from samadapt.data.cases import find_cases
from samadapt.data.labels import LabelMap
from samadapt.errors import ConfigError
from samadapt.evaluation import compare_report
from samadapt.evaluation.apart import run_job
from samadapt.evaluation.compare_run import UNETS, Job, run_folder
from samadapt.evaluation.records import PROGRAM, RESULTS, Progress, Records, alone_in, in_words
from samadapt.evaluation.split import NestedSplit, nested_split
from samadapt.project import Project
from samadapt.training.loop import ROUNDS

Execute = Callable[[Job, Path, Callable[[float], None]], dict[str, Any]]
"""Does one job in a new folder, tells the share that is done (0..1), and returns the result or ``{"failed": why}``."""


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        studies: folder of the cases.
        labels: the classes, in order.
        recipes: names of recipes, or of ``UNETS``.
        labelled: numbers of labelled cases.
        seeds: of the choice of labelled cases and of the trainings.
        testing: number of test cases.
        settings: as ``AppConfig.from_strings`` takes them; the same for every run.

    Raises:
        ConfigError: an unknown recipe, or nothing to compare.
    """

    studies: Path
    labels: LabelMap
    recipes: tuple[str, ...]
    labelled: tuple[int, ...]
    seeds: tuple[int, ...]
    testing: int
    settings: Mapping[str, str]

    def __post_init__(self) -> None:
        known = list(dict.fromkeys([*recipes.names(), *UNETS]))
        for name in self.recipes:
            if name not in known:
                raise ConfigError(
                    f"unknown recipe {name!r}", where="--recipes", remedy=closest(name, known, recipes.families(known))
                )
        for option, values in (("--recipes", self.recipes), ("--cases", self.labelled), ("--seeds", self.seeds)):
            if not values:
                raise ConfigError("nothing is named", where=option, remedy="Give a comma list.")
        for name, value in (("--cases", min(self.labelled)), ("--test", self.testing)):
            if value < 1:
                raise ConfigError("at least one case is needed", where=name)

    def jobs(self, split: NestedSplit) -> dict[str, Job]:
        """Every run by its key, all recipes of one seed and number of cases after each other.

        Raises:
            InputError: too few labelled cases.
            ConfigError: settings that a recipe does not go with.
        """
        found = {}
        for seed in self.seeds:
            for count in self.labelled:
                training = [case.id for case in split.training(count, seed)]
                testing = [case.id for case in split.testing]
                for name in self.recipes:
                    job = Job(
                        str(self.studies), list(self.labels.names), name, seed, training, testing, dict(self.settings)
                    )
                    _ = job.config  # refuses now what the run would refuse later
                    found[f"{name} {count} {seed}"] = job
        return found


def compare(
    comparison: Comparison, output: Path, progress: Progress, execute: Execute | None = None
) -> compare_report.Report:
    """Do every run that ``output`` does not have yet, and write the report, also when interrupted.

    Args:
        comparison: what to compare.
        output: folder of results, models, masks and report.
        progress: told about every run.
        execute: does one run; by default in a process of its own.

    Raises:
        ConfigError: ``output`` holds a comparison of other cases or with other settings, or a recipe's settings are
            wrong.
        StateError: another call measures into ``output``.
        InputError: too few labelled cases, or a results file that cannot be read.
    """
    split = nested_split(find_cases(comparison.studies), comparison.testing)
    jobs = comparison.jobs(split)
    with alone_in(output):
        records = Records(output / RESULTS, PROGRAM)
        _claim(records, comparison, split)
        try:
            _measure(jobs, records, output, progress, execute or in_own_process)
        finally:
            report = compare_report.write(records.value, output)
    return report


def _measure(jobs: Mapping[str, Job], records: Records, output: Path, progress: Progress, execute: Execute) -> None:
    wanted = {key: {**_identity(job), "training": job.training} for key, job in jobs.items()}
    missing = [key for key in jobs if records.kept(key, wanted[key]) is None]
    done = len(jobs) - len(missing)
    for key in missing:
        job = jobs[key]
        text = f"{done + 1} of {len(jobs)}: {describe(job)}; {_time_left(records, jobs, len(jobs) - done)} left"
        progress(text, done, len(jobs))

        def run(job: Job = job, text: str = text, done: int = done) -> dict[str, Any]:
            folder = run_folder(output, job.recipe, len(job.training), job.seed)
            shutil.rmtree(folder, ignore_errors=True)  # what was interrupted begins again, so that all get one time
            folder.mkdir(parents=True)
            return execute(job, folder, lambda share: progress(text, done + share, len(jobs)))

        records.measure(key, wanted[key], run)
        done += 1
    progress("writing the report", done, len(jobs))


def in_own_process(job: Job, folder: Path, tell: Callable[[float], None]) -> dict[str, Any]:
    """Do one job in a process of its own; its result, with peak memory and time, or ``{"failed": why}``."""
    project = Project(folder)

    def watch() -> None:
        status = project.status()
        tell(0.9 * float(status.get("epoch", 0)) / ROUNDS)

    return run_job("samadapt.evaluation.compare_run", asdict(job), folder, watch)


def describe(job: Job) -> str:
    """A run, for people."""
    return f"{job.recipe}, {len(job.training)} case{'s' if len(job.training) > 1 else ''}, seed {job.seed}"


def _identity(job: Job) -> dict[str, Any]:
    return {"recipe": job.recipe, "labelled": len(job.training), "seed": job.seed}


def _claim(records: Records, comparison: Comparison, split: NestedSplit) -> None:
    """Note what the folder's results share, or refuse a folder whose results share something else.

    Raises:
        ConfigError: cases, labels or settings differ; the message names what.
    """
    shared = {
        "labels": list(comparison.labels.names),
        "settings": dict(sorted(comparison.settings.items())),
        "test cases": [case.id for case in split.testing],
        "other labelled cases": [case.id for case in split.available],
    }
    records.claim("comparison", shared, {"studies": str(comparison.studies.resolve())})


def _time_left(records: Records, jobs: Mapping[str, Job], runs: int) -> str:
    """An estimate by the runs that are done; before the first, by the time that training alone takes."""
    known = records.typical_seconds()
    if known is None:
        return f"at least {in_words(runs * next(iter(jobs.values())).seconds)}"
    return f"about {in_words(runs * known)}"
