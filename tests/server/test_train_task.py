"""The server's trainer, apart from what a real server shows."""

from __future__ import annotations

import os

import pytest

from samadapt.server.train import _print_news


def test_a_training_ends_when_its_server_is_gone(monkeypatch, capsys):
    report = _print_news()
    record = {"message": "training", "loss": 0.5, "seconds": 3}
    report(record)
    report(record)
    assert capsys.readouterr().out.count("training, loss 0.500") == 1
    monkeypatch.setattr(os, "getppid", lambda: -1)
    with pytest.raises(SystemExit, match="server is gone"):
        report(record)
