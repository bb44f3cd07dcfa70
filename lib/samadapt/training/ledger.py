"""Which cases train and which are held out: decided once per patient, kept on disk, never drawn again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from samadapt.data.cases import Case
from samadapt.errors import InputError
from samadapt.files import write_json

HELD_OUT_EVERY = 4
"""Every fourth patient is held out; with fewer than four labelled ones all of them train."""

TRAIN, HELD_OUT = "train", "held-out"


class Ledger:
    """A JSON file ``{group: "train" | "held-out"}``; a group is a patient, or a case whose patient is unknown.

    Args:
        path: the file; created by the first ``split``.

    Raises:
        InputError: the file is not such a record.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._roles: dict[str, str] = _read(path)

    def split(self, cases: Sequence[Case]) -> tuple[list[Case], list[Case]]:
        """Give every new group its role, in order of case id, and return (training cases, held-out cases)."""
        before = len(self._roles)
        for case in sorted(cases, key=lambda case: case.id):
            if _group(case) not in self._roles:
                last_of_four = len(self._roles) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
                self._roles[_group(case)] = HELD_OUT if last_of_four else TRAIN
        if len(self._roles) != before:
            write_json(self._path, self._roles)
        training = [case for case in cases if self._roles[_group(case)] == TRAIN]
        return training, [case for case in cases if self._roles[_group(case)] == HELD_OUT]


def _group(case: Case) -> str:
    return f"patient {case.patient}" if case.patient else f"case {case.id}"


def _read(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    try:
        roles = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(roles, dict) or set(roles.values()) - {TRAIN, HELD_OUT}:
            raise ValueError(f"values must be {TRAIN!r} or {HELD_OUT!r}")
    except (OSError, ValueError) as error:
        raise InputError(
            f"not a ledger ({error})", where=path, remedy="Restore it; without it held-out cases would be trained on."
        ) from error
    return roles
