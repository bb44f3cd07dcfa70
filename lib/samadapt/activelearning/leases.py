"""Who is at which case: no two annotators are given the same one."""

from __future__ import annotations

import json
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from samadapt.errors import InputError
from samadapt.files import write_json


@dataclass(frozen=True)
class Lease:
    """A case that somebody was given.

    Attributes:
        client: who; None where the viewer does not say.
        since: seconds since the epoch.
    """

    client: str | None
    since: float


class Leases:
    """Leases of all cases, in one JSON file. A lease ends with the case's label, or by itself.

    Args:
        path: the file; written by the first ``take``.
        seconds: how long a case stays with whoever was given it.

    Raises:
        InputError: the file is no such record.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        self._path = path
        self._seconds = seconds
        self._held = _read(path)

    def free(self, cases: Collection[str], client: str | None) -> list[str]:
        """Those of ``cases`` that ``client`` may be given, in the order in which they come.

        Cases that nobody has; if there are none, those that the same client was given before. Viewers that do not say
        who they are cannot be told apart, so they get none of each other's.
        """
        held = self._current()
        nobody_s = [case for case in cases if case not in held]
        return nobody_s or [case for case in cases if client is not None and held[case].client == client]

    def take(self, case: str, client: str | None) -> None:
        """``client`` has been given ``case``, now."""
        self._held = {**self._current(), case: Lease(client, time.time())}
        self._write()

    def end(self, case: str) -> None:
        """The case has its label, or nobody wants it any more."""
        if self._held.pop(case, None):
            self._write()

    def first_end(self) -> float | None:
        """When the next lease ends by itself, in seconds since the epoch; None without leases."""
        return min((lease.since + self._seconds for lease in self._current().values()), default=None)

    def _current(self) -> dict[str, Lease]:
        now = time.time()
        return {case: lease for case, lease in self._held.items() if 0 <= now - lease.since < self._seconds}

    def _write(self) -> None:
        write_json(self._path, {case: vars(lease) for case, lease in self._held.items()})


def _read(path: Path) -> dict[str, Lease]:
    if not path.exists():
        return {}
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        return {str(case): Lease(one["client"], float(one["since"])) for case, one in records.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"no record of who labels what ({error})", where=path, remedy="Remove it; only the leases are lost."
        ) from error
