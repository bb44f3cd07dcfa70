"""Which image to label next. Both strategies are deterministic: the same state gives the same answer."""

from __future__ import annotations

import hashlib
from typing import Any

from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.strategy import Strategy


class First(Strategy):
    """The first image without a final label, by id."""

    def __init__(self) -> None:
        super().__init__("the first image that has no label yet, by name")

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any] | None:
        images = datastore.get_unlabeled_images()
        return {"id": min(images)} if images else None


class Random(Strategy):
    """An image without a final label in an order without pattern; those proposed longest ago (or never) come first.

    The host's strategy of this name weighs images by seconds since they were proposed, and fails when all are 0.
    """

    def __init__(self) -> None:
        super().__init__("an image that has no label yet, in an arbitrary order")

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any] | None:
        def proposed(image: str) -> tuple[int, str]:
            last = datastore.get_image_info(image).get("strategy", {}).get(request["strategy"], {}).get("ts", 0)
            return last, hashlib.sha256(image.encode()).hexdigest()

        images = datastore.get_unlabeled_images()
        return {"id": min(images, key=proposed)} if images else None
