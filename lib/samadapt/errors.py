"""Errors that a person can act on: what is wrong, where, and what to do about it."""

from __future__ import annotations

from pathlib import Path


class SamAdaptError(Exception):
    """Base of every error that samadapt raises on purpose.

    Args:
        what: what is wrong, one sentence without a full stop.
        where: the file, key or request field concerned.
        remedy: what the reader can do now.

    The terminal prints ``str(error)`` and exits with ``exit_code``; the server answers with ``http_status``.
    """

    exit_code = 1
    http_status = 500

    def __init__(self, what: str, *, where: str | Path | None = None, remedy: str | None = None) -> None:
        self.what = what
        self.where = str(where) if where is not None else None
        self.remedy = remedy
        super().__init__(str(self))

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        advice = f" {self.remedy}" if self.remedy else ""
        return f"{place}{self.what}.{advice}"

    def to_dict(self) -> dict[str, str | None]:
        """The same three parts for ``--json`` and for HTTP replies."""
        return {"error": type(self).__name__, "what": self.what, "where": self.where, "remedy": self.remedy}


class InputError(SamAdaptError):
    """An image, label, prompt or request that cannot be used."""

    exit_code = 2
    http_status = 400


class NotFoundError(InputError):
    """A name of something that is not there."""

    http_status = 404


class ConfigError(SamAdaptError):
    """An unknown configuration key, or a value outside what the key allows."""

    exit_code = 2
    http_status = 400


class WeightsError(SamAdaptError):
    """Weights that are missing, broken, or not the ones they should be."""

    exit_code = 3
    http_status = 503


class StateError(SamAdaptError):
    """A request that is valid in itself, but not now (nothing trained yet, a training already runs)."""

    exit_code = 4
    http_status = 409


class UnavailableError(SamAdaptError):
    """A request that will succeed later: what it needs is being fetched, or another program is away."""

    exit_code = 5
    http_status = 503
