"""The model that answers now, and the images read last."""

from __future__ import annotations

import functools
import itertools
import logging
import threading
from dataclasses import dataclass
from pathlib import Path

import torch

from samadapt import recipes
from samadapt.config import AppConfig
from samadapt.data.labels import LabelMap
from samadapt.data.slice_cache import SliceCache
from samadapt.data.volume import Geometry, Volume, read_volume
from samadapt.errors import SamAdaptError
from samadapt.model import AdaptedModel, read_info
from samadapt.project import Project
from samadapt.versions import Versions

logger = logging.getLogger(__name__)

PLAIN = "plain"
_PLACEHOLDER = ("object",)  # the plain model's single class; nobody asks it for classes


@dataclass(frozen=True)
class Served:
    """A model ready to answer.

    Attributes:
        model: in eval mode, on the device.
        version: the published file's stem, or ``"plain"`` for the backbone as it came.
    """

    model: AdaptedModel
    version: str


class Models:
    """Loads the published model when it is first needed, and again whenever another version is published.

    Safe to call from several threads. Nothing is read or loaded before the first call.

    Attributes:
        cache: what the encoder made of the images' slices.
    """

    def __init__(self, config: AppConfig, project: Project) -> None:
        self._config = config
        self._project = project
        self._lock = threading.Lock()
        self._source: tuple[Path, int] | None = None
        self._served: Served | None = None
        self._plain: Served | None = None
        self._earlier: tuple[tuple[str, int], list[AdaptedModel]] | None = None
        self.cache = SliceCache(project.cache, config.cache_gib)
        self._volumes = functools.lru_cache(maxsize=2)(_read)

    def trained(self) -> bool:
        """Whether a model that has learned labels is published. Cheap."""
        return self._project.published() is not None

    def version(self) -> str:
        """Name of the published model, ``"plain"`` before the first. Cheap."""
        published = self._project.published()
        return published.stem if published else PLAIN

    def current(self) -> Served:
        """The published model, or the plain backbone before anything was published.

        Raises:
            WeightsError: the backbone's weights are missing or not those the model was trained on.
            InputError: the published file is damaged.
        """
        with self._lock:
            published = self._project.published()
            source = (published.resolve(), published.stat().st_mtime_ns) if published else None
            if self._served is None or source != self._source:
                self._served = self._load(published)
                self._source = source
            return self._served

    def prompted(self) -> Served:
        """The model for clicks and boxes: ``current()``, unless its training has found the plain one to be better.

        Raises:
            WeightsError: as ``current``.
            InputError: as ``current``.
        """
        served = self.current()
        if served.version == PLAIN or served.model.info.answers_prompts:
            return served
        return self.plain()

    def plain(self) -> Served:
        """The backbone as it came.

        Raises:
            WeightsError: as ``current``.
        """
        with self._lock:
            self._plain = self._plain or self._load(None)
            return self._plain

    def earlier(self, count: int) -> list[AdaptedModel]:
        """The last versions that were in service before the present one and know the same labels, the latest last.

        They stay in memory until another version is published. Those that cannot be loaded are left out.
        """
        served = self.current()
        if served.version == PLAIN:
            return []
        if self._earlier is None or self._earlier[0] != (served.version, count):
            labels = served.model.info.labels
            known = (path for path in reversed(Versions(self._project).before_present()) if _labels(path) == labels)
            loaded = [model for path in itertools.islice(known, count) if (model := self._loaded(path)) is not None]
            self._earlier = (served.version, count), loaded[::-1]
        return self._earlier[1]

    def _loaded(self, path: Path) -> AdaptedModel | None:
        try:
            return self._load(path).model
        except SamAdaptError as error:
            logger.warning("%s is left out: %s", path.stem, error)
            return None

    def volume(self, path: str | Path) -> Volume:
        """An image by file (or DICOM folder); the last two stay in memory until their files change."""
        path = Path(path)
        state = path.stat()
        return self._volumes(path, state.st_mtime_ns, state.st_size)

    def geometry(self, path: str | Path) -> Geometry:
        """The grid of an image; see ``volume``."""
        return self.volume(path).geometry

    def _load(self, published: Path | None) -> Served:
        config = self._config
        if published is None:
            model = recipes.build(recipes.PLAIN, _PLACEHOLDER, config.backbone, config.weights, config.image_size)
            version = PLAIN
        else:
            model = AdaptedModel.load(published, weights=config.weights_for(read_info(published).backbone))
            version = published.resolve().stem
        model.merge()
        logger.info("model loaded: %s", version)
        return Served(model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), version)


def _read(path: Path, modified: int, size: int) -> Volume:
    """Read an image; ``modified`` and ``size`` are there to make a changed file another cache entry."""
    return read_volume(path)


def _labels(path: Path) -> LabelMap | None:
    """What a model file knows; None for a damaged one."""
    try:
        return read_info(path).labels
    except SamAdaptError:
        return None
