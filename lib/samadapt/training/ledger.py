"""Which cases train and which are held out: decided once per patient, kept on disk, never drawn again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

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
        remembered: case id -> role, of cases that the file has lost; see ``roles_in``.

    Attributes:
        restored: ids of the cases that got their role from ``remembered`` in ``split``.

    Raises:
        InputError: the file is not such a record.
    """

    def __init__(self, path: Path, remembered: Mapping[str, str] | None = None) -> None:
        self._path = path
        self._roles: dict[str, str] = _read(path)
        self._remembered = dict(remembered or {})
        self.restored: list[str] = []

    def split(self, cases: Sequence[Case]) -> tuple[list[Case], list[Case]]:
        """Give every new group its role, in order of case id, and return (training cases, held-out cases)."""
        before = len(self._roles)
        self._restore(cases)
        ordered = sorted(cases, key=lambda case: case.id)
        for case in ordered:
            if self._known(case.id) is None:
                group = f"patient {case.patient}" if case.patient else f"case {case.id}"
                role = self._roles.setdefault(group, self._role_of_patient(case, ordered) or self._draw(cases))
                if case.patient:
                    self._roles[f"{group}{_MEMBER}{case.id}"] = role
        if len(self._roles) != before:
            write_json(self._path, self._roles)
        training = [case for case in cases if self._known(case.id) == TRAIN]
        return training, [case for case in cases if self._known(case.id) == HELD_OUT]

    def _restore(self, cases: Sequence[Case]) -> None:
        """Give back all roles that the file has lost, also of absent cases, so that new ones are drawn as ever."""
        lost = {name: role for name, role in self._remembered.items() if self._known(name) is None}
        self._roles.update({f"case {name}": role for name, role in lost.items()})
        self.restored = sorted(case.id for case in cases if case.id in lost)

    def _known(self, case_id: str) -> str | None:
        """The role that this very case has been given."""
        if own := self._roles.get(f"case {case_id}"):
            return own
        return next((role for name, role in self._roles.items() if name.endswith(f"{_MEMBER}{case_id}")), None)

    def _role_of_patient(self, case: Case, cases: Sequence[Case]) -> str | None:
        """What the patient's other cases were given, as long as nobody knew that they are one patient's."""
        others = {self._known(other.id) for other in cases if case.patient and other.patient == case.patient}
        return next((role for role in (TRAIN, HELD_OUT) if role in others), None)

    def _draw(self, cases: Sequence[Case]) -> str:
        """Every fourth group is held out; and one at once where those that were have lost their labels."""
        groups = sum(_MEMBER not in name for name in self._roles)
        present = {case.patient or f"case {case.id}": role for case in cases if (role := self._known(case.id))}
        none_left = len(present) >= HELD_OUT_EVERY - 1 and HELD_OUT not in present.values()
        return HELD_OUT if none_left or groups % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 else TRAIN


def roles_in(manifests: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Case id -> role, as models' manifests tell it; a case that any of them has learned from is no held-out case."""
    roles: dict[str, str] = {}
    for manifest in manifests:
        roles.update({case: HELD_OUT for case in manifest.get("held_out", []) if roles.get(case) != TRAIN})
        roles.update(dict.fromkeys(manifest.get("cases", []), TRAIN))
    return roles


def _read(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    try:
        roles = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(roles, dict) or any(role not in (TRAIN, HELD_OUT) for role in roles.values()):
            raise ValueError(f"values must be {TRAIN!r} or {HELD_OUT!r}")
    except (OSError, ValueError) as error:
        raise InputError(
            f"not a ledger ({error})", where=path, remedy="Restore it; without it held-out cases would be trained on."
        ) from error
    return roles
