"""Memory that was freed is used again, without asking the system."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

import samadapt

FAULTS = """
import resource, threading, torch
from samadapt.memory import keep_freed_memory
{call}
def work():
    for _ in range(60):
        torch.ones(2**24)
{run}
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""

HERE = "work()"
IN_A_THREAD = "t = threading.Thread(target=work); t.start(); t.join()"


def faults(call: str, run: str) -> int:
    """How many pages the system hands out for sixty feature maps of 64 MB, one after the other."""
    code = FAULTS.format(call=call, run=run)
    env = {**os.environ, "PYTHONPATH": str(Path(samadapt.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=env)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
@pytest.mark.parametrize("run", [HERE, IN_A_THREAD])
def test_freed_memory_is_used_again(run):
    assert 3 * faults("assert keep_freed_memory()", run) < faults("", run)


def test_other_c_libraries_are_left_alone(monkeypatch):
    from samadapt import memory

    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    assert not memory.keep_freed_memory()
