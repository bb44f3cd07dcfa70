"""Fixtures for all tests."""

from __future__ import annotations

import pytest

from required import pytest_configure, pytest_runtest_makereport

__all__ = ["pytest_configure", "pytest_runtest_makereport"]


@pytest.fixture
def one_thread():
    """Models this small gain nothing from threads, and threads that wait for a busy core cost seconds."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
