"""COCO evaluation of 1,000 images with 100 detections each: faster-coco-eval against pycocotools."""

import contextlib
import copy
import io
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
from pycocotools import mask as coco_rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from solq_lab.bench.scenes import HEIGHT, WIDTH, coco_document, outline, random_box
from solq_lab.bench.timing import Row, compare
from solq_lab.evaluation.coco import evaluate_results
from solq_lab.evaluation.summary import AP_COLUMNS, AR_COLUMNS

NUM_IMAGES, DETECTIONS = 1000, 100
DIGITS = 6  # to which the twelve numbers must agree


def rows(num_images: int = NUM_IMAGES) -> Iterator[Row]:
    """Boxes, then masks, from results in memory to the twelve numbers."""
    document = coco_document(0, num_images=num_images, objects=7)
    results = draw_results(document)
    for kind, iou_type in (("box", "bbox"), ("segm", "segm")):
        kept = keep_shape(results, kind)
        yield compare(
            "eval",
            f"{iou_type}, {num_images} images x {DETECTIONS} detections",
            partial(evaluate_plainly, document, kept, iou_type),
            partial(_evaluate, document, kept, kind),
            partial(same_numbers, kind=kind),
        )


def evaluate_plainly(document: dict, results: list[dict], iou_type: str) -> np.ndarray:
    """The plain way: pycocotools' twelve numbers. It writes into what it is given, so it gets copies."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(document)
        truth.createIndex()
        evaluator = COCOeval(truth, truth.loadRes(copy.deepcopy(results)), iou_type)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator.stats


def _evaluate(document: dict, results: list[dict], kind: str) -> dict[str, float]:
    return evaluate_results(document, results, kinds=[kind]).metrics


def keep_shape(results: list[dict], kind: str) -> list[dict]:
    """The results with their box or their mask alone."""
    shape = {"box": "bbox", "segm": "segmentation"}[kind]
    return [{key: result[key] for key in ("image_id", "category_id", "score", shape)} for result in results]


def same_numbers(expected: np.ndarray, found: dict[str, float], kind: str) -> bool:
    """Whether pycocotools' twelve numbers and ours are the same."""
    ours = np.nan_to_num([found[f"{kind}.{number}"] for number in AP_COLUMNS + AR_COLUMNS], nan=-1)
    return bool(np.abs(expected - ours).max() < 10**-DIGITS)


def draw_results(document: dict) -> list[dict]:
    """Detections of all images."""
    image_ids = [image["id"] for image in document["images"]]
    return [result for of_one_image in draw_images(document, image_ids) for result in of_one_image]


def draw_images(document: dict, image_ids: Sequence[int]) -> Iterator[list[dict]]:
    """Detections of each image, near its objects and anywhere else, of the classes that are present."""
    by_image = defaultdict(list)
    for entry in document["annotations"]:
        by_image[entry["image_id"]].append(entry)
    for image_id in image_ids:
        random = np.random.default_rng((1, image_id))
        yield [_draw_result(random, by_image[image_id], number) for number in range(DETECTIONS)]


def _draw_result(random: np.random.Generator, objects: list[dict], number: int) -> dict:
    entry = objects[number % len(objects)]
    box = random_box(random)
    if number < 3 * len(objects):
        x, y, w, h = entry["bbox"]
        shift, stretch = random.normal(0, 0.05, 2), random.normal(1, 0.08, 2)
        box = (x + w * shift[0], y + h * shift[1], w * stretch[0], h * stretch[1])
    rle = coco_rle.merge(coco_rle.frPyObjects([outline(random, box)], HEIGHT, WIDTH))
    return {
        "image_id": entry["image_id"],
        "category_id": entry["category_id"],
        "bbox": list(map(float, box)),
        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
        "score": float(random.random()),
    }
