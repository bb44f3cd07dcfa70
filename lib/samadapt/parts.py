"""The exchangeable parts of a recipe: configurations that a model file names by kind."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, TypeVar


@dataclass(frozen=True)
class Part(ABC):
    """Configuration of one part. A subclass is one kind of it.

    Class attributes:
        kind: its name in a model file.
    """

    kind: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """For the header of a model file."""
        return {"kind": self.kind, **asdict(self)}


P = TypeVar("P", bound=Part)


def part_from_dict(kinds: Mapping[str, type[P]], value: Mapping[str, Any]) -> P:
    """Inverse of ``Part.to_dict`` after a way through JSON, which makes lists of tuples."""
    fields = {key: tuple(item) if isinstance(item, list) else item for key, item in value.items() if key != "kind"}
    return kinds[value["kind"]](**fields)
