"""Files of predicted objects, one class per format; docs/predict.md describes them."""

import csv
import io
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from PIL import Image
from pycocotools import mask as coco_rle

from solq_lab.allocation import collecting_no_garbage
from solq_lab.data.annotations import clamped_box
from solq_lab.data.classes import UNUSED, ClassMap
from solq_lab.errors import UserError
from solq_lab.evaluation.results import write_results
from solq_lab.files import replacing, write_text
from solq_lab.outlines import join_rings
from solq_lab.structures import Detections
from solq_lab.viz.images import MaskWindow, paint_detections
from solq_lab.workbench.predictions.sources import Source, output_paths
from solq_lab.workbench.predictions.video import Frame, VideoWriter

LABELME = "5.5.0"  # version of the format that polygons are written in


class InputImage(NamedTuple):
    """An image, or a frame of a video."""

    source: Source  # the file that it is, or is in
    image_id: int  # in COCO files
    pixels: np.ndarray  # (H, W, 3) uint8 RGB
    frame: Frame | None = None  # None for an image
    number: int = 0  # of the frame, from 0

    @property
    def stem(self) -> str:
        """Path of its files in the folder of a format, without suffix."""
        return self.source.stem if self.frame is None else f"{self.source.stem}/{self.number:06}"

    @property
    def entry(self) -> dict[str, Any]:
        """What a COCO document says of it; of a frame also its number."""
        height, width = self.pixels.shape[:2]
        entry = {"id": self.image_id, "file_name": self.source.name, "width": width, "height": height}
        return entry if self.frame is None else entry | {"frame": self.number}


class Output(ABC):
    """Files of one format in the folder `out`."""

    def __init__(self, out: Path, classes: ClassMap) -> None:
        self._out, self._classes = out, classes

    @abstractmethod
    def write(self, image: InputImage, found: Detections) -> None:
        """Add an image, whose boxes may leave it."""

    def close(self) -> None:  # noqa: B027  (most formats have nothing left)
        """Write what is written once for all images; by default nothing."""


class Drawn(Output):
    """The images with their objects drawn in, at their own size: PNG, of a video one MP4."""

    _source: Source | None = None  # of the video that is being written
    _video: VideoWriter | None = None

    def write(self, image: InputImage, found: Detections) -> None:
        painted = paint_detections(image.pixels, found.clipped())
        (path,) = output_paths(self._out, image.source.stem, ["drawn"], video=image.source.is_video)
        if image.frame is None:
            _save(painted, path)
            return
        if self._source != image.source:
            self.close()
            self._source, self._video = image.source, VideoWriter(path, image.frame)
        assert self._video is not None
        self._video.write(image.frame, np.asarray(painted))

    def close(self) -> None:
        if self._video is not None:
            self._video.close()
            self._video = None


class Masks(Output):
    """Two grey PNGs, the object and the class of each pixel from 1 on; 0 is background, the best object is on top."""

    def write(self, image: InputImage, found: Detections) -> None:
        kind = np.uint8 if max(len(found), len(self._classes)) < 256 else np.uint16
        objects = np.zeros(image.pixels.shape[:2], dtype=kind)
        for row in reversed(range(len(found))):
            window = MaskWindow.of_rle((found.masks or [])[row])
            tall, wide = window.bitmap.shape
            inside = objects[window.top : window.top + tall, window.left : window.left + wide]
            np.copyto(inside, kind(row + 1), where=window.bitmap)

        of_objects, of_classes = output_paths(self._out, image.stem, ["masks"])
        _save(Image.fromarray(objects), of_objects)
        _save(Image.fromarray(np.append(0, found.labels + 1).astype(kind)[objects]), of_classes)

    def close(self) -> None:
        lines = [f"{' '.join(name.splitlines())}\n" for name in self._classes.names]
        write_text(self._out / "masks" / "classes.txt", "".join(lines))


class Polygons(Output):
    """LabelMe's JSON: the exact outlines, one polygon per part; the parts of an object share their group_id."""

    def write(self, image: InputImage, found: Detections) -> None:
        (path,) = output_paths(self._out, image.stem, ["polygons"])
        shapes = []
        with collecting_no_garbage():  # a photograph has millions of corners, each a list
            for row, (one, parts) in enumerate(zip(found, found.polygons(), strict=True)):
                shape = {"label": one.name, "group_id": row + 1, "description": f"score {one.score:.4f}"}
                shape |= {"shape_type": "polygon", "flags": {}}
                shapes += [shape | {"points": points.tolist()} for points in parts]

        height, width = image.pixels.shape[:2]
        known = image.frame is None and Path(image.source.name).exists()
        place = os.path.relpath(image.source.name, path.parent) if known else f"{image.stem}{image.source.suffix}"
        document: dict[str, Any] = {
            "version": LABELME,
            "flags": {},
            "shapes": shapes,
            "imagePath": place,
            "imageData": None,
            "imageHeight": height,
            "imageWidth": width,
        }
        write_text(path, json.dumps(document))


class Yolo(Output):
    """YOLO segmentation: a line per object with its class and polygon, or its box, in shares of the image's sides."""

    def write(self, image: InputImage, found: Detections) -> None:
        (path,) = output_paths(self._out, image.stem, ["yolo"])
        height, width = image.pixels.shape[:2]
        lines = []
        if found.masks is None:
            x0, y0, x1, y1 = found.clipped().boxes.double().numpy().T
            shapes = list(np.stack([x0 + x1, y0 + y1, 2 * (x1 - x0), 2 * (y1 - y0)], axis=1).reshape(-1, 2, 2) / 2)
        else:
            shapes = [join_rings(parts) if parts else np.zeros((0, 2)) for parts in found.polygons()]
        for label, points in zip(found.labels.tolist(), shapes, strict=True):
            if len(points):
                lines.append(" ".join([str(label), *(f"{share:.6f}" for share in (points / (width, height)).ravel())]))
        write_text(path, "".join(f"{line}\n" for line in lines))

    def close(self) -> None:
        write_text(self._out / "data.yaml", yaml.safe_dump({"names": list(self._classes.names)}, allow_unicode=True))


class Csv(Output):
    """objects.csv, a row per object."""

    columns = ("file", "frame", "object", "class", "category_id", "score", "x0", "y0", "x1", "y1", "area")

    def __init__(self, out: Path, classes: ClassMap) -> None:
        super().__init__(out, classes)
        self._text = io.StringIO()
        self._writer = csv.writer(self._text, lineterminator="\n")
        self._writer.writerow(self.columns)

    def write(self, image: InputImage, found: Detections) -> None:
        number = "" if image.frame is None else image.number
        for row, (one, category) in enumerate(zip(found.clipped(), found.category_ids or [], strict=True)):
            area = "" if one.mask is None else int(coco_rle.area(one.mask))
            box = [f"{edge:.2f}" for edge in one.box]
            about = [image.source.name, number, row + 1, one.name, category, f"{one.score:.6f}"]
            self._writer.writerow([*about, *box, area])

    def close(self) -> None:
        write_text(self._out / "objects.csv", self._text.getvalue(), errors="surrogateescape")


class Coco(Output):
    """coco.json, a data set with all objects, and their results for pycocotools: coco_segm.json and coco_bbox.json."""

    def __init__(self, out: Path, classes: ClassMap) -> None:
        super().__init__(out, classes)
        self._masks = True
        self._images: list[dict[str, Any]] = []
        self._results: list[dict[str, Any]] = []

    def write(self, image: InputImage, found: Detections) -> None:
        self._images.append(image.entry)
        self._results += found.to_coco(image.image_id)
        self._masks = found.masks is not None

    def close(self) -> None:
        # Boxes of the data set end at the borders; those of the results are scored as the evaluation scores them.
        annotations, sizes = [], {entry["id"]: (entry["height"], entry["width"]) for entry in self._images}
        for number, result in enumerate(self._results):
            x0, y0, x1, y1 = clamped_box(result["bbox"], sizes[result["image_id"]], f"object {number}")
            box, rle = [x0, y0, x1 - x0, y1 - y0], result.get("segmentation")
            area = box[2] * box[3] if rle is None else int(coco_rle.area(rle))
            annotations.append({"id": number + 1, **result, "bbox": box, "area": area, "iscrowd": 0})
        pairs = zip(self._classes.category_ids, self._classes.names, strict=True)
        categories = [{"id": key, "name": name} for key, name in pairs if key != UNUSED]
        document = {"images": self._images, "categories": categories, "annotations": annotations}
        write_text(self._out / "coco.json", json.dumps(document))
        write_results(self._out / "coco_bbox.json", self._results, kind="box")
        if self._masks:
            write_results(self._out / "coco_segm.json", self._results, kind="segm")


def open_outputs(formats: Sequence[str], out: Path, classes: ClassMap) -> list[Output]:
    """The outputs of some of the `sources.FORMATS`, into a folder."""
    kinds = (Drawn, Coco, Masks, Polygons, Yolo, Csv)
    return [kind(out, classes) for kind in kinds if kind.__name__.lower() in formats]


def require_masks(formats: Sequence[str], found: Detections) -> None:
    """Raise UserError where formats of masks are to hold the objects of a plain detector."""
    for name in {"masks", "polygons"} & {*formats}:
        if found.masks is None:
            raise UserError(f"--save {name}: this model finds boxes, but no masks; drawn, coco, yolo, csv hold boxes")


def _save(image: Image.Image, path: Path) -> None:
    with replacing(path) as temporary:
        image.save(temporary, format="PNG", compress_level=1)


def json_line(image: InputImage, found: Detections, classes: ClassMap, drawings: Sequence[Path]) -> str:
    """An image, its size, and COCO results with the names of their categories."""
    names = dict(zip(classes.category_ids, classes.names, strict=True))
    results = [one | {"category_name": names[one["category_id"]]} for one in found.to_coco(image.image_id)]
    drawn = {"drawing": str(drawings[0])} if drawings else {}
    return json.dumps(image.entry | drawn | {"detections": results})
