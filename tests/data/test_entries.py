"""Documents whose long lists stay text: what json reads is read, entry by entry, and what it refuses is refused."""

import json
import sys
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solq_lab.data.entries import Entries, parse_document

LONG = ("images", "annotations")


class Refused(Exception):
    """What the reader of these documents raises; its text is json's."""


def refuse(error: Exception) -> Refused:
    return Refused(str(error))


def parse(text: str) -> Any:
    return parse_document(text, LONG, refuse)


def plain(document: Any) -> Any:
    """The document with its long lists as lists."""
    if not isinstance(document, dict):
        return document
    return {key: list(value) if isinstance(value, Entries) else value for key, value in document.items()}


_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=8,
)
_keys = st.one_of(st.sampled_from(["images", "annotations", "info"]), st.text(max_size=3))
_documents = st.one_of(st.dictionaries(_keys, st.one_of(st.lists(_values, max_size=4), _values), max_size=4), _values)
_indents = st.sampled_from([None, 0, 2, "\t"])


@settings(max_examples=200, derandomize=True, database=None, deadline=None)
@given(document=_documents, indent=_indents, ascii_only=st.booleans())
def test_a_document_says_what_json_reads(document, indent, ascii_only):
    text = json.dumps(document, indent=indent, ensure_ascii=ascii_only)
    assert plain(parse(f" {text}\n")) == json.loads(text)


@settings(max_examples=300, derandomize=True, database=None, deadline=None)
@given(
    document=st.dictionaries(_keys, st.lists(_values, max_size=3), min_size=1, max_size=3),
    place=st.integers(0, 10**6),
    character=st.sampled_from([*'{}[],:" 0x\ufeff', ""]),
)
def test_what_json_refuses_is_refused(document, place, character):
    text = json.dumps(document)
    place %= len(text)
    spoilt = text[:place] + character + text[place + 1 :] if character else text[:place]
    try:
        expected = json.loads(spoilt)
    except ValueError:
        with pytest.raises(Refused):
            parse(spoilt)
    else:
        assert plain(parse(spoilt)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"images"',
        '{"images" 1}',
        '{"images": [1 2]}',
        '{"images": [1',
        '{"images": [',
        '{"images": []',
        '{"images": [] "annotations": []}',
        '{"images": []} 1',
        '{"images": [{"id": 1}, {"id": 2]}',
        "{1: 2}",
        '\ufeff{"images": []}',
    ],
)
def test_the_reason_is_the_one_that_json_gives(text):
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(text)
    with pytest.raises(Refused) as found:
        parse(text)
    assert str(found.value) == str(expected.value)


def test_of_a_key_that_comes_twice_the_last_one_counts():
    assert list(parse('{"images": [1], "images": [2, 3]}')["images"]) == [2, 3]


def test_only_the_named_lists_of_the_outermost_mapping_stay_text():
    document = parse('{"images": [], "annotations": [7], "categories": [1], "info": {"images": [2]}}')
    assert [type(document[key]) for key in ("images", "annotations", "categories")] == [Entries, Entries, list]
    assert (len(document["images"]), document["annotations"][-1]) == (0, 7)
    assert document["info"] == {"images": [2]}
    with pytest.raises(IndexError):
        document["images"][0]


def test_a_nest_too_deep_is_refused_when_it_is_read_and_when_it_is_asked_for():
    deep = "[" * 100_000 + "]" * 100_000
    with pytest.raises(Refused, match="recursion"):
        parse(f'{{"images": [{deep}]}}')
    entries = Entries(deep, parse('{"images": [0]}')["images"]._starts, refuse)
    entries._starts[0] = 0
    with pytest.raises(Refused, match="recursion"):
        entries[0]


def test_the_entries_take_little_more_memory_than_their_text():
    polygon = [float(number) + 0.25 for number in range(60)]
    text = json.dumps({"annotations": [{"id": number, "segmentation": [polygon]} for number in range(2000)]})
    held = []
    for read in (parse, json.loads):
        tracemalloc.start()
        document = read(text)
        held.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(document["annotations"]) == 2000
    assert held[0] < sys.getsizeof(text) / 10 < held[1]
