"""``samadapt simulate``: what each strategy would have had labelled, and how good the models would have become.

Every seed draws test cases and a pool by patient, the same ones for all strategies and recipes. Every run is a process
of its own; one that was stopped goes on after its last finished round, and a later call does what is missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from samadapt import recipes
from samadapt.config import AppConfig, closest
from samadapt.data.cases import Case, find_cases
from samadapt.data.labels import LabelMap
from samadapt.errors import ConfigError
from samadapt.evaluation import simulate_pool, simulate_report
from samadapt.evaluation.apart import run_job
from samadapt.evaluation.records import PROGRAM, RESULTS, Progress, Records, alone_in, in_words
from samadapt.evaluation.simulate_run import ANNOTATORS, SCATTERED, UNITS, Job, Protocol, finished
from samadapt.evaluation.split import NestedSplit, nested_split
from samadapt.training.run import Plan, make_plan

Execute = Callable[[Job, Path, Callable[[float], None]], dict[str, Any]]
"""Plays one job in a folder, tells the share that is done (0..1), and returns the result or ``{"failed": why}``."""


@dataclass(frozen=True)
class Simulation:
    """What is simulated.

    Attributes:
        studies: folder of the cases, all labelled.
        labels: the classes, in order.
        strategies: names, see ``simulate_pool.names``.
        recipes: names of recipes.
        units: of ``simulate_run.UNITS``.
        seeds: of all draws.
        testing: number of test cases.
        pool: number of cases that may be labelled; None: all beside the test cases' patients.
        protocol: what every run does.
        settings: as ``AppConfig.from_strings`` takes them; the same for every run.

    Raises:
        ConfigError: an unknown name, or nothing to simulate.
    """

    studies: Path
    labels: LabelMap
    strategies: tuple[str, ...]
    recipes: tuple[str, ...]
    units: tuple[str, ...]
    seeds: tuple[int, ...]
    testing: int
    pool: int | None
    protocol: Protocol
    settings: Mapping[str, str]

    def __post_init__(self) -> None:
        _known("strategy", "--strategies", self.strategies, simulate_pool.names())
        _known("recipe", "--recipes", self.recipes, recipes.names(), recipes.families(recipes.names()))
        _known("unit", "--unit", self.units, UNITS)
        _known("annotator", "--annotator", (self.protocol.annotator,), ANNOTATORS)
        for option, values in (
            ("--strategies", self.strategies),
            ("--recipes", self.recipes),
            ("--unit", self.units),
            ("--seeds", self.seeds),
        ):
            if not values:
                raise ConfigError("nothing is named", where=option, remedy="Give a comma list.")

    @property
    def arms(self) -> list[tuple[str, str]]:
        """Strategy and unit of every way to choose; slices drawn blindly need no strategy."""
        pairs = [(name, unit) for unit in self.units if unit != SCATTERED for name in self.strategies]
        return [*pairs, *([("", SCATTERED)] if SCATTERED in self.units else [])]

    def jobs(self, cases: Sequence[Case], plan: Plan, output: Path) -> dict[str, Job]:
        """Every run by its key: all ways to choose of one seed after each other.

        Raises:
            InputError: too few labelled cases.
            ConfigError: settings that a recipe does not go with.
        """
        found = {}
        for recipe in self.recipes:
            for seed in self.seeds:
                split = nested_split(cases, self.testing, seed)
                pool = [case.id for case in split.training(self._pool_size(split), seed)]
                for strategy, unit in self.arms:
                    job = Job(
                        str(self.studies.resolve()),
                        list(self.labels.names),
                        recipe,
                        strategy,
                        unit,
                        seed,
                        sorted(pool),
                        [case.id for case in split.testing],
                        plan.window.to_dict(),
                        plan.image_size,
                        self.protocol,
                        dict(self.settings),
                        str(output.resolve()),
                    )
                    _ = recipes.configured(job.config)  # refuses now what the run would refuse later
                    found[_key(job)] = job
        return found

    def _pool_size(self, split: NestedSplit) -> int:
        return len(split.available) if self.pool is None else self.pool


def simulate(
    simulation: Simulation, output: Path, progress: Progress, execute: Execute | None = None
) -> simulate_report.Report:
    """Do every run that ``output`` does not have yet, and write the report, also when interrupted.

    Args:
        simulation: what to simulate.
        output: folder of results, models, caches and report.
        progress: told about every run and round.
        execute: does one run; by default in a process of its own.

    Raises:
        ConfigError: ``output`` holds a simulation of other cases or with other settings, or a recipe's settings are
            wrong.
        StateError: another call measures into ``output``.
        InputError: too few labelled cases, or a results file that cannot be read.
    """
    cases = find_cases(simulation.studies)
    for seed in simulation.seeds:  # before every case is read
        nested_split(cases, simulation.testing, seed)
    labelled = [case for case in cases if case.label]
    plan = make_plan(labelled, simulation.labels, AppConfig.from_strings(simulation.settings))
    jobs = simulation.jobs(cases, plan, output)
    with alone_in(output):
        records = Records(output / RESULTS, PROGRAM)
        where = {"studies": str(simulation.studies.resolve())}
        records.claim("simulation", _shared(simulation, labelled, plan), where)
        try:
            _play(jobs, records, output, progress, execute or in_own_process)
        finally:
            report = simulate_report.write(records.value, output)
    return report


def in_own_process(job: Job, folder: Path, tell: Callable[[float], None]) -> dict[str, Any]:
    """Do one job in a process of its own; its result, with peak memory and time, or ``{"failed": why}``."""
    told = 0

    def watch() -> None:
        nonlocal told
        done = len(finished(folder)["rounds"])
        if done > told:
            told = done
            tell(done / job.protocol.rounds)

    return run_job("samadapt.evaluation.simulate_run", asdict(job), folder, watch)


def _play(jobs: Mapping[str, Job], records: Records, output: Path, progress: Progress, execute: Execute) -> None:
    wanted = {key: _identity(job) for key, job in jobs.items()}
    missing = [key for key in jobs if records.kept(key, wanted[key]) is None]
    done = len(jobs) - len(missing)
    for key in missing:
        job, started = jobs[key], time.monotonic()

        def tell(share: float, job: Job = job, started: float = started, done: int = done) -> None:
            left = _time_left(records, time.monotonic() - started, share, len(jobs) - done)
            progress(f"{done + 1} of {len(jobs)}: {_describe(job)}; {left}", done + share, len(jobs))

        def run(job: Job = job, tell: Callable[[float], None] = tell) -> dict[str, Any]:
            folder = output / "runs" / _key(job).replace(" ", "-").replace("/", "_")
            folder.mkdir(parents=True, exist_ok=True)
            return execute(job, folder, tell)

        tell(0.0)
        records.measure(key, wanted[key], run)
        done += 1
    progress("writing the report", done, len(jobs))


def _identity(job: Job) -> dict[str, Any]:
    return {name: getattr(job, name) for name in ("recipe", "strategy", "unit", "seed", "pool", "testing")}


def _key(job: Job) -> str:
    return " ".join(filter(None, [job.recipe, job.strategy, job.unit, str(job.seed)]))


def _describe(job: Job) -> str:
    return f"{simulate_report.arm(job.strategy, job.unit)}, {job.recipe}, seed {job.seed}"


def _shared(simulation: Simulation, labelled: Sequence[Case], plan: Plan) -> dict[str, Any]:
    return {
        "labels": list(simulation.labels.names),
        "settings": dict(sorted(simulation.settings.items())),
        "labelled cases": [case.id for case in labelled],
        "number of test cases": simulation.testing,
        "size of the pool": simulation.pool,
        "protocol": asdict(simulation.protocol),
        "window": plan.window.to_dict(),
        "image size": plan.image_size,
    }


def _time_left(records: Records, elapsed: float, share: float, runs: int) -> str:
    """An estimate by the runs that are done; before the first, by the rounds of this one.

    Args:
        records: of the runs that are done.
        elapsed: seconds that this run has taken so far.
        share: 0..1, of its rounds that are done.
        runs: that are not done, this one among them.
    """
    known = records.typical_seconds()
    if known is None and not share:
        return "the first round tells how long it takes"
    return f"about {in_words((elapsed / share if known is None else known) * (runs - share))} left"


def _known(
    what: str, option: str, given: Sequence[str], known: Sequence[str], shown: Sequence[str] | None = None
) -> None:
    for name in given:
        if name not in known:
            raise ConfigError(f"unknown {what} {name!r}", where=option, remedy=closest(name, list(known), shown))
