"""``samadapt models``: which model answers annotators, why the others do not, and the way back."""

from __future__ import annotations

import getpass
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from samadapt.config import AppConfig
from samadapt.errors import InputError
from samadapt.terminal import figure, table, terminal

if TYPE_CHECKING:
    from samadapt.evaluation.intervals import Estimate
    from samadapt.versions import Version, Versions

app = typer.Typer(no_args_is_help=True, help="The versions of a studies folder's model: list, look at, put in service.")

Json = Annotated[bool, typer.Option("--json", help="Write one JSON object to standard output, and nothing else there.")]
Studies = Annotated[Path, typer.Argument(help="Studies folder.")]
Name = Annotated[str, typer.Argument(metavar="VERSION", help="For instance v0002.")]
Weights = Annotated[Path | None, typer.Option("--weights", help="The backbone's weights file, if not its own.")]


@app.command("list")
def list_versions(studies: Studies, as_json: Json = False) -> None:
    """All versions, oldest first: what each was trained on, its Dice, and whether it answers annotators."""
    with terminal(as_json=as_json) as out:
        summaries = [version.summary() for version in _open(studies).all()]
        rows = [
            [
                item["version"],
                "in service" if item["in_service"] else item["verdict"],
                (item["finished"] or "-")[:16].replace("T", " "),
                item["recipe"] or "-",
                f"{item['cases']} + {item['held_out']}",
                _dice(item["dice"], item["measured"]),
            ]
            for item in summaries
        ]
        columns = ["version", "verdict", "finished", "recipe", "cases + held out", "Dice (95 % interval)"]
        shown = table(f"Models of {studies}", columns, rows) if rows else "Nothing has been trained there yet."
        refused = [f"{item['version']}: {item['reason']}" for item in summaries if item["verdict"] == "refused"]
        out.result({"versions": summaries}, shown, *refused)


@app.command()
def show(studies: Studies, version: Name, as_json: Json = False) -> None:
    """Everything about one version: its data, settings, figures per case, and what happened to it."""
    with terminal(as_json=as_json) as out:
        found = _open(studies).get(version)
        out.result(found.to_dict(), *_details(found))


@app.command()
def promote(studies: Studies, version: Name, weights: Weights = None, as_json: Json = False) -> None:
    """Put a version in service. A running server takes it up with the next request."""
    with terminal(as_json=as_json) as out:
        versions = _open(studies)
        chosen = versions.get(version)
        done = versions.promote(version, _who(), _config(chosen, weights))
        out.result(done.summary(), f"{version} is in service now, {done.events[-1]['reason']}.")


@app.command()
def rollback(studies: Studies, weights: Weights = None, as_json: Json = False) -> None:
    """Put the version in service again that was so before the present one."""
    with terminal(as_json=as_json) as out:
        versions = _open(studies)
        done = versions.rollback(_who(), _config(versions.previous(), weights))
        out.result(done.summary(), f"{done.name} is in service again, {done.events[-1]['reason']}.")


def _open(studies: Path) -> Versions:
    if not studies.is_dir():
        raise InputError("no such folder", where=studies, remedy="Name the studies folder.")
    from samadapt.project import Project
    from samadapt.versions import Versions

    return Versions(Project(studies))


def _config(version: Version, weights: Path | None) -> AppConfig:
    """Settings in which the backbone of ``version`` has these weights."""
    if weights is None or version.info is None:
        return AppConfig()
    return AppConfig.from_strings({"backbone": version.info.backbone, "weights": str(weights)})


def _who() -> str:
    return f"{getpass.getuser()}, in the terminal"


def _dice(found: Estimate | None, measured: str | None) -> str:
    if found is None:
        return "-"
    interval = "" if found.low != found.low else f" ({figure(found.low)} to {figure(found.high)})"
    return f"{figure(found.mean)}{interval} {measured}"


def _details(version: Version) -> list[Any]:
    """Tables and lines for people."""
    manifest = version.manifest
    shown: list[Any] = [
        f"{version.name}: {'in service' if version.in_service else version.verdict}. {version.reason}",
        f"File: {version.file}",
    ]
    if version.info is None:
        return shown
    info, dice = version.info, version.dice
    shown += [
        f"Structures: {', '.join(info.labels.names)}",
        f"Recipe {info.recipe.name} (seed {info.recipe.seed}) on {info.backbone}, {info.image_size} px; base weights "
        f"{manifest.get('weights', '')} {info.weights_sha256[:12]}...",
        f"Trained {manifest.get('steps', '?')} steps in {manifest.get('seconds', '?')} s from "
        f"{manifest.get('parent') or 'the plain model'}; finished {manifest.get('finished', '?')}",
        f"Cases: {', '.join(manifest.get('cases', []))}; held out: {', '.join(manifest.get('held_out', [])) or 'none'}",
        f"Dice: {_dice(*dice) if dice else 'not measured'}",
    ]
    if crossed := manifest.get("cross_validation"):
        shown.append(f"  {crossed['method']}")
    if prompts := manifest.get("prompts"):
        shown.append(f"Clicks: {prompts}")
    if by_case := manifest.get("held_out_by_case"):
        names = info.labels.names
        rows = [[case, *(_number(scores.get(name)) for name in names)] for case, scores in by_case.items()]
        shown.append(table("Dice on the held-out cases", ["case", *names], rows))
    if rounds := manifest.get("rounds"):
        rows = [[str(r["round"]), str(r["step"]), _number(r["loss"]), _mean(r["dice"])] for r in rounds]
        shown.append(table("Curves", ["round", "step", "loss", "held-out Dice"], rows))
    if settings := manifest.get("settings"):
        shown.append(f"Settings: {json.dumps(settings)}")
    if version.events:
        rows = [[e["time"][:19].replace("T", " "), e["event"], e["by"], e["reason"]] for e in version.events]
        shown.append(table("History", ["when", "what", "by", "why"], rows))
    return shown


def _number(value: float | None) -> str:
    return "-" if value is None else figure(value)


def _mean(scores: dict[str, float | None]) -> str:
    found = [score for score in scores.values() if score is not None]
    return figure(sum(found) / len(found)) if found else "-"
