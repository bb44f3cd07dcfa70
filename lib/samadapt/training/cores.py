"""How many threads a training is worth beside other programs.

Each of torch's operations waits for its slowest thread. A training gives way to everybody else, so a thread on a core
that another program keeps busy gets a tenth of it, and all the others wait: fewer threads are faster then.
"""

from __future__ import annotations

import os
import time

import psutil
import torch

EVERY_S = 5.0
"""Over so long others' work is averaged: a click's is over before, a film's or another program's is not."""

_BUSY = ("user", "nice", "system", "irq", "softirq", "steal")
"""Of psutil's times of a core; "steal" is what other machines on the same host take."""


class SpareCores:
    """Gives torch as many threads as other programs leave cores free, at most as many as it has now."""

    def __init__(self) -> None:
        self._most = torch.get_num_threads()
        self._measured = _Times.now()

    def adjust(self) -> None:
        """Call it often; it measures every ``EVERY_S`` seconds."""
        if time.monotonic() - self._measured.at < EVERY_S:
            return
        before, self._measured = self._measured, _Times.now()
        torch.set_num_threads(threads_beside(self._measured.others_since(before), _allowed(), self._most))


def threads_beside(others: float, cores: int, most: int) -> int:
    """Threads to use.

    Args:
        others: cores that other programs keep busy, a mean over time.
        cores: that there are.
        most: threads wanted where nothing else runs.
    """
    return max(1, min(most, round(cores - others)))


class _Times:
    """Seconds of processor time until now."""

    def __init__(self, at: float, all_busy: float, own: float) -> None:
        self.at = at
        self._all_busy = all_busy
        self._own = own

    @classmethod
    def now(cls) -> _Times:
        cores = psutil.cpu_times(percpu=True)
        own = psutil.Process().cpu_times()
        busy = sum(getattr(cores[n], kind, 0.0) for n in _usable(len(cores)) for kind in _BUSY)
        return cls(time.monotonic(), busy, own.user + own.system)

    def others_since(self, before: _Times) -> float:
        """Mean number of cores that other programs kept busy."""
        busy, own = self._all_busy - before._all_busy, self._own - before._own
        return max(0.0, busy - own) / (self.at - before.at)


def _usable(known: int) -> list[int]:
    """Numbers of the cores that this process may use."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(known)
    return [number for number in allowed if number < known]


def _allowed() -> int:
    return len(_usable(psutil.cpu_count() or 1))
