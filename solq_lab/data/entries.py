"""Lazy JSON: documents whose long lists stay text, so that an entry is decoded on access.

COCO's 470 MB of text are five gigabytes of Python's lists and numbers, and forked processes would copy them by merely
counting references. The text itself is shared, and one entry at a time is a few kilobytes.
"""

import json
import re
from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")


class Entries(Sequence[Any]):
    """A list of a JSON document. Each access decodes the entry anew: changes to it are not kept."""

    def __init__(self, text: str, starts: array, make_error: Callable[[Exception], Exception]) -> None:
        self._text = text  # the whole document
        self._starts = starts  # for each entry, where in the text it begins; 64-bit integers
        self._make_error = make_error  # the error for an entry that is nested too deep for the stack at its access

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, place: int) -> Any:  # type: ignore[override]  # no slices
        return self._decode(self._starts[place])

    def __iter__(self) -> Iterator[Any]:
        return map(self._decode, self._starts)

    def _decode(self, start: int) -> Any:
        try:
            return _DECODER.raw_decode(self._text, start)[0]
        except RecursionError as error:
            raise self._make_error(error) from None


def parse_document(text: str, long: Collection[str], make_error: Callable[[Exception], Exception]) -> Any:
    """What `json.loads` makes of a text, but for some lists of the outermost mapping.

    All of the text is read, entry by entry, so that no later access meets anything but JSON.

    Args:
        text: the document.
        long: keys of the outermost mapping whose lists become `Entries`.
        make_error: makes the error to raise of json's own, where the text is no JSON or cannot be decoded.
    """
    try:
        start = _skip_space(text, 0)
        return _parse_mapping(text, start, long, make_error) if text.startswith("{", start) else json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        raise make_error(error) from None


def _parse_mapping(
    text: str, start: int, long: Collection[str], make_error: Callable[[Exception], Exception]
) -> dict[str, Any]:
    document = {}
    more, place = _open(text, start, "}")
    while more:
        if not text.startswith('"', place):
            raise json.JSONDecodeError("Expecting property name enclosed in double quotes", text, place)
        key, place = _DECODER.raw_decode(text, place)
        place = _skip_space(text, place)
        if not text.startswith(":", place):
            raise json.JSONDecodeError("Expecting ':' delimiter", text, place)
        place = _skip_space(text, place + 1)

        if key in long and text.startswith("[", place):
            starts, place = _find_entries(text, place)
            document[key] = Entries(text, starts, make_error)
        else:
            document[key], place = _DECODER.raw_decode(text, place)
        more, place = _go_on(text, place, "}")

    end = _skip_space(text, place)
    if end != len(text):
        raise json.JSONDecodeError("Extra data", text, end)
    return document


def _find_entries(text: str, start: int) -> tuple[array, int]:
    """Where the entries of the list that opens at `start` begin, and the place behind its end."""
    starts = array("q")
    more, place = _open(text, start, "]")
    while more:
        starts.append(place)
        _, place = _DECODER.raw_decode(text, place)
        more, place = _go_on(text, place, "]")
    return starts, place


def _open(text: str, start: int, end: str) -> tuple[bool, int]:
    """Whether what opens at `start` has an item, and the place of the first; else the place behind its `end`."""
    place = _skip_space(text, start + 1)
    return (False, place + 1) if text.startswith(end, place) else (True, place)


def _go_on(text: str, place: int, end: str) -> tuple[bool, int]:
    """Whether another item follows the one that ends at `place`, and where it is; else the place behind the `end`."""
    place = _skip_space(text, place)
    if text.startswith(",", place):
        return True, _skip_space(text, place + 1)
    if not text.startswith(end, place):
        raise json.JSONDecodeError("Expecting ',' delimiter", text, place)
    return False, place + 1


def _skip_space(text: str, place: int) -> int:
    return _SPACE.match(text, place).end()  # type: ignore[union-attr]  # it matches everywhere
