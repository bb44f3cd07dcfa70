"""Who is at which case: no two annotators are given the same one."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samadapt.errors import InputError
from samadapt.files import write_json

_SOMEBODY = "somebody at "

_RENEWED_AFTER_S = 30.0
"""Work on a case comes as many clicks; not each is written down."""


def somebody_at(address: str) -> str:
    """Who asks from a machine without saying who it is."""
    return f"{_SOMEBODY}{address}"


@dataclass(frozen=True)
class Lease:
    """A case that somebody was given.

    Attributes:
        client: who; None where nothing is known of them.
        since: seconds since the epoch.
        until: when it ends by itself.
    """

    client: str | None
    since: float
    until: float


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
        self._held = _read(path, seconds)
        self._changing = threading.Lock()

    def free(self, cases: Collection[str], client: str | None) -> list[str]:
        """Those of ``cases`` that ``client`` may be given, the best first.

        Cases that nobody has, in the order in which they come. If there are none: those that the same client was given
        before, the one that was given first in front, so that asking on goes round. If there are none of these either:
        what clients without a name have left behind, which is all but the last that each was given. Whoever only looks
        through the images with such a viewer keeps nobody else from work.
        """
        held = self._current()
        if nobody_s := [case for case in cases if case not in held]:
            return nobody_s
        oldest = sorted(cases, key=lambda case: held[case].since)
        return [case for case in oldest if held[case].client == client] or self._left_behind(oldest, held)

    def take(self, case: str, client: str | None) -> None:
        """``client`` has been given ``case``, now."""
        with self._changing:
            now = time.time()
            self._held = {**self._current(), case: Lease(client, now, now + self._seconds)}
            self._write()

    def renew(self, case: str, client: str | None) -> None:
        """Somebody works on ``case``: if it is theirs, it is from now on.

        Args:
            case: its id.
            client: who; None where that is unknown, which is taken for whoever has the case.
        """
        lease = self._current().get(case)
        if lease and client in (None, lease.client) and time.time() - lease.since > _RENEWED_AFTER_S:
            self.take(case, lease.client)

    def end(self, case: str) -> None:
        """The case has its label, or nobody wants it any more."""
        with self._changing:
            if self._held.pop(case, None):
                self._write()

    def held(self) -> set[str]:
        """The cases that somebody has."""
        return set(self._current())

    def first_end(self) -> float | None:
        """When the next lease ends by itself, in seconds since the epoch; None without leases."""
        return min((lease.until for lease in self._current().values()), default=None)

    @staticmethod
    def _left_behind(cases: Collection[str], held: dict[str, Lease]) -> list[str]:
        last: dict[str | None, float] = {}
        for lease in held.values():
            last[lease.client] = max(lease.since, last.get(lease.client, lease.since))
        unnamed = {client for client in last if client is None or client.startswith(_SOMEBODY)}
        return [case for case in cases if held[case].client in unnamed and held[case].since < last[held[case].client]]

    def _current(self) -> dict[str, Lease]:
        now = time.time()
        return {case: lease for case, lease in self._held.items() if lease.since <= now < lease.until}

    def _write(self) -> None:
        write_json(self._path, {case: vars(lease) for case, lease in self._held.items()})


def _read(path: Path, seconds: float) -> dict[str, Lease]:
    if not path.exists():
        return {}
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        return {str(case): _lease(one, seconds) for case, one in records.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"no record of who labels what ({error})", where=path, remedy="Remove it; only the leases are lost."
        ) from error


def _lease(record: dict[str, Any], seconds: float) -> Lease:
    """One lease; of former days, when its end was not written down, it ends after ``seconds``."""
    client = record["client"]
    if not isinstance(client, str | None):
        raise ValueError(f"{client!r} is no client")
    since = float(record["since"])
    return Lease(client, since, float(record.get("until", since + seconds)))
