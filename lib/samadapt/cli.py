"""The command ``samadapt``. Every command takes ``--json`` and then writes one JSON object, also for an error.

Imports that take seconds (torch) stand inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer._click.exceptions import ClickException  # typer carries its own click and does not export this base class

from samadapt import __version__, cli_models
from samadapt.config import AppConfig, closest
from samadapt.errors import ConfigError, InputError, SamAdaptError, StateError
from samadapt.memory import keep_freed_memory
from samadapt.terminal import figure, plain, table, terminal

if TYPE_CHECKING:
    from samadapt.data.cases import Case
    from samadapt.data.labels import LabelMap
    from samadapt.data.slice_cache import SliceCache
    from samadapt.model import AdaptedModel
    from samadapt.project import Project
    from samadapt.recipes import Recipe

STOPPED = 130
"""Exit code after Ctrl-C, as shells have it."""

MASK_FORMATS = (".nii.gz", ".nii", ".nrrd", ".png")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Adapt Segment-Anything models to your own images while you label them.",
    epilog="Start with: samadapt demo",
)
app.add_typer(cli_models.app, name="models")

Json = Annotated[bool, typer.Option("--json", help="Write one JSON object to standard output, and nothing else there.")]
Studies = Annotated[Path, typer.Argument(help="Folder with the images, and labels/ or labels/final in it.")]
Conf = Annotated[
    list[str] | None,
    typer.Option(
        "--conf", metavar="KEY=VALUE", help=f"A setting; repeatable. Keys: {', '.join(AppConfig.__annotations__)}."
    ),
]
Model = Annotated[
    Path | None, typer.Option("--model", help="Model file (default: the studies folder's published model).")
]
Weights = Annotated[Path | None, typer.Option("--weights", help="The backbone's weights file, if not its own.")]


def main() -> None:
    """Run the command line. Errors become one message (or JSON object) and an exit code, never a traceback."""
    keep_freed_memory()
    # MONAI's import of a network that is not used here; nothing that whoever runs a command could change.
    warnings.filterwarnings("ignore", r"`torch\.jit\.interface` is deprecated", FutureWarning)
    try:
        code = app(standalone_mode=False)
        if code == STOPPED:  # what typer makes of Ctrl-C, without a word
            raise KeyboardInterrupt
        sys.exit(code)
    except SamAdaptError as error:
        _fail(error.to_dict(), str(error), error.exit_code)
    except ClickException as error:
        message = error.format_message()
        asked = "--conf" in sys.argv and "No such option" not in message
        remedy = "Settings are written --conf KEY=VALUE." if asked else None
        text = f"{message} {remedy}" if remedy else message
        _fail({"error": "UsageError", "what": message, "where": None, "remedy": remedy}, text, error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _fail({"error": "Stopped", "what": "stopped", "where": None, "remedy": None}, "Stopped.", STOPPED)
    except Exception as error:
        if os.environ.get("SAMADAPT_DEBUG"):
            traceback.print_exc()
        what = f"unexpected {type(error).__name__}: {error}"
        remedy = "Run again with SAMADAPT_DEBUG=1 and report what it prints."
        _fail({"error": "Unexpected", "what": what, "where": None, "remedy": remedy}, f"{what}. {remedy}", 1)


def _fail(value: dict[str, Any], text: str, code: int) -> None:
    if "--json" in sys.argv:
        with terminal(as_json=True) as out:
            out.result(value)
    else:
        print(f"samadapt: {text}", file=sys.stderr)
        if value["error"] == "UsageError":
            print("Try: samadapt --help", file=sys.stderr)
    sys.exit(code)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"samadapt {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None: ...


@app.command()
def demo(
    once: Annotated[bool, typer.Option("--once", help="Stop the server after the loop.")] = False,
    folder: Annotated[Path, typer.Option(help="Where data and results go.")] = Path("demo"),
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port (default: 8000, or the next free one).")
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.05, max=60, help="Longest training, in minutes.")] = 1.25,
    as_json: Json = False,
) -> None:
    """Play the loop once on sample data: label, train, see it improve. Then keep the server up."""
    from samadapt.demo import Demo

    with terminal(as_json=as_json) as out, Demo(folder, out, port=port, minutes=minutes) as played:
        played.loop()
        if not once:
            played.stay()


@app.command()
def serve(
    studies: Annotated[
        str, typer.Option(help="Folder with image files or with DICOM series, or the address of a DICOMweb store.")
    ],
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than 127.0.0.1 are open to the network.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    conf: Conf = None,
    as_json: Json = False,
) -> None:
    """Start the MONAI Label server with the app, until Ctrl-C."""
    from samadapt.server import launch

    settings = _settings(conf)
    if not studies.startswith(("http://", "https://")):
        folder = Path(studies).expanduser().resolve()
        if not folder.is_dir():
            raise InputError("no such folder", where=studies, remedy="Name the folder that holds the images.")
        studies = str(folder)
    launch.require_free(host, port)
    variables: dict[str, str] = {}
    address = None
    if not studies.startswith(("http://", "https://")):
        from samadapt.dicomweb import child

        folder = Path(studies)
        if launch.needs_dicomweb(folder):
            served = child.start(folder)
            address = studies = served.address
            variables = {**child.host_environment(folder, address), **served.variables()}
        else:
            variables = child.start_for_volumes(folder)
            address = variables[child.ADDRESS]
    words = launch.command(studies, host, port, settings)
    with terminal(as_json=as_json) as out:
        value = {"url": f"http://{host}:{port}", "pid": os.getpid(), "command": words}
        out.result(value | ({"dicomweb": address} if address else {}), f"http://{host}:{port}")
    if as_json:
        os.dup2(2, 1)  # the server is this very process; its log must not follow the JSON object
    launch.run(studies, host, port, settings, variables)


@app.command()
def train(
    studies: Studies,
    labels: Annotated[
        str | None, typer.Option(help="Structures in order: a comma list, JSON, or a labels.json.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="How the model adapts: see `samadapt recipes`.")] = None,
    conf: Conf = None,
    as_json: Json = False,
) -> None:
    """Learn from every label of a studies folder. A training that was stopped goes on where it was."""
    settings = _settings(conf)
    settings |= {key: text for key, text in (("labels", labels), ("recipe", recipe)) if text is not None}
    config = AppConfig.from_strings(settings)
    cases, project = _open(studies)
    label_map = _label_map(studies, cases, project, config.labels)
    from samadapt.training import train as run

    with terminal(as_json=as_json) as out:
        with out.bar("starting") as update:

            def progress(record: dict[str, Any]) -> None:
                if record["state"] == "failed":  # the error itself follows
                    return
                loss = f", loss {record['loss']:.3f}" if record.get("loss") is not None else ""
                update(
                    completed=record["epoch"], total=record["total_epochs"], description=f"{record['message']}{loss}"
                )

            result = run(cases, label_map, config, project, progress)
        value = {**plain(result), "labels": label_map.names}
        rows = [[name, figure(score)] for name, score in result.dice.items()]
        if result.interval and not math.isnan(result.interval.low):
            rows.append(["mean, 95 % interval", f"{figure(result.interval.low)} to {figure(result.interval.high)}"])
        shown = [table("Dice on the held-out cases", ["structure", "Dice"], rows)] if rows else []
        lines = [str(result.model), f"{result.steps} steps in {result.seconds:.0f} s; {result.reason}."]
        if result.clicks.objects:
            scores = result.clicks
            lines.append(f"One click: Dice {scores.adapted:.2f}, by the plain model {scores.plain:.2f}.")
        ending = "\n".join([*lines, *result.remarks])
        out.result(value, *shown, ending)


@app.command()
def synthesize(
    studies: Studies,
    output: Annotated[Path, typer.Option(help="PNG to write.")],
    count: Annotated[int, typer.Option(min=1, max=200, help="Samples to show.")] = 24,
    seed: Annotated[int, typer.Option(min=0, help="Of all draws; trainings take 0.")] = 0,
    blind: Annotated[
        bool, typer.Option("--random-exemplars", help="Draw the exemplars blindly, to compare with the usual choice.")
    ] = False,
    labels: Annotated[str | None, typer.Option(help="As for train.")] = None,
    conf: Conf = None,
    as_json: Json = False,
) -> None:
    """Show synthetic slices that a training with synthesis would learn from, in one picture."""
    if output.suffix.lower() != ".png":
        raise ConfigError("the picture is a PNG", where="--output", remedy="Give a name that ends in .png.")
    settings = _settings(conf)
    if labels is not None:
        settings["labels"] = labels
    config = AppConfig.from_strings(settings)
    cases, project = _open(studies)
    label_map = _label_map(studies, cases, project, config.labels)
    from samadapt.data.synthesis import choose_exemplars, random_exemplars
    from samadapt.evaluation import contact_sheet
    from samadapt.training.synthetic import RANGES, SyntheticSlices

    kind = config.synthesis if config.synthesis in RANGES else "exemplar"
    with terminal(as_json=as_json) as out, out.bar("reading the labelled cases") as update:

        def show(done: int, total: int) -> None:
            update(completed=done, total=total)

        with contact_sheet.training_slices(cases, label_map, config, project, show) as prepared:
            missing = contact_sheet.missing_classes(prepared, label_map)
            choose = partial(random_exemplars, seed=seed) if blind else choose_exemplars
            bank = SyntheticSlices(prepared, seed, choose, RANGES[kind], config.synthetic_share)
            areas = contact_sheet.draw(bank, label_map, count, output)
        exemplars = [{"case": case.id, "slice": index} for case, index in bank.exemplars]
        value = {
            "sheet": output,
            "labels": label_map.to_dict(),
            "seed": seed,
            "synthesis": kind,
            "exemplars": exemplars,
            "backgrounds": len(bank.backgrounds),
            "share": bank.share,
            "remark": bank.remark,
            "missing": missing,
            "samples": areas,
        }
        ending = (
            f"{count} samples from {len(exemplars)} exemplars on {len(bank.backgrounds)} backgrounds: {output}\n"
            f"In a training {100 * bank.share:.0f} % of the slices would be synthetic."
        )
        absent = f"No training case shows {', '.join(missing)}, so no sample does." if missing else ""
        out.result(value, *filter(None, [ending, bank.remark, absent]))


@app.command()
def pretrain(
    studies: Annotated[Path, typer.Argument(help="Folder with the images; labels are not needed.")],
    output: Annotated[Path, typer.Option(help="The new weights file, .safetensors; a picture (.png) goes beside it.")],
    backbone: Annotated[str, typer.Option(help="Whose image encoder to pretrain.")] = "lite_medsam",
    weights: Weights = None,
    image_size: Annotated[int, typer.Option(help="Model input in pixels.")] = 128,
    minutes: Annotated[
        float | None, typer.Option(help="How long (default: 30, or no limit where --steps is given).")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="At most so many optimiser steps.")] = None,
    as_json: Json = False,
) -> None:
    """Accustom a backbone to images without labels; use the result as --conf weights=FILE. Goes on after a kill."""
    texts = {"backbone": backbone, "weights": weights, "image_size": image_size}
    config = AppConfig.from_strings({key: text for key, text in texts.items() if text is not None})
    cases, _ = _open(studies)
    from samadapt.training import pretrain as pretraining

    limit = pretraining.MINUTES if minutes is None and steps is None else minutes
    wanted = pretraining.Pretraining(backbone, config.weights, image_size, limit, steps)
    with terminal(as_json=as_json) as out:
        with out.bar("starting") as update:

            def report(message: str, share: float) -> None:
                update(description=message, completed=100 * share, total=100)

            result = pretraining.pretrain(cases, output, wanted, report, out.note)
        ending = (
            f"{result.weights}\n{result.steps} steps in {result.seconds:.0f} s on {result.images} images; loss on the "
            f"slices of {result.picture}: {result.shown_before:.3f} before, {result.shown_after:.3f} after\n"
            f"Use it with --conf backbone={backbone} --conf weights={result.weights}; models trained on it need it, "
            f"for infer and evaluate as --weights {result.weights}."
        )
        out.result(result, ending)


@app.command()
def infer(
    sources: Annotated[list[Path], typer.Argument(metavar="STUDIES_OR_IMAGE...", help="Folders or image files.")],
    output: Annotated[Path, typer.Option(help="Folder for the masks.")],
    model: Model = None,
    studies: Annotated[Path | None, typer.Option(help="Take the published model of this studies folder.")] = None,
    structure: Annotated[list[str] | None, typer.Option("--structure", help="Only this one; repeatable.")] = None,
    form: Annotated[str | None, typer.Option("--format", help=f"One of {', '.join(MASK_FORMATS)}.")] = None,
    weights: Weights = None,
    as_json: Json = False,
) -> None:
    """Segment whole images without a prompt; masks are written on each image's own grid."""
    if form is not None and form not in MASK_FORMATS:
        raise ConfigError(f"masks are not written as {form!r}", where="--format", remedy=closest(form, MASK_FORMATS))
    images = _images(sources)
    file = _model_file(model, [studies] if studies else sources)
    loaded, cache = _load(file, weights), _cache_beside(file)
    done: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    with terminal(as_json=as_json) as out:
        with out.bar("starting") as update:
            for number, (name, path) in enumerate(images.items(), start=1):
                update(description=f"{name} ({number} of {len(images)})", completed=0)
                try:
                    done.append({"id": name, **_infer_one(loaded, cache, name, path, output, form, structure, update)})
                except InputError as error:
                    failed.append({"id": name, **error.to_dict()})
                    out.note(f"{name}: {error}")
        rows = [[item["id"], str(item["mask"]), str(sum(item["voxels"].values()))] for item in done]
        shown = [table(f"Masks by {file.name}", ["image", "mask", "voxels"], rows)] if rows else []
        out.result({"model": file, "labels": loaded.info.labels.to_dict(), "masks": done, "failed": failed}, *shown)
    if failed:
        raise typer.Exit(InputError.exit_code)


def _cache_beside(model: Path) -> SliceCache | None:
    """The cache of the project that a model file belongs to, which the server and trainings fill, too."""
    from samadapt.data.slice_cache import SliceCache
    from samadapt.project import FOLDER, Project

    root = model.resolve().parent.parent
    return SliceCache(Project(root.parent).cache, AppConfig().cache_gib) if root.name == FOLDER else None


def _infer_one(
    model: AdaptedModel,
    cache: SliceCache | None,
    name: str,
    path: Path,
    output: Path,
    form: str | None,
    structures: list[str] | None,
    update: Callable[..., None],
) -> dict[str, Any]:
    from samadapt.data.volume import read_volume, write_mask
    from samadapt.inference.auto import segment

    volume = read_volume(path)
    mask = segment(model, volume, structures or None, lambda done, total: update(completed=done, total=total), cache)
    target = output / f"{name}{form or ('.nii.gz' if volume.geometry.in_space else '.png')}"
    names = model.info.labels.names
    write_mask(target, mask, volume.geometry, names=dict(enumerate(names, start=1)))
    return {"mask": target, "voxels": {label: int((mask == n).sum()) for n, label in enumerate(names, start=1)}}


@app.command()
def embed(studies: Studies, conf: Conf = None, as_json: Json = False) -> None:
    """Encode every image ahead of time, so that clicks and masks come sooner. Stop and go on whenever you like."""
    config = AppConfig.from_strings(_settings(conf))
    cases, project = _open(studies)
    from samadapt.data.volume import read_volume
    from samadapt.inference.ahead import embed_volume
    from samadapt.inference.auto import axes_seen
    from samadapt.server.models import Models

    failed: list[dict[str, Any]] = []
    encoded = slices = 0
    with terminal(as_json=as_json) as out:
        with out.bar("loading the model") as update:
            models = Models(config, project)
            models.cache.require()
            served = models.current()
            for number, case in enumerate(cases, start=1):
                update(description=f"{case.id} ({number} of {len(cases)})", completed=0)

                def show(done: int, total: int) -> None:
                    update(completed=done, total=total)

                try:
                    volume = read_volume(case.image)
                    slices += volume.geometry.slices(axes_seen(served.model.info, volume.geometry))
                    encoded += embed_volume(served.model, volume, models.cache, show)
                except InputError as error:
                    failed.append({"id": case.id, **error.to_dict()})
                    out.note(f"{case.id}: {error}")
        gib = models.cache.bytes_used() / 2**30
        value = {
            "model": served.version,
            "images": len(cases),
            "slices": slices,
            "slices_encoded": encoded,
            "cache_gib": gib,
        }
        full = " It is full: raise --conf cache_gib, or the oldest go." if models.cache.full() else ""
        ending = (
            f"{encoded} of {slices} slices in {len(cases)} images encoded for the model {served.version}, "
            f"the others were there; "
            f"the cache has {gib:.2f} of {config.cache_gib:g} GiB.{full}"
        )
        out.result({**value, "failed": failed}, ending)
    if failed:
        raise typer.Exit(InputError.exit_code)


@app.command()
def evaluate(
    studies: Studies,
    model: Model = None,
    every: Annotated[
        bool, typer.Option("--all", help="Also the cases (and patients) that the model learned from.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="PNG to write: the Dice that the model expects against the true one.")
    ] = None,
    weights: Weights = None,
    conf: Conf = None,
    as_json: Json = False,
) -> None:
    """Dice and HD95 (mm) per case and structure, on labelled cases that the model did not learn from.

    Of the settings only unlabelled_slices and absent_classes can be given.
    """
    from samadapt.config import parse_values
    from samadapt.data.cases import assume

    if plot is not None and plot.suffix.lower() != ".png":
        raise ConfigError("the picture is a PNG", where="--plot", remedy="Give a name that ends in .png.")
    config = AppConfig(**parse_values(_settings(conf), ("unlabelled_slices", "absent_classes")))
    cases, _ = _open(studies)
    cases = assume(cases, config.coverage)
    file = _model_file(model, [studies])
    loaded = _load(file, weights)
    chosen = _to_evaluate(cases, loaded, every=every)
    from samadapt.evaluation.metrics import mean_by_class

    names = loaded.info.labels.names
    with terminal(as_json=as_json) as out:
        scores = []
        with out.bar("starting") as update:
            for number, case in enumerate(chosen, start=1):
                update(description=f"{case.id} ({number} of {len(chosen)})", completed=number - 1, total=len(chosen))
                scores.append(_score(loaded, case))
        means = {key: mean_by_class([score[key] for score in scores]) for key in ("dice", "hd95_mm")}
        means["estimated_dice"] = mean_by_class([score["estimated_dice"] for score in scores])
        rows = [
            [
                score["case"],
                name,
                figure(score["dice"][name]),
                figure(score["estimated_dice"][name], 2),
                figure(score["hd95_mm"][name], 2),
            ]
            for score in [*scores, {"case": "mean", **means}]
            for name in names
        ]
        header = ["case", "structure", "Dice", "estimated", "HD95 mm"]
        shown = table(f"{file.name} on {len(scores)} cases", header, rows)
        agreed, said = _agreement(scores, loaded, plot)
        out.result({"model": file, "cases": scores, "mean": means, "estimates": agreed}, shown, said)


def _agreement(scores: list[dict[str, Any]], model: AdaptedModel, path: Path | None) -> tuple[dict[str, Any], str]:
    """How the estimates agree with the truth, for programs and for people; drawn to ``path``."""
    from samadapt.evaluation.agreement import agreement, plot

    names = model.info.labels.names
    estimated, truth = ({name: [s[key][name] for s in scores] for name in names} for key in ("estimated_dice", "dice"))
    if path is not None:
        kept = model.info.training.get("calibration", {})
        plot(estimated, truth, {name: kept[name]["error"] for name in names if name in kept}, path)
    agreed = agreement(list(chain(*estimated.values())), list(chain(*truth.values())))
    said = (
        f"Estimates and true Dice of {agreed.count} masks: rank correlation {figure(agreed.rank_correlation, 2)}, "
        f"mean error {figure(agreed.error, 2)}, estimates too high by {figure(agreed.bias, 2)}."
    )
    if agreed.not_found:
        said += f" Structures that are there but were not found, so that they have no estimate: {agreed.not_found}."
    seen = sorted({score["case"] for score in scores} & set(model.info.training.get("held_out", [])))
    if seen:
        said += f" They were set right on {len(seen)} of these {len(scores)} cases, so the error and bias flatter."
    return {**vars(agreed), "calibrated_on": seen}, said


def _score(model: AdaptedModel, case: Case) -> dict[str, Any]:
    from samadapt.evaluation.metrics import dice, hd95
    from samadapt.inference.examine import examine
    from samadapt.inference.quality import quality
    from samadapt.training.slices import read_case

    labels = model.info.labels
    volume, truth, report = read_case(case, labels)
    found, examination = examine(model, volume)
    worth = quality(labels.names, examination, model.info.training.get("calibration", {}))
    return {
        "case": case.id,
        "dice": dice(found, truth, labels, report.unknown),
        "estimated_dice": {name: worth.dice.get(name, math.nan) for name in labels.names},
        "hd95_mm": hd95(found, truth, labels, volume.geometry.spacing, report.unknown),
        "label": str(report),
    }


@app.command()
def compare(
    studies: Studies,
    recipes: Annotated[
        str,
        typer.Option(help="Recipes; and U-Nets of their own loop: unet_auto (2D or 3D by the data), unet_2d, unet_3d."),
    ],
    labels: Annotated[
        str | None, typer.Option(help="Structures in order: a comma list, JSON, or a labels.json.")
    ] = None,
    cases: Annotated[str, typer.Option(help="Numbers of labelled cases to learn from.")] = "1,4,8",
    seeds: Annotated[str, typer.Option(help="Of the choice of labelled cases and of the training.")] = "0,1",
    test: Annotated[int, typer.Option(min=1, help="Test cases, of other patients than all labelled ones.")] = 10,
    minutes: Annotated[float, typer.Option(min=0.05, max=1440, help="Training time of every run.")] = 1.0,
    image_size: Annotated[str, typer.Option(help="Model input in pixels, or 'auto'.")] = "auto",
    output: Annotated[Path, typer.Option(help="Folder of the report and all results.")] = Path("comparison"),
    conf: Conf = None,
    as_json: Json = False,
) -> None:
    """Train recipes on the same cases for the same time; write a report. Stop and go on whenever you like."""
    given = _settings(conf)
    if taken := sorted(given.keys() & {"recipe", "labels", "seed", "max_train_minutes", "image_size"}):
        raise ConfigError(
            f"{taken[0]!r} has an option of its own", where="--conf", remedy="See samadapt compare --help."
        )
    # Time alone is the budget, unless --conf max_steps says otherwise.
    settings = {"max_steps": str(10**6), **given, "max_train_minutes": f"{minutes:g}", "image_size": image_size}
    found, project = _open(studies)
    label_map = _label_map(studies, found, project, AppConfig.from_strings({"labels": labels} if labels else {}).labels)
    from samadapt.evaluation import compare as comparing

    comparison = comparing.Comparison(
        studies,
        label_map,
        tuple(_words(recipes)),
        _whole_numbers(cases, "--cases"),
        _whole_numbers(seeds, "--seeds"),
        test,
        settings,
    )
    with terminal(as_json=as_json) as out:
        out.note(f"Results go to {output}. Stop whenever you like: the same call goes on.")
        with out.bar("drawing the cases") as update:
            report = comparing.compare(
                comparison,
                output,
                lambda text, done, total: update(description=text, completed=done, total=total),
            )
        rows = [
            [
                row.recipe,
                str(row.labelled),
                f"{row.steps:g}",
                figure(row.scores.dice.mean),
                figure(row.scores.hd95.mean, 1),
                str(row.scores.missed),
            ]
            for row in report.rows
        ]
        columns = ["recipe", "labelled", "steps", "Dice", "HD95 mm", "missed"]
        shown = table(f"Means of {test} test cases", columns, rows)
        failures = [
            f"failed: {f['recipe']}, {f['labelled']} labelled, seed {f['seed']}: {f['why']}" for f in report.failed
        ]
        out.result(report, shown, "\n".join([str(report.page), *report.remarks, *failures]))
    if report.failed:
        raise typer.Exit(1)


def _words(text: str) -> list[str]:
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def _whole_numbers(text: str, option: str) -> tuple[int, ...]:
    words = _words(text)
    if wrong := [word for word in words if not word.isdecimal()]:
        raise ConfigError(f"{wrong[0]!r} is no whole number", where=option, remedy=f"Write {option} 1,4,8.")
    return tuple(sorted({int(word) for word in words}))


@app.command()
def recipes(
    backbone: Annotated[
        str, typer.Option(help="Count the parameters with this backbone, where the recipe has none of its own.")
    ] = "lite_medsam",
    image_size: Annotated[int | None, typer.Option(help="And at this size, in pixels.")] = None,
    classes: Annotated[int, typer.Option(min=1, max=1000, help="And for so many structures.")] = 1,
    reference: Annotated[bool, typer.Option("--reference", help="In the form of the papers' published code.")] = False,
    as_json: Json = False,
) -> None:
    """The ways to adapt, and how many parameters each one trains. Needs no weights."""
    size = {} if image_size is None else {"image_size": str(image_size)}
    AppConfig.from_strings({"backbone": backbone, **size})
    from samadapt import recipes as registry

    with terminal(as_json=as_json) as out:
        found: list[dict[str, Any]] = []
        names = registry.papers() if reference else registry.names()
        with out.bar("counting") as update:
            for number, name in enumerate(names):
                update(completed=number, total=len(names))
                recipe = registry.reference(name) if reference else registry.get(name)
                found.append(
                    {"name": name, "summary": recipe.summary, **_counts(recipe, classes, backbone, image_size)}
                )
        rows = [[r["name"], r["summary"], r["backbone"], *_counted(r)] for r in found]
        title = f"Recipes for {classes} structure{'s' if classes > 1 else ''}"
        out.result(found, table(title, ["recipe", "what it does", "backbone", "trains", "% of all", "clicks"], rows))


def _counted(found: Mapping[str, Any]) -> list[str]:
    """What it trains, in figures and per cent, and whether it takes clicks, for people."""
    if found["trainable_parameters"] is None:
        return ["?"] * 3
    return [f"{found['trainable_parameters']:,}", f"{found['percent']:.2f}", "yes" if found["takes_prompts"] else "no"]


def _counts(recipe: Recipe, classes: int, backbone: str, image_size: int | None) -> dict[str, Any]:
    """``recipes.count``; unknown for the few of peft's tuners that cannot be built without weights."""
    from samadapt.recipes import count

    try:
        return count(recipe, classes, backbone, image_size)
    except ConfigError:
        return {"backbone": recipe.backbone or backbone, "trainable_parameters": None, "percent": None}


@app.command("cases")
def list_cases(studies: Studies, as_json: Json = False) -> None:
    """All cases: which are labelled, which train, which are held out to judge models by, and why."""
    from samadapt.data.cases import find_cases
    from samadapt.project import Project
    from samadapt.training.ledger import Ledger

    with terminal(as_json=as_json) as out:
        found = find_cases(studies)
        known = {case.id: case for case in found}
        assigned = Ledger(Project(studies).ledger).explain(found)
        rows: list[dict[str, Any]] = [
            {
                "case": one.case,
                "patient": known[one.case].patient if one.case in known else None,
                "labelled": one.case in known and known[one.case].label is not None,
                "role": one.role,
                "why": one.why,
            }
            for one in assigned
        ]
        lines = [
            [row["case"], row["patient"] or "-", "yes" if row["labelled"] else "no", row["role"] or "-", row["why"]]
            for row in rows
        ]
        columns = ["case", "patient", "labelled", "role", "why"]
        shown = table(f"Cases of {studies}", columns, lines) if rows else f"There is no image in {studies}."
        out.result({"cases": rows}, shown)


@app.command()
def doctor(
    studies: Annotated[Path | None, typer.Option(help="Also check this studies folder.")] = None,
    conf: Conf = None,
    as_json: Json = False,
) -> None:
    """Check versions, weights, device, memory, disk and a studies folder; say how to mend what is wrong."""
    from samadapt import doctor as checks

    config = AppConfig.from_strings(_settings(conf))
    with terminal(as_json=as_json) as out:
        with out.bar("looking") as update:
            found = checks.examine(config, studies, lambda text: update(description=text))
        count = {status: sum(check.status == status for check in found) for status in checks.STATUSES}
        out.result({"checks": found, **count}, *map(_check_line, found), _summary(count))
    if count["problem"]:
        raise typer.Exit(1)


def _check_line(check: Any) -> str:
    from rich.markup import escape

    mark = {"ok": "[green]ok     [/]", "warning": "[yellow]warning[/]", "problem": "[red]problem[/]"}[check.status]
    remedy = f"\n          {escape(check.remedy)}" if check.remedy else ""
    return f"{mark}   {escape(check.name)}: {escape(check.what)}{remedy}"


def _summary(count: dict[str, int]) -> str:
    return "\n" + ", ".join(f"{n} {status}" for status, n in count.items())


def _settings(conf: Iterable[str] | None) -> dict[str, str]:
    """``["key=value", ...]`` as a dictionary, checked.

    Raises:
        ConfigError: no ``=``, the same key twice, or what ``AppConfig.from_strings`` refuses.
    """
    settings: dict[str, str] = {}
    for item in conf or ():
        key, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"{item!r} is not KEY=VALUE", where="--conf", remedy=f"Write --conf {item}=...")
        if key.strip() in settings:
            raise ConfigError(f"{key.strip()!r} is given twice", where="--conf", remedy="Give it once.")
        settings[key.strip()] = value.strip()
    AppConfig.from_strings(settings)
    return settings


def _open(studies: Path) -> tuple[list[Case], Project]:
    from samadapt.data.cases import find_cases
    from samadapt.data.dicom import is_dicom
    from samadapt.project import Project

    cases = find_cases(studies)
    if not cases and any(is_dicom(path) for path in studies.iterdir()):
        raise InputError(
            "DICOM files lie loose in this folder, where each case has a folder of its own",
            where=studies,
            remedy="Put each series into a folder: DIR/<case>/*.dcm. `samadapt serve` takes them as they lie.",
        )
    if not cases:
        raise InputError("no image found", where=studies, remedy="Name the folder that holds the images.")
    return cases, Project(studies)


def _label_map(studies: Path, cases: Sequence[Case], project: Project, configured: LabelMap | None) -> LabelMap:
    """What to learn: as given, else labels.json, else the names of the submitted labels, else the published model's.

    Raises:
        ConfigError: nobody has named the label values.
    """
    from samadapt.data.labels import LabelMap, class_names
    from samadapt.model import read_info

    if configured:
        return configured
    for path in (studies / "labels.json", project.root / "labels.json"):
        if path.is_file():
            return LabelMap.from_json(path)
    submitted = class_names(name for case in cases for _, name in sorted((case.values or {}).items()))
    if submitted:
        return LabelMap(tuple(submitted))
    published = project.published()
    if published:
        return read_info(published).labels
    raise ConfigError(
        "the label values have no names",
        where=studies,
        remedy="Give --labels first,second (in the order of the values 1, 2, ...) or put a labels.json there.",
    )


def _images_of(source: Path) -> dict[str, Path]:
    """Id -> image of one name on the command line: a file, a DICOM series, or a studies folder."""
    from samadapt.data.cases import find_cases
    from samadapt.data.dicom import is_dicom
    from samadapt.data.volume import image_suffix

    if not source.exists():
        raise InputError("no such file or folder", where=source, remedy="Name an image or a studies folder.")
    if source.is_file():
        suffix = image_suffix(source.name)
        return {source.name[: -len(suffix)] if suffix else source.stem: source}
    found = {case.id: case.image for case in find_cases(source)}
    series = not found and any(is_dicom(path) for path in source.iterdir() if path.is_file())
    return {source.resolve().name: source} if series else found


def _images(sources: Sequence[Path]) -> dict[str, Path]:
    images: dict[str, Path] = {}
    for source in sources:
        for name, path in _images_of(source).items():
            if name in images and images[name] != path:
                raise InputError(
                    f"two images are called {name!r}", where=path, remedy="Their masks would have one name: run twice."
                )
            images[name] = path
    if not images:
        raise InputError("no image found", where=sources[0], remedy="Name images or a folder that holds some.")
    return images


def _model_file(given: Path | None, folders: Sequence[Path]) -> Path:
    """``given``, else what the first of ``folders`` with a trained model has published."""
    from samadapt.project import Project

    if given is not None:
        return given
    published = (Project(folder).published() for folder in folders if folder.is_dir())
    found = next((path for path in published if path), None)
    if found is None:
        raise StateError(
            "nothing has been trained there yet", where=folders[0], remedy="Train first, or give --model FILE."
        )
    return found


def _load(file: Path, weights: Path | None) -> AdaptedModel:
    """The model, merged, on the device, in eval mode."""
    import torch

    from samadapt.model import AdaptedModel

    model = AdaptedModel.load(file, weights=weights)
    model.merge()
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def _to_evaluate(cases: Sequence[Case], model: AdaptedModel, *, every: bool) -> list[Case]:
    """The labelled cases; unless ``every``, without those whose image or patient the model has learned from."""
    labelled = [case for case in cases if case.label]
    if not labelled:
        raise StateError("no case is labelled", remedy="Labels belong into labels/final (or labels/).")
    if every:
        return labelled
    learned = set(model.info.training.get("cases", []))
    patients = {case.patient for case in cases if case.id in learned and case.patient}
    chosen = [case for case in labelled if case.id not in learned and case.patient not in patients]
    if not chosen:
        raise StateError(
            f"the model has learned from all {len(labelled)} labelled cases, so there is none to judge it by",
            remedy="Label another case, or use --all (figures on training cases flatter).",
        )
    return chosen


from samadapt import cli_simulate as cli_simulate  # noqa: E402  its command; it reads what stands above
