"""Which image to label next. Both strategies are deterministic: the same state gives the same answer."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from typing import Any

from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.strategy import Strategy


class Ordered(Strategy):
    """Proposes the first image of an order."""

    @abstractmethod
    def order(self, name: str, datastore: Datastore) -> list[str]:
        """The images without a final label, the next sample first; ``name`` is the strategy's in the datastore."""

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any] | None:
        images = self.order(str(request.get("strategy")), datastore)
        return {"id": images[0]} if images else None


class First(Ordered):
    """The first image without a final label, by id."""

    def __init__(self) -> None:
        super().__init__("the first image that has no label yet, by name")

    def order(self, name: str, datastore: Datastore) -> list[str]:
        return sorted(datastore.get_unlabeled_images())


class Random(Ordered):
    """An image without a final label in an order without pattern; those proposed longest ago (or never) come first.

    The host's strategy of this name weighs images by seconds since they were proposed, and fails when all are 0.
    """

    def __init__(self) -> None:
        super().__init__("an image that has no label yet, in an arbitrary order")

    def order(self, name: str, datastore: Datastore) -> list[str]:
        def proposed(image: str) -> tuple[int, str]:
            last = datastore.get_image_info(image).get("strategy", {}).get(name, {}).get("ts", 0)
            return last, hashlib.sha256(image.encode()).hexdigest()

        return sorted(datastore.get_unlabeled_images(), key=proposed)
