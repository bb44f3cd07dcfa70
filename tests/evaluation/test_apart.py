import os
import subprocess
import sys

import psutil
import pytest

from samadapt.evaluation.apart import LIBRARY, run_apart
from waiting import wait_until


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


def test_a_job_ends_with_the_one_it_is_done_for(tmp_path):
    """Killed outright, so that it cannot say so: a second call must not find the first one's job in its folder."""
    (tmp_path / "endless.py").write_text(
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from samadapt.evaluation.apart import job_main\n"
        "folder = Path(sys.argv[1])\n"
        "(folder / 'pid').write_text(str(os.getpid()))\n"
        "job_main(folder, lambda job: time.sleep(120))\n"
    )
    start = "import sys; from pathlib import Path; from samadapt.evaluation.apart import run_job; "
    start += f"run_job('endless', {{}}, Path({str(tmp_path)!r}), int)"
    paths = os.pathsep.join([str(LIBRARY), str(tmp_path)])
    caller = subprocess.Popen(python(start), env={**os.environ, "PYTHONPATH": paths})
    job = int(wait_until(lambda: (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text()))
    caller.kill()
    caller.wait()
    wait_until(lambda: gone(job))


def gone(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
