import os
import sys

import pytest

from samadapt.evaluation.apart import run_apart


def python(code):
    return [sys.executable, "-c", code]


def test_memory_and_time_are_the_programs_own(tmp_path):
    """Also where the process that starts it is the larger one."""
    own = bytearray(300 << 20)
    own[::4096] = b"1" * len(own[::4096])
    idle = run_apart(python("import time; time.sleep(0.7)"), tmp_path / "log", int)
    assert idle.code == 0
    assert idle.peak_gib < 0.1
    assert idle.seconds >= 0.7
    grow = python("import time; x = bytearray(700 << 20); x[::4096] = b'1' * len(x[::4096]); del x; time.sleep(0.7)")
    assert run_apart(grow, tmp_path / "log", int).peak_gib == pytest.approx(0.69, abs=0.03)


def test_a_program_that_is_killed_is_explained(tmp_path):
    ended = run_apart(python("import os; print('before', flush=True); os.kill(os.getpid(), 9)"), tmp_path / "log", int)
    assert ended.code == -9
    assert "SIGKILL" in ended.reason
    assert "memory" in ended.reason
    assert (tmp_path / "log").read_text() == "before\n"
    assert "status 3" in run_apart(python("raise SystemExit(3)"), tmp_path / "log", int).reason


def test_an_interruption_ends_the_program(tmp_path):
    code = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"

    def interrupt():
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_apart(python(code), tmp_path / "log", interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
