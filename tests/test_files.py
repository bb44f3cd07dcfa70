"""Writing files whole or not at all."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import save_file

from samadapt.files import atomic_path


@pytest.fixture(params=[0o022, 0o002, 0o077])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_files_may_be_read_by_whom_the_umask_allows(tmp_path, umask):
    """Some writers make files that are their owner's alone; colleagues share models."""
    target = tmp_path / "v0001.safetensors"
    with atomic_path(target) as temporary:
        save_file({"a": torch.zeros(2)}, temporary)
    (tmp_path / "plain").touch()
    assert target.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_an_exception_leaves_what_was_there(tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("before")

    def fail():
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert target.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]
