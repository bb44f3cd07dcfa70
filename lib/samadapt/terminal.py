"""How commands speak: results on standard output, progress on standard error, or one JSON object for programs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

FILE_WIDTH = 200
"""Of tables in characters where standard output is a file or a pipe, so that names can be searched for and copied."""


class Terminal:
    """Where one command writes.

    Args:
        stdout: for results.
        as_json: write the result as one JSON object instead of tables and text.
    """

    def __init__(self, stdout: TextIO, *, as_json: bool) -> None:
        self._stdout = stdout
        self._as_json = as_json
        width = None if stdout.isatty() or "COLUMNS" in os.environ else FILE_WIDTH  # None: rich finds it out
        self._results = Console(file=stdout, width=width, highlight=False, soft_wrap=True)
        self.notes = Console(stderr=True, highlight=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """One line for the person who waits."""
        self.notes.print(text, markup=False)

    def result(self, value: Any, *shown: RenderableType) -> None:
        """The command's outcome: ``value`` for programs, ``shown`` for people."""
        if self._as_json:
            self._stdout.write(json.dumps(plain(value), indent=2) + "\n")
        else:
            for item in shown:
                self._results.print(item)
        self._stdout.flush()

    @contextlib.contextmanager
    def bar(self, text: str) -> Iterator[Callable[..., None]]:
        """A progress bar; yields ``update(completed=..., total=..., description=...)``, every part optional.

        Where standard error is no terminal, each new description becomes a line instead.
        """
        if not self.notes.is_terminal:
            yield self._lines(text)
            return
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
        with Progress(*columns, TimeElapsedColumn(), console=self.notes) as progress:
            task = progress.add_task(text, total=None)

            def update(**changes: Any) -> None:
                progress.update(task, **changes)

            yield update

    def _lines(self, text: str) -> Callable[..., None]:
        last = text
        self.note(text)

        def update(**changes: Any) -> None:
            nonlocal last
            if changes.get("description", last) != last:
                last = changes["description"]
                self.note(last)

        return update


@contextlib.contextmanager
def terminal(*, as_json: bool) -> Iterator[Terminal]:
    """The terminal of one command. With ``as_json``, whatever else prints goes to standard error meanwhile."""
    stdout = sys.stdout
    redirect = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
    with redirect:
        yield Terminal(stdout, as_json=as_json)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table; the first column is text, kept in one line where it can be; numbers in others stand to the right."""
    shown = Table(title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        justify: Literal["left", "right"] = "right" if number and _numeric(rows, number) else "left"
        shown.add_column(column, justify=justify, overflow="fold", no_wrap=not number)
    for row in rows:
        shown.add_row(*row)
    return shown


def figure(value: float, digits: int = 3) -> str:
    """A number for people; a dash where there is nothing to measure."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def plain(value: Any) -> Any:
    """``value`` in JSON's own types: NaN becomes null, paths text, dataclasses objects."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def _numeric(rows: Sequence[Sequence[str]], column: int) -> bool:
    return all(
        row[column].replace(".", "").replace(",", "").lstrip("-").isdecimal() or row[column] == "-" for row in rows
    )
