"""QIDO-RS: which of the headers match a query, as PS3.4 C.2.2.2 and PS3.18 8.3.4 have it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import translate
from typing import Any

from pydicom.datadict import dictionary_VR, keyword_for_tag, tag_for_keyword

from samadapt.config import closest
from samadapt.dicomweb.index import INSTANCE_KEYWORDS, SERIES_KEYWORDS, STUDY_KEYWORDS, Found
from samadapt.errors import InputError

MODALITIES = "ModalitiesInStudy"
KNOWN = (*STUDY_KEYWORDS, *SERIES_KEYWORDS, *INSTANCE_KEYWORDS, MODALITIES)

_RANGES = ("DA", "TM", "DT")


@dataclass(frozen=True)
class Query:
    """What is asked for.

    Attributes:
        filters: keyword -> wanted value.
        limit: most results; None for all.
        offset: how many to leave out first.
        fuzzy: parts of a person's name match too.
    """

    filters: Mapping[str, str]
    limit: int | None = None
    offset: int = 0
    fuzzy: bool = False

    @classmethod
    def from_parameters(cls, parameters: Iterable[tuple[str, str]]) -> Query:
        """Of a request's parameters; ``includefield`` is taken and needs nothing: every answer has all attributes.

        Raises:
            InputError: an attribute that is not indexed (leaving it out would match too much), or no number.
        """
        filters: dict[str, str] = {}
        numbers = {"limit": None, "offset": 0}
        fuzzy = False
        for name, value in parameters:
            if name in numbers:
                if not re.fullmatch(r"\d{1,9}", value):
                    raise InputError(f"{value!r} is no number of results", where=name, remedy="Give 0, 1, 2, ...")
                numbers[name] = int(value)  # type: ignore[assignment]
            elif name == "fuzzymatching":
                fuzzy = value.lower() == "true"
            elif name != "includefield" and value:
                filters[_keyword(name)] = value
        return cls(filters, numbers["limit"], numbers["offset"] or 0, fuzzy)

    def select(self, found: Iterable[Found]) -> list[Found]:
        matching = [
            one for one in found if all(self._matches(one, name, value) for name, value in self.filters.items())
        ]
        end = None if self.limit is None else self.offset + self.limit
        return matching[self.offset : end]

    def _matches(self, found: Found, name: str, wanted: str) -> bool:
        if name == MODALITIES:
            asked = re.split(r"[\\,/]", wanted)
            return any(_text_matches(have, one, "CS", False) for have in found.modalities for one in asked)
        values = _values(found.header, name)
        vr = dictionary_VR(name)
        if vr == "UI":
            return any(value in re.split(r"[\\,]", wanted) for value in values)
        if vr in _RANGES and "-" in wanted:
            low, _, high = wanted.partition("-")
            return any((not low or value >= low) and (not high or value[: len(high)] <= high) for value in values)
        return any(_text_matches(value, wanted, vr, self.fuzzy) for value in values)


def element(keyword: str, *values: Any) -> dict[str, Any]:
    """A DICOM JSON attribute as ``{tag: {vr, Value}}``."""
    return {f"{tag_for_keyword(keyword):08X}": {"vr": dictionary_VR(keyword), "Value": list(values)}}


def uid_of(header: Mapping[str, Any], keyword: str) -> str:
    return str(header[f"{tag_for_keyword(keyword):08X}"]["Value"][0])


def _keyword(name: str) -> str:
    """Of a parameter, which names an attribute by keyword or by eight hexadecimal digits."""
    keyword = keyword_for_tag(int(name, 16)) if re.fullmatch(r"[0-9A-Fa-f]{8}", name) else name
    if keyword not in KNOWN:
        raise InputError(
            f"cannot search for {name!r}", where="query", remedy=closest(keyword, KNOWN) or "Search for less."
        )
    return keyword


def _values(header: Mapping[str, Any], keyword: str) -> list[str]:
    values = header.get(f"{tag_for_keyword(keyword):08X}", {}).get("Value", [])
    return [str(value.get("Alphabetic", "")) if isinstance(value, dict) else str(value) for value in values]


def _text_matches(value: str, wanted: str, vr: str, fuzzy: bool) -> bool:
    if vr == "PN":
        value, wanted = value.lower(), wanted.lower()
        if fuzzy and not re.search(r"[*?]", wanted):
            return all(any(part.startswith(word) for part in re.split(r"[\^ =]", value)) for word in wanted.split())
    if "*" in wanted or "?" in wanted:
        return re.fullmatch(translate(wanted.replace("[", "[[]")), value) is not None
    return value == wanted
