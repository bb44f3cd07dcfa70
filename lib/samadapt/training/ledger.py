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

_MEMBER = " / case "
"""Between a patient and one of its cases in the names of the file."""


class Ledger:
    """A JSON file ``{group: "train" | "held-out"}``; a group is a patient, or a case whose patient is unknown.

    A case keeps its role also when its patient becomes known later, is named otherwise or is no longer known; the
    patient's other cases then share it. (If two cases of one patient had different roles by then, both keep them, and
    further ones train.)

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
        ordered = sorted(cases, key=lambda case: case.id)
        for case in ordered:
            if self._known(case) is None:
                group = f"patient {case.patient}" if case.patient else f"case {case.id}"
                role = self._roles.setdefault(group, self._role_of_patient(case, ordered) or self._draw())
                if case.patient:
                    self._roles[f"{group}{_MEMBER}{case.id}"] = role
        if len(self._roles) != before:
            write_json(self._path, self._roles)
        training = [case for case in cases if self._known(case) == TRAIN]
        return training, [case for case in cases if self._known(case) == HELD_OUT]

    def _known(self, case: Case) -> str | None:
        """The role that this very case has been given."""
        if own := self._roles.get(f"case {case.id}"):
            return own
        return next((role for name, role in self._roles.items() if name.endswith(f"{_MEMBER}{case.id}")), None)

    def _role_of_patient(self, case: Case, cases: Sequence[Case]) -> str | None:
        """What the patient's other cases were given, as long as nobody knew that they are one patient's."""
        others = {self._known(other) for other in cases if case.patient and other.patient == case.patient}
        return next((role for role in (TRAIN, HELD_OUT) if role in others), None)

    def _draw(self) -> str:
        groups = sum(_MEMBER not in name for name in self._roles)
        return HELD_OUT if groups % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 else TRAIN


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
