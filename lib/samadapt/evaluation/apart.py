"""A program in a process of its own: how it ended, and how much memory it took."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samadapt.errors import SamAdaptError
from samadapt.files import write_json
from samadapt.memory import keep_freed_memory
from samadapt.orphans import when_orphaned
from samadapt.terminal import plain

JOB, RESULT, LOG = "job.json", "result.json", "log.txt"
LIBRARY = Path(__file__).resolve().parents[2]
POLL_SECONDS = 0.2

PARENT = "SAMADAPT_PARENT"
"""Environment variable: id of the process for which a job is done."""

ORPHANED = 75
"""Exit status (EX_TEMPFAIL) of a job that nobody waits for any more."""


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


def run_job(module: str, job: Mapping[str, Any], folder: Path, watch: Callable[[], object]) -> dict[str, Any]:
    """Do a job by ``python -m MODULE FOLDER``, a program that calls ``job_main``. It ends when this process ends.

    Args:
        module: name of the program.
        job: JSON; what it is to do.
        folder: exists; gets the job, the result and the log.
        watch: called several times a second.

    Returns:
        Its result, with ``peak_gib`` (largest resident size) and ``wall_seconds``; ``{"failed": why}`` instead of the
        result where there is none.
    """
    write_json(folder / JOB, job)
    (folder / RESULT).unlink(missing_ok=True)
    paths = [str(LIBRARY), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), PARENT: str(os.getpid())}
    ended = run_apart([sys.executable, "-m", module, str(folder)], folder / LOG, watch, environment)
    if (folder / RESULT).is_file():
        result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    else:
        result = {"failed": f"{ended.reason}; {folder / LOG} has more"}
    return {**result, "peak_gib": round(ended.peak_gib, 3), "wall_seconds": round(ended.seconds, 1)}


def job_main(folder: Path, execute: Callable[[dict[str, Any]], dict[str, Any]]) -> int:
    """Do the job of ``run_job`` in its process; the exit status.

    Args:
        folder: as ``run_job`` has it.
        execute: the job -> the result. What it raises is the reason why there is none.
    """
    keep_freed_memory()
    # Who starts the same work again would have two processes in one folder.
    when_orphaned(int(os.environ.get(PARENT, os.getppid())), lambda: os._exit(ORPHANED))
    try:
        job = json.loads((folder / JOB).read_text(encoding="utf-8"))
        write_json(folder / RESULT, plain(execute(job)))
    except Exception as error:
        traceback.print_exc()
        why = str(error) if isinstance(error, SamAdaptError) else f"{type(error).__name__}: {error}"
        write_json(folder / RESULT, {"failed": why})
        return 1
    return 0


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
