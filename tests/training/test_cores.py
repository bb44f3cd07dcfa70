"""A training beside other programs."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil
import pytest
import torch

from samadapt.training import cores
from samadapt.training.cores import SpareCores, threads_beside


@pytest.mark.parametrize(
    ("others", "there", "most", "used"),
    [(0.0, 2, 2, 2), (0.3, 2, 2, 2), (1.0, 2, 2, 1), (2.0, 2, 2, 1), (3.0, 16, 8, 8), (10.2, 16, 8, 6), (0.0, 4, 1, 1)],
)
def test_what_others_keep_busy_is_left_to_them(others, there, most, used):
    assert threads_beside(others, there, most) == used


def test_a_training_beside_programs_on_every_core_takes_one_thread_and_later_all_it_had(monkeypatch):
    had = torch.get_num_threads()
    monkeypatch.setattr(cores, "EVERY_S", 1.0)
    torch.set_num_threads(2)
    spare = SpareCores()
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(psutil.cpu_count())]
    try:
        time.sleep(0.5)
        spare.adjust()
        assert torch.get_num_threads() == 2  # not measured yet
        time.sleep(2)
        spare.adjust()
        assert torch.get_num_threads() == 1
        # no core that anybody could be on
        monkeypatch.setattr(cores, "_usable", lambda known: [])
        monkeypatch.setattr(cores, "_allowed", lambda: 2)
        time.sleep(1.1)
        spare.adjust()
        assert torch.get_num_threads() == 2
    finally:
        for process in busy:
            process.kill()
        torch.set_num_threads(had)
