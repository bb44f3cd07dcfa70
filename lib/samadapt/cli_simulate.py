"""``samadapt simulate``: which strategy makes the most of an annotator's time, played from known labels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from samadapt.cli import Conf, Json, Studies, _label_map, _open, _settings, _whole_numbers, _words, app
from samadapt.config import AppConfig
from samadapt.errors import ConfigError
from samadapt.terminal import figure, table, terminal

OWN_OPTIONS = {"recipe", "labels", "seed", "max_train_minutes", "max_steps", "image_size"}
FIXED = {"planes", "slices_per_case", "synthesis"}


@app.command()
def simulate(
    studies: Studies,
    strategies: Annotated[
        str, typer.Option(help="Ways to choose the next case; epistemic is MONAI Label's own, as a rival.")
    ] = "auto,random,random_fg,epistemic",
    recipes: Annotated[
        str, typer.Option(help="Recipes; those on the frozen encoder (autosam_...) train from cached embeddings.")
    ] = "autosam_linear",
    labels: Annotated[
        str | None, typer.Option(help="Structures in order: a comma list, JSON, or a labels.json.")
    ] = None,
    unit: Annotated[
        str,
        typer.Option(
            help="What is labelled: volumes; slices (that the strategy suggests, of more cases); scattered (slices "
            "drawn blindly). Several are compared."
        ),
    ] = "volumes",
    seeds: Annotated[str, typer.Option(help="Of test cases, pool and trainings.")] = "0,1,2,3,4",
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Rounds of labelling and training.")] = 8,
    per_round: Annotated[int, typer.Option(min=1, max=1000, help="Cases labelled in a round.")] = 1,
    slices: Annotated[int, typer.Option(min=1, max=1000, help="With slices: how many of one case.")] = 4,
    test: Annotated[int, typer.Option(min=1, help="Test cases, of other patients than the pool.")] = 10,
    pool: Annotated[int | None, typer.Option(min=1, help="Cases that may be labelled (default: all others).")] = None,
    steps: Annotated[int, typer.Option(min=1, max=10**6, help="Optimiser steps of a training.")] = 300,
    copies: Annotated[
        int, typer.Option(min=0, max=10**6, help="Augmented copies of a slice to learn from; 0 is the quickest.")
    ] = 0,
    image_size: Annotated[str, typer.Option(help="Model input in pixels, or 'auto'.")] = "auto",
    annotator: Annotated[
        str, typer.Option(help="robot: corrects what the model found, by clicks. full: draws everything by hand.")
    ] = "robot",
    case_seconds: Annotated[float, typer.Option(min=0, help="The annotator's time to open a case.")] = 20.0,
    look_seconds: Annotated[float, typer.Option(min=0, help="To look at one slice.")] = 1.0,
    click_seconds: Annotated[float, typer.Option(min=0, help="For one click.")] = 2.4,
    outline_seconds: Annotated[float, typer.Option(min=0, help="To draw one structure in one slice by hand.")] = 30.0,
    output: Annotated[Path, typer.Option(help="Folder of the report and all results.")] = Path("simulation"),
    conf: Conf = None,
    as_json: Json = False,
) -> None:
    """Play the whole loop from full labels, strategy by strategy; write a report. Stop and go on whenever you like."""
    given = _settings(conf)
    if taken := sorted(given.keys() & OWN_OPTIONS):
        raise ConfigError(
            f"{taken[0]!r} has an option of its own", where="--conf", remedy="See samadapt simulate --help."
        )
    if fixed := sorted(given.keys() & FIXED):
        raise ConfigError(f"{fixed[0]!r} cannot be simulated", where="--conf", remedy="Leave it out.")
    settings = {**given, "image_size": image_size}
    config = AppConfig.from_strings({**settings, **({"labels": labels} if labels else {})})
    found, project = _open(studies)
    label_map = _label_map(studies, found, project, config.labels)
    from samadapt.evaluation import simulate as simulating
    from samadapt.evaluation.annotator import Costs
    from samadapt.evaluation.simulate_run import Protocol

    costs = Costs(case_seconds, look_seconds, click_seconds, outline_seconds)
    simulation = simulating.Simulation(
        studies,
        label_map,
        tuple(_words(strategies)),
        tuple(_words(recipes)),
        tuple(_words(unit)),
        _whole_numbers(seeds, "--seeds"),
        test,
        pool,
        Protocol(rounds, per_round, slices, steps, copies, annotator, costs),
        settings,
    )
    with terminal(as_json=as_json) as out:
        with out.bar("reading the cases") as update:
            report = simulating.simulate(
                simulation,
                output,
                lambda text, done, total: update(description=text, completed=done, total=total),
            )
        rows = [
            [row.recipe, row.arm, figure(row.areas["slices"].mean), figure(row.final.mean), figure(row.minutes, 1)]
            for row in report.rows
        ]
        columns = ["recipe", "strategy", "AUBC", "last Dice", "minutes"]
        shown = table(f"Means over {len(simulation.seeds)} seeds, by labelled slices", columns, rows)
        failures = [f"failed: {f['recipe']}, {f['arm']}, seed {f['seed']}: {f['why']}" for f in report.failed]
        out.result(report, shown, "\n".join([str(report.page), *failures]))
    if report.failed:
        raise typer.Exit(1)
