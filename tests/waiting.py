"""Waiting for what another process or thread does."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")

LOOK_EVERY = 0.05


def wait_until(condition: Callable[[], Found], seconds: float = 60.0, why: Callable[[], object] = lambda: "") -> Found:
    """Ask until the answer is true; that answer.

    Args:
        condition: asked again and again.
        seconds: after which the test fails. On a busy machine everything takes long: give a lot.
        why: what the failure shows.
    """
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"it did not happen within {seconds:g} s {why()}"
        time.sleep(LOOK_EVERY)
    return found
