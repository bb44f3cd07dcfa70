"""Fixtures for all tests."""

from __future__ import annotations

import hypothesis
import pytest

from required import pytest_configure, pytest_runtest_makereport

__all__ = ["pytest_configure", "pytest_runtest_makereport"]

# How long an example takes depends on what else the machine does.
hypothesis.settings.register_profile("samadapt", deadline=None)
hypothesis.settings.load_profile("samadapt")


def pytest_collection_modifyitems(items):
    """Long ones first, so that the others fill the second core meanwhile."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture
def one_thread():
    """Models this small gain nothing from threads, and threads that wait for a busy core cost seconds."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny_backbone(monkeypatch, one_thread):
    """A small random backbone in place of LiteMedSAM, whatever is asked for."""
    from tiny import BACKBONES

    def load(name, weights=None, image_size=None):
        backbone = BACKBONES["per_head"]()
        backbone.weights_sha256 = "0" * 64
        return backbone

    monkeypatch.setattr("samadapt.backbones.load", load)
