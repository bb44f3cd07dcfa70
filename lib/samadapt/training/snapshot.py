"""The labels of a training as they were when it began, whatever is submitted while it runs."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from samadapt.data.cases import Case
from samadapt.data.volume import image_suffix
from samadapt.errors import StateError
from samadapt.files import atomic_path, state_of


def keep_labels(cases: Sequence[Case], folder: Path) -> list[Case]:
    """The cases with copies of their label files, which stay as they are.

    A training reads labels again at its end, minutes or hours later. By then a case may have another label, of another
    file type or with its segments numbered otherwise, which the names of before would misread.

    Args:
        cases: labelled ones.
        folder: where the copies are kept until the next training; copies of other labels are removed from it.

    Raises:
        StateError: a label is gone, as it has just been replaced.
    """
    kept = [_kept(case, folder) for case in cases]
    for other in set(folder.glob("*")) - {case.label for case in kept}:
        other.unlink()
    return kept


def _kept(case: Case, folder: Path) -> Case:
    assert case.label is not None
    copy = folder / f"{case.id}{image_suffix(case.label.name) or case.label.suffix}"
    try:
        if not copy.is_file() or state_of(copy) != state_of(case.label):
            with atomic_path(copy) as temporary:
                shutil.copy2(case.label, temporary)  # with its time: prepared slices are known by it
    except FileNotFoundError:
        raise StateError(
            f"the label of {case.id} was replaced just as the training began", where=case.label, remedy="Train again."
        ) from None
    return replace(case, label=copy)
