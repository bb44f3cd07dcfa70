"""What every way to change the image encoder promises, and how a recipe says which parts of it are meant."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from samadapt.backbones.base import Backbone
from samadapt.errors import ConfigError
from samadapt.parts import Part

Blocks = tuple[int, ...] | Literal["late"] | None
"""Indices of the adapted encoder blocks; "late": those of the encoder's second half; None: all that can be adapted."""


@dataclass(frozen=True)
class EncoderAdapter(Part):
    """How the encoder learns. A subclass is the configuration of one way."""

    @abstractmethod
    def inject(self, backbone: Backbone, seed: int) -> int | None:
        """Change ``backbone`` in place, without changing what it computes.

        Afterwards exactly the parameters that training may change require gradients; before, none does.

        Args:
            backbone: changed.
            seed: of every random start.

        Returns:
            The first block that depends on what is trained, so that the tokens entering it may be cached; ``IMAGES``
            where already those do, the number of blocks where only the neck does, and None where nothing does.

        Raises:
            ConfigError: the configuration does not fit this backbone.
        """

    @abstractmethod
    def merge(self, backbone: Backbone) -> None:
        """Fold what was learned into plain weights, as far as it can be, in place; nothing requires gradients then."""


def choose(blocks: Blocks, known: Sequence[int], late_block: int) -> list[int]:
    """The block indices that ``blocks`` means, ascending.

    Args:
        blocks: as configured.
        known: blocks that can be adapted.
        late_block: index of the block that begins the encoder's second half.

    Raises:
        ConfigError: one of them cannot be adapted, or none is left.
    """
    if blocks is None:
        return sorted(set(known))
    chosen = {block for block in known if block >= late_block} if blocks == "late" else set(blocks)
    if unknown := sorted(chosen - set(known)):
        raise ConfigError(
            f"blocks {unknown} cannot be adapted", where="blocks", remedy=f"Choose among {sorted(set(known))}."
        )
    if not chosen:
        raise ConfigError("no block is adapted", where="blocks", remedy=f"Choose among {sorted(set(known))}.")
    return sorted(chosen)
