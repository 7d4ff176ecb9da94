"""The class channels of the network and their categories in the annotation file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from solq_lab.data.annotations import DataError, conversion_of, is_id, shorten

UNUSED = -1  # category id of a channel that no category uses; its name is empty
MAX_RAW_CHANNELS = 10_000


@dataclass(frozen=True)
class ClassMap:
    """Class channels, in order."""

    names: tuple[str, ...]  # one name per channel; empty for an unused channel
    category_ids: tuple[int, ...]  # one category id per channel; `UNUSED` for an unused channel

    def __post_init__(self) -> None:
        if len(self.names) != len(self.category_ids):
            raise DataError(f"a class map of {len(self.names)} names has {len(self.category_ids)} category ids")
        used = [category_id for category_id in self.category_ids if category_id != UNUSED]
        for category_id, count in Counter(used).items():
            if count > 1:
                raise DataError(
                    f"category id {category_id} has more than one class channel; category ids have to be unique"
                )

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def from_categories(
        cls,
        categories: Sequence[Any],
        class_ids: Literal["contiguous", "raw"] = "contiguous",
        num_classes: int | None = None,
        *,
        source: str = "annotations",
    ) -> ClassMap:
        """The map of the list `categories` of a COCO annotation file.

        Args:
            categories: the list.
            class_ids: "contiguous": channels 0, 1, ... by rising category id; "raw": the category id is the channel, as
                in the released models (91 channels for COCO, eleven of them unused).
            num_classes: number of channels, the rest unused; None: as many as needed.
            source: name of the file in messages.

        Raises:
            DataError: unusable categories, or more of them than `num_classes`.
        """
        channels: dict[int, tuple[str, int]] = {}
        for place, category in enumerate(categories):
            category_id = category.get("id") if isinstance(category, dict) else None
            if not is_id(category_id) or category_id < 0:
                conversion = conversion_of(category, "id")
                raise DataError(
                    f"{source}: categories[{place}]: found {shorten(category)}; needed is an 'id' >= 0{conversion}"
                )
            if category_id in channels:
                raise DataError(f"{source}: category id {category_id} comes more than once; ids have to be unique")
            channels[category_id] = (name_of_category(category, source), category_id)

        if class_ids == "raw" and max(channels, default=0) >= MAX_RAW_CHANNELS:
            raise DataError(
                f"{source}: category id {max(channels)} as a class channel makes a network of as many; set "
                f"data.class_ids: contiguous, or give ids below {MAX_RAW_CHANNELS}"
            )

        rows = sorted(channels.values(), key=lambda row: row[1])
        if class_ids == "raw":
            rows = [channels.get(channel, ("", UNUSED)) for channel in range(max(channels, default=-1) + 1)]
        if num_classes is not None and num_classes < len(rows):
            raise DataError(
                f"{source}: {len(rows)} class channels ({class_ids} ids) do not fit num_classes {num_classes}; "
                "raise data.num_classes or leave it empty"
            )
        rows += [("", UNUSED)] * ((num_classes or 0) - len(rows))
        return cls(tuple(name for name, _ in rows), tuple(category_id for _, category_id in rows))

    def same_names(self) -> list[str]:
        """Names of more than one class, which are learnt as different classes all the same."""
        return [name for name, count in Counter(self.names).items() if count > 1 and name]

    @classmethod
    def from_json(cls, text: str) -> ClassMap:
        """The map that `to_json` wrote.

        Raises:
            DataError: the text is something else.
        """
        try:
            value = json.loads(text)
            return cls(tuple(map(str, value["names"])), tuple(map(int, value["category_ids"])))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise DataError(f"not a class map: {error!r}; needed are the lists 'names' and 'category_ids'") from None

    def to_json(self) -> str:
        """The map as one line of JSON, for the metadata of a weight file."""
        return json.dumps({"names": self.names, "category_ids": self.category_ids}, ensure_ascii=False)

    def channel_of(self, category_id: int) -> int:
        """The class channel of a category.

        Raises:
            DataError: no channel has this category id.
        """
        try:
            return self._channels[category_id]
        except KeyError:
            used = sorted(self._channels)
            shown = ", ".join(map(str, used[:12])) + (f", ... {used[-1]}" if len(used) > 12 else "")
            has = f"it has {len(used)} category ids: {shown}"
            raise DataError(f"category id {category_id} is not in the class map; {has}") from None

    @cached_property
    def _channels(self) -> dict[int, int]:
        return {category_id: channel for channel, category_id in enumerate(self.category_ids) if category_id != UNUSED}


def name_of_category(category: dict[str, Any], source: str) -> str:
    """The name of an entry of `categories`, as text; its id where it has none.

    Raises:
        DataError: half of a surrogate pair, which no file can store; `source` is the file in the message.
    """
    name = category["id"] if category.get("name") in (None, "") else category["name"]
    name = name if isinstance(name, str) else shorten(name)
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{source}: category id {category['id']}: name {shorten(name)} is no Unicode text; correct it"
        ) from None
    return name
