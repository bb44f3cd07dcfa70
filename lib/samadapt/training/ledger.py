"""Which cases train and which are held out: decided once per patient, kept on disk, never drawn again."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samadapt.data.cases import Case
from samadapt.errors import InputError
from samadapt.files import sha256_of, state_of, write_json

HELD_OUT_EVERY = 4
"""Every fourth patient is held out; with fewer than four labelled ones all of them train."""

TRAIN, HELD_OUT = "train", "held-out"

_MEMBER = " / case "
"""Between a patient and one of its cases in the names of the file."""

_IMAGE, _OF = "image ", " of case "
"""Around the SHA-256 of a case's image file, with its time and size, in the names of the file."""


@dataclass(frozen=True)
class Assignment:
    """What became of one case.

    Attributes:
        case: its id.
        role: ``TRAIN`` or ``HELD_OUT``; None where nothing is decided.
        why: in a phrase.
    """

    case: str
    role: str | None
    why: str


class Ledger:
    """A JSON file ``{group: "train" | "held-out"}``; a group is a patient, or a case whose patient is unknown.

    An image file that comes again under another name, renamed or copied, keeps its role, be it a name that was another
    image's: the file also names the SHA-256 of every case's image. (Folders of DICOM files have none; their UIDs tell
    them.)

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
        self._shows: Callable[[str], frozenset[str]] = lambda case_id: frozenset()

    def split(
        self, cases: Sequence[Case], shows: Callable[[Case], Collection[str]] = lambda case: ()
    ) -> tuple[list[Case], list[Case]]:
        """Give every new group its role, in order of case id, and return (training cases, held-out cases).

        Args:
            cases: labelled ones.
            shows: the structures that a case's label shows; called only for as many as a new group needs.
        """
        before = dict(self._roles)
        self._shows = functools.cache(lambda case_id: frozenset(shows(by_id[case_id])))
        by_id = {case.id: case for case in cases}
        self._restore(cases)
        ordered = sorted(cases, key=lambda case: case.id)
        for case in ordered:
            image = self._image_of(case)
            role = self._role_of_image(image)
            if self._known(case.id) is None:
                self._assign(case, role, ordered)
            elif role is not None:
                self._correct(case, role)
            if image is not None:
                self._note(image, case)
        if self._roles != before:
            write_json(self._path, self._roles)
        training = [case for case in cases if self._known(case.id) == TRAIN]
        return training, [case for case in cases if self._known(case.id) == HELD_OUT]

    def _assign(self, case: Case, role: str | None, cases: Sequence[Case]) -> None:
        """Give a new case its role: that of the same image (``role``), else its patient's, else the next."""
        if role is not None:
            self._roles[f"case {case.id}"] = role
            return
        group = self._as_written(case)
        role = self._roles.setdefault(group, self._role_of_patient(case, cases) or self._draw(case, cases))
        if case.patient:
            self._roles[f"{group}{_MEMBER}{case.id}"] = role

    def _correct(self, case: Case, role: str) -> None:
        """A file that is known by its bytes has come under a name that was another's: its own role counts."""
        for name in self._roles:
            if _case_of(name) == case.id:
                self._roles[name] = role

    def _as_written(self, case: Case) -> str:
        """The name of a case's group; a patient's as the file has it, whatever its capitals are now."""
        group = f"patient {case.patient}" if case.patient else f"case {case.id}"
        known = (name for name in self._groups() if case.patient and name.casefold() == group.casefold())
        return next(known, group)

    def _image_of(self, case: Case) -> str | None:
        """Its image file's SHA-256 as the file names it; None where that is noted already, or there is no such file."""
        if not case.image.is_file():
            return None
        noted = f"{_state(case.image)}{_OF}{case.id}"
        if any(name.startswith(_IMAGE) and name.endswith(noted) for name in self._roles):
            return None
        return f"{_IMAGE}{sha256_of(case.image)}"

    def _note(self, image: str, case: Case) -> None:
        """Write down whose the image is, in place of what was written of an older state of the same file."""
        for name in [n for n in self._roles if n.startswith(image) and n.endswith(f"{_OF}{case.id}")]:
            del self._roles[name]
        self._roles[f"{image}{_state(case.image)}{_OF}{case.id}"] = str(self._known(case.id))

    def _role_of_image(self, image: str | None) -> str | None:
        """What a case with the very same image was given; held out if any was."""
        if image is None:
            return None
        roles = {role for name, role in self._roles.items() if name.startswith(image)}
        return next((role for role in (HELD_OUT, TRAIN) if role in roles), None)

    def _groups(self) -> list[str]:
        """Patients, and cases without one, in the order in which they were given roles."""
        return [name for name in self._roles if _MEMBER not in name and not name.startswith(_IMAGE)]

    def explain(self, cases: Sequence[Case]) -> list[Assignment]:
        """Every case's role and the reason, those that only the file knows among them, by id; decides nothing."""
        known = {case.id: self._why(case) for case in cases}
        gone = {case for name in self._roles if (case := _case_of(name)) and case not in known}
        everything = [(name, self._known(name), why) for name, why in known.items()]
        everything += [(name, self._known(name), "decided earlier; no such image is here now") for name in gone]
        return [Assignment(*one) for one in sorted(everything)]

    def nothing_held_out(self, cases: Sequence[Case]) -> bool:
        """Whether the labelled ones of ``cases`` are enough to hold some out, and yet all of them train."""
        labelled = [case for case in cases if case.label]
        groups = {group_of(case) for case in labelled}
        return len(groups) >= HELD_OUT_EVERY and {self._known(case.id) for case in labelled} == {TRAIN}

    def _why(self, case: Case) -> str:
        role = self._known(case.id)
        if role is None:
            return "the next training decides" if case.label else "no label yet"
        names = [name for name in self._roles if _case_of(name) == case.id]
        groups = self._groups()
        group = names[0].split(_MEMBER)[0]
        if group not in groups:
            return "decided earlier"
        number, others = groups.index(group) + 1, sum(name.startswith(f"{group}{_MEMBER}") for name in self._roles) - 1
        what = group if group.startswith("patient ") else "it"
        beside = f", with {others} more of the same patient" if others > 0 else ""
        regular = (number % HELD_OUT_EVERY == 0) == (role == HELD_OUT)
        others_why = "restored, the same image as another, or no other held-out case was left or showed its structures"
        rule = f"one in {HELD_OUT_EVERY} is held out" if regular else others_why
        return f"{what} is number {number}, {rule}{beside}"

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
        others = {self._known(other.id) for other in cases if case.patient and group_of(other) == group_of(case)}
        return next((role for role in (TRAIN, HELD_OUT) if role in others), None)

    def _draw(self, case: Case, cases: Sequence[Case]) -> str:
        """Every fourth group is held out; and one at once where those that were have lost their labels, or show less
        than this one."""
        groups = len(self._groups())
        present = {group_of(one): role for one in cases if (role := self._known(one.id))}
        none_left = len(present) >= HELD_OUT_EVERY - 1 and HELD_OUT not in present.values()
        regular = groups % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        return HELD_OUT if none_left or regular or self._shows_more(case, cases, list(present.values())) else TRAIN

    def _shows_more(self, case: Case, cases: Sequence[Case], present: Sequence[str]) -> bool:
        """Whether a new group shows what no held-out case shows. It must also be there to learn from, and no more than
        half of the groups are held out for this."""
        if HELD_OUT not in present or 2 * (present.count(HELD_OUT) + 1) > len(present) + 1:
            return False
        of = {role: [one.id for one in cases if self._known(one.id) == role] for role in (TRAIN, HELD_OUT)}
        own = [one.id for one in cases if group_of(one) == group_of(case)]
        missing = self._shown(own) - self._shown(of[HELD_OUT])
        return bool(missing) and bool(missing & self._shown(of[TRAIN]))  # most of the labels to read are those

    def _shown(self, case_ids: Iterable[str]) -> set[str]:
        return set().union(*(self._shows(case_id) for case_id in case_ids))


def group_of(case: Case) -> str:
    """What is on one side as a whole, to be compared: the patient, whose capitals do not count, or the case alone."""
    return f"patient {case.patient.casefold()}" if case.patient else f"case {case.id}"


def roles_in(manifests: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Case id -> role, as models' manifests tell it; a case that any of them has learned from is no held-out case."""
    roles: dict[str, str] = {}
    for manifest in manifests:
        roles.update({case: HELD_OUT for case in manifest.get("held_out", []) if roles.get(case) != TRAIN})
        roles.update(dict.fromkeys(manifest.get("cases", []), TRAIN))
    return roles


def _case_of(name: str) -> str | None:
    """The case that an entry of the file is about; None: the patient as a whole."""
    if _MEMBER in name:
        return name.split(_MEMBER, 1)[1]
    return name.removeprefix("case ") if name.startswith("case ") else None


def _state(image: Path) -> str:
    """``state_of`` it, as the file names it."""
    modified, size = state_of(image)
    return f" {modified} {size}"


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
