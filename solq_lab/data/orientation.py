"""Whether annotations count the pixels of images with an EXIF orientation as stored or upright.

The sizes in the annotation file tell it where an image lies on its side: they are those of the stored or those of the
upright image. For square images, half turns and mirror images both have the same size.
"""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from solq_lab.bars import progress_bar
from solq_lab.data.coco import CocoDataset
from solq_lab.data.images import Header, read_header
from solq_lab.errors import DataError, first_few, shorten

logger = logging.getLogger(__name__)

Reading = Literal["stored", "upright", "undecided"]
READERS = 8  # threads that wait for disks
CHOICE = (
    "their sizes do not tell whether the annotations count pixels as stored or as a viewer shows them; look at the "
    "outlines, and set data.orientation=stored or data.orientation=upright (of evaluate: --orientation)"
)


def reading_of(header: Header, size: tuple[int, int]) -> Reading | None:
    """What the annotated (height, width) of an image says; None of one that is not turned, or fits neither way."""
    stored, upright = header.size, header.size_as("upright")
    if header.turn == 1 or size not in (stored, upright):
        return None
    if stored == upright:
        return "undecided"
    return "stored" if size == stored else "upright"


def check_orientation(datasets: Sequence[CocoDataset]) -> None:
    """Look for turned images before a training whose experiment and annotations say nothing of them.

    Images that cannot be decided are read as stored, and a warning names them.

    Raises:
        DataError: annotations count the pixels of turned images upright, or some one way and some the other.
    """
    found: dict[Reading, list[str]] = {"stored": [], "upright": [], "undecided": []}
    for dataset in datasets:
        if dataset.truth.orientation is not None:
            continue

        def look(index: int, dataset: CocoDataset = dataset) -> Reading | None:
            path = dataset.images / dataset.truth.file_names[index]
            try:
                return reading_of(read_header(path, str(path)), dataset.truth.size(index))
            except DataError:  # the loader says what is wrong with it, or replaces it
                return None

        with ThreadPoolExecutor(READERS) as pool:
            read = pool.map(look, range(len(dataset)))
            readings = progress_bar(read, desc="looking for turned images", total=len(dataset))
            for name, reading in zip(dataset.truth.file_names, readings, strict=True):
                if reading is not None:
                    found[reading].append(shorten(name))

    source, upright = datasets[0].annotations, found["upright"]
    if upright and found["stored"]:
        raise DataError(
            f"{source}: {len(upright)} images that are turned by EXIF are annotated upright ({first_few(upright)}), "
            f"and {len(found['stored'])} as stored ({first_few(found['stored'])}); annotate all of them one way"
        )
    if upright:
        raise DataError(
            f"{source}: {len(upright)} images are turned by EXIF and annotated upright ({first_few(upright)}); set "
            "data.orientation=upright (of evaluate: --orientation upright)"
        )
    if found["undecided"] and not found["stored"]:
        undecided = found["undecided"]
        logger.warning("%d images are turned by EXIF (%s); %s", len(undecided), first_few(undecided), CHOICE)
