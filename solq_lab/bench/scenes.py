"""Generated images, objects and detections with the counts and sizes of COCO, for machines without COCO."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

HEIGHT, WIDTH = 480, 640  # the commonest size in COCO
CATEGORIES = 80
OBJECTS = 11  # per image, somewhat above COCO's mean of 7
CORNERS = 40  # of an object's outline


def outline(random: np.random.Generator, box: tuple[float, float, float, float]) -> list[float]:
    """A bumpy closed polygon [x, y, ...] that fills most of a box (x, y, w, h)."""
    x, y, w, h = box
    angle = np.linspace(0, 2 * np.pi, CORNERS, endpoint=False)
    radius = 0.8 + 0.2 * np.sin(angle * random.integers(2, 6) + random.uniform(0, 6)) * random.uniform(0, 1)
    corners = np.stack([x + w / 2 * (1 + radius * np.cos(angle)), y + h / 2 * (1 + radius * np.sin(angle))], axis=1)
    return corners.ravel().round(2).tolist()


def random_box(random: np.random.Generator) -> tuple[float, float, float, float]:
    """A box (x, y, w, h) inside the image, its sides spread evenly over the orders of magnitude from 12 to 380."""
    w, h = np.exp(random.uniform(np.log(12), np.log(380), size=2)).tolist()
    return random.uniform(0, WIDTH - w), random.uniform(0, HEIGHT - h), w, h


def coco_document(seed: int, *, num_images: int, objects: int = OBJECTS) -> dict:
    """COCO annotations with polygons: `objects` on average, of up to four classes, in each image."""
    random = np.random.default_rng(seed)
    document: dict = {
        "images": [
            {"id": number, "file_name": f"{number:06d}.jpg", "height": HEIGHT, "width": WIDTH}
            for number in range(1, num_images + 1)
        ],
        "categories": [{"id": number, "name": f"class {number}"} for number in range(1, CATEGORIES + 1)],
        "annotations": [],
    }

    for image in document["images"]:
        present = random.integers(1, CATEGORIES + 1, size=4)
        for _ in range(random.integers(1, 2 * objects)):
            box = random_box(random)
            document["annotations"].append(
                {
                    "id": len(document["annotations"]) + 1,
                    "image_id": image["id"],
                    "category_id": int(random.choice(present)),
                    "bbox": [round(value, 2) for value in box],
                    "area": box[2] * box[3] * 0.6,
                    "iscrowd": 0,
                    "segmentation": [outline(random, box)],
                }
            )
    return document


def write_coco_folder(root: Path, seed: int, *, num_images: int) -> tuple[Path, Path]:
    """Writes smooth noise as JPEGs with annotations; returns the image folder and the annotation file."""
    random = np.random.default_rng(seed)
    images, annotations = root / "images", root / "instances.json"
    images.mkdir(parents=True)
    document = coco_document(seed, num_images=num_images)
    for image in document["images"]:
        coarse = Image.fromarray(random.integers(0, 256, size=(HEIGHT // 16, WIDTH // 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = smooth + random.integers(-12, 13, size=smooth.shape, dtype=np.int16)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(images / image["file_name"], quality=90)
    annotations.write_text(json.dumps(document))
    return images, annotations


def blob_masks(seed: int, *, count: int, size: int) -> Tensor:
    """(count, size, size) bool masks with smooth outlines."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 1, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic", align_corners=True).squeeze(1)
    center = torch.linspace(-1, 1, size).square()
    return smooth - 2 * (center[:, None] + center[None]) + 1 > 0


def boxes_xyxy(seed: int, *, count: int) -> Tensor:
    """(count, 4) boxes (x0, y0, x1, y1) in pixels of an image."""
    random = np.random.default_rng(seed)
    boxes = torch.tensor([random_box(random) for _ in range(count)], dtype=torch.float32)
    return torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)
