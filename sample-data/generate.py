"""Make the demo cohort: brain MR volumes that differ like real ones, with their true labels in a folder of their own.

    python sample-data/generate.py demo/studies

writes ``case_01.nii.gz ...``, ``labels.json`` and ``cohort.json`` (what made each case, with checksums) into
``demo/studies``, and the true labels under the same names into ``demo/studies_truth``. A run that was interrupted
continues where it stopped; a complete cohort is reused.
"""

import argparse
import dataclasses
import functools
import json
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
for folder_with_modules in (HERE, HERE.parent / "lib"):  # this folder is no installed package
    if str(folder_with_modules) not in sys.path:
        sys.path.append(str(folder_with_modules))

from anatomy import LABELS, load_anatomy  # noqa: E402
from scanner import acquire, draw_scan  # noqa: E402
from tqdm import tqdm  # noqa: E402

from samadapt.errors import ConfigError, SamAdaptError, StateError  # noqa: E402
from samadapt.files import atomic_path, sha256_of, write_json  # noqa: E402

VERSION = 1  # of what a seed means; raise it with every change that changes the volumes
MOST_CASES = 99
progress_bar = functools.partial(tqdm, desc="Sample data", unit="case")


@dataclasses.dataclass(frozen=True)
class Cohort:
    """Where a cohort lies: image and true label of each case id, and the label map (name -> value)."""

    folder: Path
    truth: Path
    images: dict[str, Path]
    truths: dict[str, Path]
    labels: dict[str, int]


def generate(
    folder: str | Path,
    cases: int = 14,
    seed: int = 0,
    truth: str | Path | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] = progress_bar,
) -> Cohort:
    """Make the cohort, or complete the one that is there.

    Args:
        folder: the studies folder; gets ``case_NN.nii.gz``, ``labels.json`` and ``cohort.json``.
        cases: number of cases, 1 to 99. Case n is the same whatever the number of cases.
        seed: another seed gives other heads and other scans.
        truth: folder for the true labels, outside ``folder``; by default ``folder`` with ``_truth`` appended.
        progress: wraps the loop over the cases; ``iter`` keeps it silent.

    Raises:
        ConfigError: ``cases`` or ``truth`` out of range.
        StateError: ``folder`` holds other images, or a cohort of another seed or version.
    """
    folder = Path(folder).resolve()
    truth = Path(truth).resolve() if truth is not None else folder.with_name(f"{folder.name}_truth")
    _check(folder, truth, cases)
    manifest = _open_manifest(folder, seed)
    for leftover in (*folder.glob(".*.tmp.*"), *truth.glob(".*.tmp.*")):  # of a run that was killed while writing
        leftover.unlink()
    with atomic_path(folder / "labels.json") as temporary:
        shutil.copyfile(HERE / "labels.json", temporary)
    cohort = _cohort(folder, truth, cases)
    for index in progress(range(cases)):
        _complete_case(cohort, index, seed, manifest)
    return cohort


def _check(folder: Path, truth: Path, cases: int) -> None:
    if not 1 <= cases <= MOST_CASES:
        raise ConfigError(f"{cases} cases were asked for", where="cases", remedy=f"Choose 1 to {MOST_CASES}.")
    if truth == folder or folder in truth.parents:
        raise ConfigError(
            "The true labels would lie among the studies",
            where=truth,
            remedy=f"Choose a folder outside {folder}: the server would take them for images.",
        )


def _open_manifest(folder: Path, seed: int) -> dict[str, Any]:
    """Read ``cohort.json`` or start it, before the first image, so that images without it are known to be others'."""
    path = folder / "cohort.json"
    expected = {"generator": VERSION, "seed": seed}
    if path.exists():
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = {key: manifest.get(key) for key in expected}
        if found != expected:
            raise StateError(
                f"The folder holds a cohort of {found}, not of {expected}",
                where=folder,
                remedy="Choose another folder, or delete this one with the labels made for it.",
            )
        return manifest
    if any(folder.glob("[!.]*.nii*")):
        raise StateError(
            "The folder already holds images that are not sample data", where=folder, remedy="Choose an empty folder."
        )
    manifest = {**expected, "cases": {}}
    write_json(path, manifest)
    return manifest


def _cohort(folder: Path, truth: Path, cases: int) -> Cohort:
    names = [f"case_{number:02d}" for number in range(1, cases + 1)]
    images = {name: folder / f"{name}.nii.gz" for name in names}
    return Cohort(folder, truth, images, {name: truth / f"{name}.nii.gz" for name in names}, dict(LABELS))


def _complete_case(cohort: Cohort, index: int, seed: int, manifest: dict[str, Any]) -> None:
    """Write one case unless both its files are there and intact."""
    name = list(cohort.images)[index]
    paths = {"image": cohort.images[name], "truth": cohort.truths[name]}
    known = manifest["cases"].get(name, {}).get("sha256", {})
    if all(path.is_file() and sha256_of(path) == known.get(kind) for kind, path in paths.items()):
        return
    scan = draw_scan(index, seed)
    for path, volume in zip(paths.values(), acquire(load_anatomy(), scan), strict=True):
        with atomic_path(path) as temporary:
            volume.to_filename(temporary)
    checksums = {kind: sha256_of(path) for kind, path in paths.items()}
    manifest["cases"][name] = {"sha256": checksums, "scan": dataclasses.asdict(scan)}
    write_json(cohort.folder / "cohort.json", manifest)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Make a cohort of sample volumes with true labels.")
    parser.add_argument("folder", type=Path, help="studies folder to fill")
    parser.add_argument("--truth", type=Path, help="folder for the true labels (default: FOLDER_truth)")
    parser.add_argument("--cases", type=int, default=14, help="number of cases (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other volumes (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        cohort = generate(options.folder, options.cases, options.seed, options.truth)
    except SamAdaptError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"{len(cohort.images)} volumes in {cohort.folder}\ntrue labels in {cohort.truth}\nlabels: {cohort.labels}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
