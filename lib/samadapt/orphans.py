"""What a process does when the one that started it is gone."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

LOOK_EVERY_S = 0.5


def when_orphaned(parent: int, act: Callable[[], object]) -> None:
    """Call ``act`` once, in a thread, soon after the parent of this process has ended, however it ended.

    Args:
        parent: process id of the parent, as the parent itself gave it: asked for later, it may be another's already.
        act: quick; nothing waits for it.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_EVERY_S)
        act()

    threading.Thread(target=watch, daemon=True).start()
