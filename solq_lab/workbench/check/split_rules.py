"""What can be wrong between the images of a data set, and between its splits."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

from solq_lab.data.annotations import shorten
from solq_lab.workbench.check.findings import Finding


def same_bytes(names: Sequence[str], ids: Sequence[int], digests: Sequence[bytes]) -> Iterator[Finding]:
    """Images of one split whose files are equal; `digests` are empty where a file was not read."""
    first: dict[bytes, str] = {}
    for name, image_id, digest in zip(names, ids, digests, strict=True):
        before = first.setdefault(digest, name) if digest else name
        if os.path.normpath(before) != os.path.normpath(name):
            yield Finding("image-twice", f"{shorten(before)} and {shorten(name)} have the same bytes", name, image_id)


def compare_files(train: Mapping[str, bytes], val: Mapping[str, bytes]) -> Iterator[Finding]:
    """Images of val that are in train: by their bytes where they were read, else by name; digests by file name."""
    by_digest = {digest: name for name, digest in train.items() if digest}
    for name, digest in val.items():
        if digest in by_digest:
            message = f"{shorten(name)} of val has the bytes of {shorten(by_digest[digest])} of train"
            yield Finding("image-in-both", message, name)
        elif name in train:
            read = digest and train[name]
            known = "other bytes" if read else "the bytes were not compared"
            yield Finding("name-in-both", f"{shorten(name)}: {known}", name)


def compare_classes(train: Mapping[int, str], val: Mapping[int, str]) -> Iterator[Finding]:
    """Category ids that mean one thing in train and another in val; names by category id."""
    for category in sorted(train.keys() & val.keys()):
        if train[category] != val[category]:
            message = f"category id {category}: {shorten(train[category])} in train, {shorten(val[category])} in val"
            yield Finding("categories-differ", message)


def untrained_classes(train: Mapping[str, int], val: Mapping[str, int]) -> Iterator[Finding]:
    """Categories that are measured but never learnt; objects by category name."""
    for name, count in val.items():
        if count and not train.get(name):
            yield Finding("class-not-trained", f"{shorten(name)}: {count} objects in val, none in train", weight=count)
