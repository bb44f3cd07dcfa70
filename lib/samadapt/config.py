"""Everything that ``--conf key value`` can say, in one dataclass: defaults, checks and help text together.

Light on purpose (no torch): the terminal's ``--help`` and the app's constructor both read it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samadapt.errors import ConfigError

if TYPE_CHECKING:
    from samadapt.data.coverage import Coverage
    from samadapt.data.labels import LabelMap

BACKBONES = ("lite_medsam", "mobile_sam", "sam_vit_b", "sam_vit_l", "sam_vit_h")
SYNTHESES = ("none", "exemplar", "lesions")
FORMS = ("own", "reference")
PLANES = ("acquisition", "all")
MISSING = ("background", "ignore")

SHORTEST_MINUTES, LONGEST_MINUTES = 2.0, 8.0
"""Limits of an automatic training time. Two hippocampus volumes: Dice 0.79 after 3 minutes on two cores, 0.76 to 0.80
after 8; eight volumes: 0.84 after 8. The shortest is the least that begins with a preview."""


def closest(word: str, known: Sequence[str], shown: Sequence[str] | None = None) -> str:
    """``"Did you mean 'x'? Valid: a, b, c."`` for a word that is none of ``known``; ``shown`` stands for a long one."""
    guess = f"Did you mean {similar!r}? " if (similar := most_like(word, known)) else ""
    return f"{guess}Valid: {', '.join(shown or known) if known else '(none)'}."


def most_like(word: str, known: Sequence[str]) -> str | None:
    """What a word that is none of ``known`` may have been meant for; None where nothing is like it."""
    plain = {_plainly(name): name for name in reversed(known)}
    return next((plain[like] for like in difflib.get_close_matches(_plainly(word), plain, n=1)), None)


def _plainly(name: str) -> str:
    """For comparison alone: as a paper writes a method's name, or somebody a structure's, differs in this."""
    return name.casefold().replace("-", "_").replace(" ", "_")


def _one_of(known: Callable[[], Sequence[str]]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in known():
            raise ValueError(closest(text, list(known())))
        return text

    return parse


def _path(exists: Callable[[Path], bool], missing: str) -> Callable[[str], Path]:
    def parse(text: str) -> Path:
        path = Path(text).expanduser()
        if not exists(path):
            raise ValueError(missing)
        return path.resolve()

    return parse


_file, _folder = _path(Path.is_file, "No such file."), _path(Path.is_dir, "No such folder.")


def _number(low: float, high: float, cast: Callable[[str], Any] = int) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = cast(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise ValueError(f"A {'whole ' if cast is int else ''}number from {low:g} to {high:g} is needed.")
        return value

    return parse


def _image_size(text: str) -> int | None:
    if text == "auto":
        return None
    size = text if text.isdecimal() else ""
    if not size or not 64 <= int(size) <= 1024 or int(size) % 32:
        raise ValueError("'auto' or a multiple of 32 from 64 to 1024 (pixels) is needed.")
    return int(size)


def _unless(word: str, parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """``parse``, but ``word`` stands for None: it is decided elsewhere, or nothing is left out."""
    return lambda text: None if text == word else parse(text)


def _switch(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError("'true' or 'false' is needed.")
    return text == "true"


def _label_map(text: str) -> LabelMap:
    from samadapt.data.labels import LabelMap  # numpy, which the terminal's --help must not wait for

    return LabelMap.from_config(text)


def _recipe(text: str) -> str:
    from samadapt import recipes  # torch, only when somebody names a recipe

    try:
        return recipes.get(text).name
    except ConfigError as error:
        raise ValueError(f"{error.what}. {error.remedy}") from None


def _strategy(text: str) -> str:
    from samadapt.activelearning import registry  # numpy, likewise

    return _one_of(lambda: registry.NAMES)(text)


def _blocks(text: str) -> tuple[int, ...] | str | None:
    if text in ("all", "late"):
        return text
    if text == "auto":
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ValueError("'auto', 'all', 'late', or block numbers such as 0,1,10,11 are needed.")
    return tuple(sorted({int(part) for part in parts}))


def _about(help_text: str, parse: Callable[[str], Any]) -> dict[str, Any]:
    return {"help": help_text, "parse": parse}


@dataclass(frozen=True)
class AppConfig:
    """What ``--conf`` sets. Every field is a key; an unknown key or a value out of range is a ``ConfigError``."""

    backbone: str = field(
        default="lite_medsam",
        metadata=_about(f"SAM-family encoder: {', '.join(BACKBONES)}", _one_of(lambda: BACKBONES)),
    )
    weights: Path | None = field(
        default=None, metadata=_about("checkpoint file to use instead of the backbone's own weights", _file)
    )
    recipe: str = field(default="lora_late", metadata=_about("how the model adapts: see `samadapt recipes`", _recipe))
    blocks: tuple[int, ...] | str | None = field(
        default=None,
        metadata=_about(
            "encoder blocks that learn: 'all', 'late', numbers as 0,1,11, or 'auto' (the recipe's)", _blocks
        ),
    )
    labels: LabelMap | None = field(
        default=None,
        metadata=_about("structures without background: a comma list, JSON, or a path of a labels.json", _label_map),
    )
    image_size: int | None = field(
        default=None, metadata=_about("model input in pixels: 'auto', or a multiple of 32 up to 1024", _image_size)
    )
    context: int | None = field(
        default=None,
        metadata=_about(
            "neighbouring slices on each side as input channels: 0, 1, or 'auto' (the recipe's)",
            _unless("auto", _number(0, 1)),
        ),
    )
    planes: str = field(
        default="acquisition",
        metadata=_about(
            "planes in which volumes are learned and segmented: 'acquisition', or 'all' (where voxels are nearly "
            "cubes: three answers, averaged)",
            _one_of(lambda: PLANES),
        ),
    )
    synthesis: str | None = field(
        default=None,
        metadata=_about(
            "synthetic slices to learn from, made of a few labelled ones: 'none', 'exemplar' (organs, near their own "
            "place), 'lesions' (anywhere in the body), or 'auto' (the recipe's)",
            _unless("auto", _one_of(lambda: SYNTHESES)),
        ),
    )
    synthetic_share: float | None = field(
        default=None,
        metadata=_about(
            "share of synthetic slices among those that a training draws, 0.05 to 0.95; 'auto': 0.8 with one case, "
            "falling to 0.5 with five",
            _unless("auto", _number(0.05, 0.95, float)),
        ),
    )
    form: str = field(
        default="own",
        metadata=_about("'own', or 'reference': a paper's recipe as its published code has it", _one_of(lambda: FORMS)),
    )
    clip: Path | None = field(
        default=None,
        metadata=_about("folder of CLIP ViT-B/32, which then reads label names (recipe s_sam)", _folder),
    )
    ladder_weights: Path | None = field(
        default=None,
        metadata=_about("torchvision's ResNet-18 weights for the network beside the encoder (recipe sam_lst)", _file),
    )
    slices_per_case: int | None = field(
        default=None,
        metadata=_about(
            "learn from so many slices of each case, drawn from those that show a structure; 'all' by default",
            _unless("all", _number(1, 10**4)),
        ),
    )
    unlabelled_slices: str = field(
        default="background",
        metadata=_about(
            "slices in which nothing is drawn, of labels that do not say which slices are labelled: 'background', or "
            "'ignore' (not labelled: neither learned from nor measured on)",
            _one_of(lambda: MISSING),
        ),
    )
    absent_classes: str = field(
        default="background",
        metadata=_about(
            "structures that a label does not name, where it does not say which ones were looked for: 'background', or "
            "'ignore' (they may be anywhere in its background)",
            _one_of(lambda: MISSING),
        ),
    )
    max_train_minutes: float | None = field(
        default=None,
        metadata=_about(
            "training stops after so many minutes; 'auto': one for every labelled case, 2 at least and 8 at most",
            _unless("auto", _number(0.05, 1440, float)),
        ),
    )
    max_steps: int = field(
        default=1000,
        metadata=_about("training stops after so many optimiser steps, if the time has not run out", _number(1, 10**6)),
    )

    seed: int | None = field(
        default=None,
        metadata=_about(
            "of all randomness of a training: a whole number, or 'auto' (the recipe's)",
            _unless("auto", _number(0, 2**31 - 1)),
        ),
    )

    cache_gib: float = field(
        default=20.0,
        metadata=_about(
            "GiB of disk for what the encoder made of slices; the oldest goes first", _number(0.1, 10**5, float)
        ),
    )

    embed_ahead: bool = field(
        default=True,
        metadata=_about("true or false: the server encodes and examines images while nobody waits", _switch),
    )

    strategy: str = field(
        default="auto",
        metadata=_about("what to label next, for viewers that ask for 'random' as OHIF does", _strategy),
    )
    lease_minutes: float = field(
        default=30.0,
        metadata=_about("a proposed image is proposed to nobody else for so long", _number(0, 10**5, float)),
    )
    auto_train: int | None = field(
        default=None,
        metadata=_about(
            "train after every so many new labels; 'never' by default", _unless("never", _number(1, 10**6))
        ),
    )

    @property
    def coverage(self) -> Coverage:
        """What a label covers that does not say so itself."""
        from samadapt.data.coverage import ALL, NAMED, NONEMPTY, Coverage  # numpy, see _label_map

        return Coverage(
            NONEMPTY if self.unlabelled_slices == "ignore" else ALL,
            NAMED if self.absent_classes == "ignore" else ALL,
        )

    def train_seconds(self, labelled: int) -> float:
        """Time of a training on so many labelled cases. The first ones have said what they can after few passes, and
        the next are submitted meanwhile."""
        if self.max_train_minutes is None:
            return 60.0 * min(max(labelled, SHORTEST_MINUTES), LONGEST_MINUTES)
        return 60.0 * self.max_train_minutes

    def weights_for(self, backbone: str) -> Path | None:
        """The weights file for a model on ``backbone``; None: its own. ``weights`` are those of the configured one."""
        return self.weights if backbone == self.backbone else None

    @classmethod
    def from_strings(cls, values: Mapping[str, Any]) -> AppConfig:
        """Check and convert ``{"key": "text"}`` as ``--conf`` gives it.

        Raises:
            ConfigError: an unknown key (the valid ones are listed), or a value that the key does not allow.
        """
        return cls(**with_backbone(parse_values(values)))

    @classmethod
    def describe(cls) -> list[tuple[str, Any, str]]:
        """``(key, default, help text)`` of every key, for help pages and documentation."""
        return [(item.name, item.default, item.metadata["help"]) for item in fields(cls)]


def with_backbone(parsed: dict[str, Any]) -> dict[str, Any]:
    """Settings, in which a recipe that belongs to one backbone brings it along.

    Raises:
        ConfigError: they name another backbone.
    """
    if "recipe" not in parsed:
        return parsed
    from samadapt import recipes

    needed = recipes.get(parsed["recipe"]).backbone
    if needed is None:
        return parsed
    if parsed.setdefault("backbone", needed) != needed:
        raise ConfigError(
            f"the recipe {parsed['recipe']} belongs to {needed}, not {parsed['backbone']}",
            where="backbone",
            remedy="Leave the backbone out, or choose the recipe that names it.",
        )
    return parsed


def parse_values(values: Mapping[str, Any], allowed: Sequence[str] | None = None) -> dict[str, Any]:
    """Convert the given keys only, so that a request can change some of the settings (``allowed``: which ones).

    Raises:
        ConfigError: as ``AppConfig.from_strings``.
    """
    known = {item.name: item for item in fields(AppConfig) if allowed is None or item.name in allowed}
    parsed = {}
    for key, text in values.items():
        if key not in known:
            raise ConfigError("there is no such setting", where=str(key), remedy=closest(str(key), list(known)))
        try:
            parsed[key] = known[key].metadata["parse"](str(text).strip())
        except ValueError as error:
            raise ConfigError(f"the value {str(text)!r} cannot be used", where=key, remedy=str(error)) from None
    return parsed
