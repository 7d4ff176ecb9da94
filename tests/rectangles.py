"""COCO ground truth and results made of rectangles, for tests that know every pixel."""

import numpy as np
from pycocotools import mask as coco_rle

HEIGHT, WIDTH = 48, 64


def rle_of(bitmap: np.ndarray) -> dict:
    rle = coco_rle.encode(np.asfortranarray(bitmap.astype(np.uint8)))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def rectangle(x: int, y: int, w: int, h: int) -> np.ndarray:
    bitmap = np.zeros((HEIGHT, WIDTH), dtype=bool)
    bitmap[y : y + h, x : x + w] = True
    return bitmap


def truth_of(objects: list[tuple[int, int, tuple[int, int, int, int]]], images: int = 2) -> dict:
    """Ground truth of rectangles (image_id, category_id, (x, y, w, h)), in images 1, 2, ... and classes 1 and 2."""
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH} for i in range(1, images + 1)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {
                "id": number,
                "image_id": image_id,
                "category_id": category_id,
                "bbox": list(box),
                "area": box[2] * box[3],
                "iscrowd": 0,
                "segmentation": rle_of(rectangle(*box)),
            }
            for number, (image_id, category_id, box) in enumerate(objects)
        ],
    }


def result_of(image_id: int, category_id: int, box: tuple[int, int, int, int], score: float = 0.9) -> dict:
    result = {"image_id": image_id, "category_id": category_id, "bbox": list(box), "score": score}
    return result | {"segmentation": rle_of(rectangle(*box))}


def masked(result: dict, bitmap: np.ndarray) -> dict:
    """The result with another mask, in the same box."""
    return result | {"segmentation": rle_of(bitmap)}


def many_objects() -> tuple[dict, list[dict]]:
    """150 objects of one class in an image, and results that find most of them, some not quite in place."""
    boxes = [(1 + 4 * (k % 15), 1 + 4 * (k // 15), 3, 3) for k in range(150)]
    results = [
        result_of(1, 1, (x + (k % 7 == 0), y, w, h), score=0.99 - 0.005 * k)
        for k, (x, y, w, h) in enumerate(boxes)
        if k % 5
    ]
    return truth_of([(1, 1, box) for box in boxes]), results
