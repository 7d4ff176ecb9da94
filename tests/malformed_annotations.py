"""Malformed annotation files: a valid COCO document of two small images with one or several random faults."""

import copy
import json
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

HEIGHT, WIDTH = 30, 40
NUM_IMAGES = ("a.png", "b.png")
SQUARE = [10.0, 5.0, 20.0, 5.0, 20.0, 15.0, 10.0, 15.0]
RLE = {"size": [HEIGHT, WIDTH], "counts": "d:k05O1O1O10001N1O1O1O1Nm[7"}
RUNS = {"size": [HEIGHT, WIDTH], "counts": [300, 10, 20, 10, 860]}

_numbers = st.one_of(
    st.integers(-3, 60),
    st.integers(),
    st.floats(),
    st.floats(-50, 90),
    st.sampled_from([0, -0.0, 1e-320, 1e300, -1e300, 2**31, 2**32, 2**63, -(2**63) - 1, 10**400, 0.1, 1e-12]),
)
_texts = st.one_of(
    st.sampled_from(["", "0", "1", "a.png", "nan", "\x00", "\ud800", "häß 猫", "a" * 300, "a\nb", "../a.png"]),
    st.text(max_size=6),
)
_scalars = st.one_of(st.none(), st.booleans(), _numbers, _texts)
_values = st.recursive(
    _scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=5), st.dictionaries(_texts, inner, max_size=3)),
    max_leaves=8,
)
_nest = st.sampled_from([[], {}, [[[]]], [[1, 2, 3]], {"size": [1, 1], "counts": []}])
_anything = st.one_of(_values, _nest)

_coordinates = st.one_of(st.floats(-5, 45), st.integers(-50, 90), _numbers)
_polygons = st.one_of(
    st.lists(st.lists(st.floats(-5, 45), min_size=6, max_size=12).map(lambda p: p[: len(p) // 2 * 2]), max_size=3),
    st.lists(st.lists(_coordinates, max_size=9), max_size=3),
    st.lists(st.one_of(_scalars, st.lists(_scalars, max_size=8)), max_size=3),
    st.just([SQUARE * 200]),
    st.just([[1.0, 1.0, 30.0, 20.0, 30.0, 1.0, 1.0, 20.0]]),
)
_sizes = st.one_of(
    st.just([HEIGHT, WIDTH]), st.just([WIDTH, HEIGHT]), st.lists(_numbers, max_size=3), st.just([30.0, 40.0]), _scalars
)
_counts = st.one_of(
    st.lists(st.integers(0, 600), max_size=6).map(lambda runs: [*runs, max(0, HEIGHT * WIDTH - sum(runs))]),
    st.lists(_numbers, max_size=6),
    st.just([1500, 100, -400]),
    st.text(st.characters(min_codepoint=48, max_codepoint=111), max_size=12),
    st.text(max_size=8),
    st.sampled_from(["oooooooooooo", "PPPP", "0\x000", "é", "\ud800", RLE["counts"][:-1], RLE["counts"] * 2, "l7`0"]),
    _anything,
)
_rles = st.fixed_dictionaries({}, optional={"size": _sizes, "counts": _counts})
_boxes = st.one_of(
    st.lists(st.floats(-20, 60), min_size=4, max_size=4),
    st.lists(_numbers, min_size=4, max_size=4),
    st.lists(_scalars, max_size=5),
    st.sampled_from([[0, 0, 0, 0], [39.5, 29.5, 50, 50], [10, 5, 1e-12, 10], [-100, -100, 5, 5], "abcd", [[]] * 4]),
)
_names = st.one_of(
    st.sampled_from(
        ["../a.png", "/etc/hostname", "x/../../a.png", "a.png\x00", "", ".", "./a.png", "sub/a.png", "a" * 5000 + "/b"]
    ),
    st.sampled_from(NUM_IMAGES),
    _texts,
)
_sides = st.one_of(st.integers(-2, 70), st.just(10**6), _scalars)
_ids = st.one_of(st.integers(-1, 4), _scalars)

FIELDS: dict[str, dict[str, st.SearchStrategy]] = {
    "images": {"id": _ids, "file_name": _names, "height": _sides, "width": _sides},
    "annotations": {
        "id": _ids,
        "image_id": _ids,
        "category_id": _ids,
        "bbox": _boxes,
        "segmentation": st.one_of(_polygons, _rles, _anything),
        "iscrowd": st.one_of(st.integers(0, 1), _scalars),
        "area": _scalars,
    },
    "categories": {"id": _ids, "name": st.one_of(_texts, _anything)},
}


def valid_document() -> dict[str, Any]:
    """Two images, two classes; polygons, both spellings of an RLE, and a crowd."""
    common = {"bbox": [10, 5, 10, 10], "area": 100.0, "iscrowd": 0}
    return {
        "images": [
            {"id": number, "file_name": name, "height": HEIGHT, "width": WIDTH}
            for number, name in enumerate(NUM_IMAGES, start=1)
        ],
        "annotations": [
            common | {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [SQUARE]},
            common | {"id": 2, "image_id": 1, "category_id": 2, "segmentation": dict(RUNS)},
            common | {"id": 3, "image_id": 2, "category_id": 1, "segmentation": dict(RUNS), "iscrowd": 1},
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }


Change = Callable[[dict[str, Any]], None]


@st.composite
def changes(draw: st.DrawFn) -> Change:
    """One random fault; it does nothing where an earlier one has removed its place."""
    kind = draw(st.sampled_from(["field", "field", "field", "field", "drop", "repeat", "entry", "list", "empty"]))
    section = draw(st.sampled_from(["images", "annotations", "annotations", "annotations", "categories"]))
    place = draw(st.integers(0, 2))
    field = draw(st.sampled_from(sorted(FIELDS[section])))
    values = {"field": FIELDS[section][field], "entry": _anything, "list": _anything}.get(kind, st.none())
    value = copy.deepcopy(draw(values))  # a later change may reach into it

    def apply(document: dict[str, Any]) -> None:
        entries = document.get(section)
        if kind == "list":
            document[section] = value
        elif kind == "empty":
            document[section] = []
        elif isinstance(entries, list) and entries:
            where = place % len(entries)
            if kind == "entry":
                entries[where] = value
            elif kind == "repeat":
                entries.append(copy.deepcopy(entries[where]))
            elif isinstance(entries[where], dict):
                if kind == "drop":
                    entries[where].pop(field, None)
                else:
                    entries[where][field] = value

    return apply


@st.composite
def annotation_files(draw: st.DrawFn) -> bytes:
    """The bytes of an annotation file: most are JSON, some are malformed as text too."""
    document = valid_document()
    for change in draw(st.lists(changes(), min_size=1, max_size=3)):
        change(document)
    text = json.dumps(document)  # NaN and Infinity as Python's json spells them, half characters as escapes
    match draw(st.sampled_from(["json"] * 12 + ["cut", "bom", "latin", "utf16", "nested", "list", "digits", "bytes"])):
        case "cut":
            return text.encode()[: draw(st.integers(0, len(text)))]
        case "bom":
            return b"\xef\xbb\xbf" + text.encode()
        case "latin":
            return text.replace("cat", "caf\xe9").encode("latin-1")
        case "utf16":
            return text.encode("utf-16")
        case "nested":
            depth = draw(st.sampled_from([50, 900, 5000, 100_000]))
            return text.replace('"cat"', "[" * depth + "]" * depth).encode()
        case "list":
            return json.dumps([document]).encode()
        case "digits":
            return text.replace('"id": 1', '"id": ' + "9" * draw(st.sampled_from([19, 400, 5000]))).encode()
        case "bytes":
            return draw(st.binary(max_size=40))
    return text.encode()
