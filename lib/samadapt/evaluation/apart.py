"""A program in a process of its own: how it ended, and how much memory it took."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        code: its exit status; negative is the signal that ended it.
        peak_gib: its largest resident size, GiB, but for what it took in the last ``POLL_SECONDS``.
        seconds: wall-clock time.
    """

    code: int
    peak_gib: float
    seconds: float

    @property
    def reason(self) -> str:
        """For people: why it ended without a word of its own."""
        if self.code >= 0:
            return f"its process ended with status {self.code}"
        ended = signal.Signals(-self.code).name
        guess = "; was there memory enough?" if -self.code == signal.SIGKILL else ""
        return f"its process was ended by {ended}{guess}"


def run_apart(
    words: Sequence[str], log: Path, watch: Callable[[], object], environment: Mapping[str, str] | None = None
) -> Ended:
    """Run a program to its end. If this process is interrupted meanwhile, the program is ended, too.

    Args:
        words: the command.
        log: gets what the program writes.
        watch: called several times a second.
        environment: as ``subprocess.Popen`` takes it.
    """
    started, peak = time.monotonic(), 0.0
    with open(log, "wb") as output:
        process = subprocess.Popen(words, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=environment)
    try:
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                process.returncode = os.waitstatus_to_exitcode(status)
                return Ended(process.returncode, peak or usage.ru_maxrss / 2**20, time.monotonic() - started)
            peak = _peak_gib(process.pid) or peak
            watch()
            time.sleep(POLL_SECONDS)
    finally:
        if process.returncode is None:
            process.kill()
            process.wait()


def _peak_gib(pid: int) -> float | None:
    """Largest resident size so far of a living process; None where the system does not tell.

    Not ``ru_maxrss``: Linux lets that of a new process begin at the size of the one that started it.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    sizes = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(sizes[0]) / 2**20 if sizes else None
