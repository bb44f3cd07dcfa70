"""The switch of CI: what is skipped for want of a browser, a PACS or data fails there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import pytest

@pytest.mark.requires_browser
def test_skips_inside():
    pytest.skip("no chromium")

@pytest.mark.requires_data
@pytest.mark.skipif(True, reason="no data")
def test_skipped_by_mark():
    raise AssertionError

@pytest.mark.requires_data
def test_passes():
    pass

@pytest.mark.requires_pacs
@pytest.mark.xfail(reason="known")
def test_is_known_to_fail():
    raise AssertionError

def test_needs_nothing():
    pytest.skip("no GPU")
"""


@pytest.mark.parametrize(
    ("switch", "summary"),
    [
        ("0", "1 passed, 3 skipped, 1 xfailed"),
        ("1", "1 failed, 1 passed, 1 skipped, 1 xfailed, 1 error"),
    ],
)
def test_the_switch(tmp_path, switch, summary):
    (tmp_path / "test_some.py").write_text(TESTS)
    environment = {**os.environ, "SAMADAPT_REQUIRE_ALL": switch, "PYTHONPATH": str(Path(__file__).parent)}
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "required",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
    ]
    words += ["--strict-markers", str(tmp_path)]
    run = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert summary in run.stdout
    assert (run.returncode != 0) == (switch == "1")
    if switch == "1":
        assert "requires_browser: may not be skipped" in run.stdout
        assert "no chromium" in run.stdout
