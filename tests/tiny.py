"""A data set of a few drawn images and an experiment small enough to train in a second, for tests of whole runs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from solq_lab.build import build_model
from solq_lab.config import Experiment, validate_experiment
from solq_lab.data.classes import ClassMap
from solq_lab.models.weights import save_weights

SIDE = 48  # of the images, pixels
CLASSES = ClassMap(("triangle", "diamond"), (1, 2))


def write_tiny_dataset(root: Path, *, train: int = 12, val: int = 4) -> Path:
    """A COCO-format folder of bright triangles and diamonds; every fourth image has no object."""
    for split, count in (("train", train), ("val", val)):
        (root / split).mkdir(parents=True)
        images, annotations = [], []
        for number in range(count):
            random = np.random.default_rng((len(split), number))
            image = Image.fromarray(random.integers(0, 60, (SIDE, SIDE, 3), dtype=np.uint8))
            for _ in range(0 if number % 4 == 3 else 1 + number % 2):
                category = int(random.integers(1, 3))
                x, y = random.uniform(2, SIDE / 2, 2).round(1).tolist()
                w, h = random.uniform(12, SIDE / 2 - 2, 2).round(1).tolist()
                outline = [x, y + h, x + w / 2, y, x + w, y + h]
                if category == 2:
                    outline = [x + w / 2, y, x + w, y + h / 2, x + w / 2, y + h, x, y + h / 2]
                ImageDraw.Draw(image).polygon(outline, fill=(200, 80, 40) if category == 1 else (40, 90, 220))
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number + 1,
                        "category_id": category,
                        "bbox": [x, y, w, h],
                        "area": w * h / 2,
                        "iscrowd": 0,
                        "segmentation": [outline],
                    }
                )
            image.save(root / split / f"{number + 1}.png")
            images.append({"id": number + 1, "file_name": f"{number + 1}.png", "width": SIDE, "height": SIDE})
        categories = [{"id": 1, "name": "triangle"}, {"id": 2, "name": "diamond"}]
        document = {"images": images, "categories": categories, "annotations": annotations}
        (root / f"{split}.json").write_text(json.dumps(document))
    return root


def tiny_experiment(root: Path, **sections: dict[str, Any]) -> Experiment:
    """The small backbone, one encoder and two decoder layers of width 32; `sections` change single values."""
    values: dict[str, Any] = {
        "name": "tiny",
        "model": {
            "backbone": "small",
            "pretrained": "none",
            "levels": 3,
            "width": 32,
            "heads": 2,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "feedforward": 32,
            "vector_hidden": 32,
            "queries": 8,
            "standardise_vectors": True,
        },
        "codec": {"mask_size": 16, "vector_dim": 20},
        "data": {
            "root": str(root),
            "train_images": "train",
            "train_annotations": "train.json",
            "val_images": "val",
            "val_annotations": "val.json",
            "augment": "flip",
            "test_scale": SIDE,
            "max_size": SIDE,
            "workers": 0,
        },
        "optim": {"lr": 1e-3, "backbone_lr": 1e-3, "schedule": "cosine", "warmup": 0.1},
        "train": {"steps": 8, "batch_size": 4, "save_every": 3, "evaluate_every": 0, "log_every": 1, "threads": 1},
        "evaluation": {"batch_size": 2, "area_sides": [16, 32]},
    }
    for section, changes in sections.items():
        values[section] = values.get(section, {}) | changes if isinstance(changes, dict) else changes
    return validate_experiment(values, source="tests/tiny.py")


def write_model(
    path: Path, experiment: Experiment, model: torch.nn.Module | None = None, *, classes: ClassMap = CLASSES
) -> Path:
    """The weights file of a model; None: an untrained one."""
    if model is None:
        torch.manual_seed(0)
        model = build_model(experiment, len(classes))
    save_weights(path, model.state_dict(), experiment=experiment.to_yaml(), classes=classes.to_json())
    return path
