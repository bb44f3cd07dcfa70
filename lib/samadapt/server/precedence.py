"""Which of two labels of one image counts.

A label that a person submitted through samadapt counts until another person's follows. What another program has
stored in the PACS takes its place only if it says that it was drawn later *and* has every structure that the person
drew: a program's clock, or a SEG of the tumour alone, must not undo an hour of somebody's work unasked. Among other
programs' labels the latest counts. Whichever does not count is kept as a version, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from samadapt.data.labels import class_names, same_name


@dataclass(frozen=True)
class Claim:
    """One label of an image.

    Attributes:
        person: whether it was submitted through samadapt.
        time: when it was drawn, epoch seconds; 0 where it does not say.
        structures: names of what is drawn in it.
    """

    person: bool
    time: int
    structures: tuple[str, ...]

    @classmethod
    def of(cls, person: bool, time: int, names: Iterable[str]) -> Claim:
        """With the names of structures alone, each once."""
        return cls(person, time, tuple(class_names(sorted(names))))


def objection(new: Claim, present: Claim) -> str | None:
    """Why ``new`` does not take the place of ``present``, for people; None: it does."""
    if new.person == present.person:
        return None if new.time >= present.time else "a later label counts"
    if not new.person:
        return _of_program(new, present)
    return None if _of_program(present, new) else "another program's label counts, which is newer and complete"


def _of_program(program: Claim, person: Claim) -> str | None:
    if program.time <= person.time:
        return "it is not newer than the label that was submitted here"
    has = {same_name(name) for name in program.structures}
    lacking = [name for name in person.structures if same_name(name) not in has]
    if lacking:
        return f"it lacks {', '.join(map(repr, lacking))}, which the label that was submitted here has"
    return None
