"""Trained models that travel with the project: run folders with half-precision weights and without a machine's traces.

Half precision is only how weights are stored: `Predictor` computes in float32 with them.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from solq_lab.build import build_dataset
from solq_lab.config import Experiment
from solq_lab.data.coco import CocoDataset
from solq_lab.files import hash_file, read_json, write_json
from solq_lab.inference.predictor import Predictor
from solq_lab.masks import rle_iou
from solq_lab.models.weights import WeightMismatch, read_weights, save_weights
from solq_lab.runs import SHIPPED, Run, RunError
from solq_lab.structures import Detections

SURE = 0.3  # objects below this score are not compared
TOLERANCE = {"score": 0.03, "box": 0.5, "mask": 0.02}  # of a `Rounding`
MAX_TRAIN_LINES = 600  # of metrics.jsonl: enough for a smooth curve
TELLING = ("versions", "git", "operator", "device", "processes", "dataset", "codec")  # of environment.json


class Rounding(NamedTuple):
    """How far half precision moves what a model finds.

    images, objects: how many were compared; objects of a score of at least 0.3.
    score: largest difference of a score.
    box: largest difference of a box's edge, pixels.
    mask: mean of 1 - IoU of the masks; 0 for a plain detector.
    """

    images: int
    objects: int
    score: float
    box: float
    mask: float

    def __str__(self) -> str:
        return (
            f"{self.objects} objects in {self.images} images: scores within {self.score:.4f}, box edges within "
            f"{self.box:.3f} pixels, masks differ by {100 * self.mask:.2f} % on average"
        )


def ship_run(run: Run, destination: Path, experiment: Experiment, *, images: int = 50) -> Rounding:
    """Write what is worth shipping of a finished run into a folder, which appears whole or not at all.

    Args:
        run: the finished run.
        destination: folder to make; one that was shipped before is replaced.
        experiment: what the shipped run is to say of itself: the run's own, with its name and its data changed. Its
            validation images have to be there.
        images: so many of them are compared at most.

    Returns:
        How far the shipped weights differ, on these images.

    Raises:
        RunError: the run has no weights, the destination holds something else, the experiment describes another model,
            or half precision moves the detections further than `TOLERANCE`.
    """
    _check(run, destination, experiment)
    destination.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    try:
        trained = read_weights(run.weights)
        weights = unfinished / run.weights.name
        save_weights(
            weights,
            halved(trained.state),
            experiment=experiment.to_yaml(),
            classes=trained.classes,
            codec=trained.codec,
        )
        whole, rounded = Predictor(run.weights), Predictor(weights)
        rounding = compare_predictors(whole, rounded, build_dataset(experiment, "val", whole.classes), images)
        _refuse_if_far(run, rounding)
        (unfinished / "experiment.yaml").write_text(experiment.to_yaml(), encoding="utf-8")
        (unfinished / "metrics.jsonl").write_text(_thinned(run.metrics()), encoding="utf-8")
        _copy_facts(run, unfinished)
        origin = {"weights": hash_file(weights), "trained": hash_file(run.weights)}
        write_json(unfinished / SHIPPED, origin | {"half_precision": rounding._asdict(), "tolerance": TOLERANCE})
        unfinished.chmod(0o755)  # temporary folders are private
        shutil.rmtree(destination, ignore_errors=True)
        os.replace(unfinished, destination)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return rounding


def halved(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with its float tensors in half precision; tensors of several names stay shared.

    One that holds a number beyond half precision's largest, 65504, stays as it is.
    """
    known: dict[int, Tensor] = {}
    for tensor in state.values():
        half = tensor.half() if tensor.is_floating_point() else tensor
        known[id(tensor)] = half if half.isfinite().all() else tensor
    return {name: known[id(tensor)] for name, tensor in state.items()}


def compare_predictors(first: Predictor, second: Predictor, dataset: CocoDataset, images: int) -> Rounding:
    """How far two versions of one model differ on the first images of a data set; an object only one has counts 1."""
    score = box = mask = 0.0
    objects = 0
    shown = range(len(dataset))[:images]
    for index in shown:
        image = dataset[index][0].permute(1, 2, 0).numpy()
        sure, found = first.predict(image).above(SURE), second.predict(image)
        place = {pair: row for row, pair in enumerate(_pairs(found))}
        for row, pair in enumerate(_pairs(sure)):
            objects += 1
            if pair not in place:
                score = 1.0
                continue
            partner = place[pair]
            score = max(score, abs(float(sure.scores[row] - found.scores[partner])))
            box = max(box, float((sure.boxes[row] - found.boxes[partner]).abs().max()))
            if sure.masks is not None:
                mask += 1 - float(rle_iou([sure.masks[row]], [found.masks[partner]])[0])
    return Rounding(len(shown), objects, score, box, mask / max(objects, 1))


def _pairs(detections: Detections) -> list[tuple[int, int]]:
    """(query, class channel) of every object: what two versions of one model have in common."""
    return list(zip(detections.queries.tolist(), detections.labels.tolist(), strict=True))


def _check(run: Run, destination: Path, experiment: Experiment) -> None:
    if not run.weights.is_file():
        raise RunError(f"{run.folder}: no {run.weights.name} ({run.status()['state']}); finish the training first")
    if destination.exists() and not (destination / SHIPPED).is_file():
        raise RunError(f"{destination}: exists and was not written by `solq-lab ship`; name another folder")
    for section in ("model", "codec"):
        if getattr(experiment, section) != getattr(run.experiment, section):
            raise RunError(f"{run.folder}: a shipped run keeps its {section}; change only its name and its data")
    if read_weights(run.weights).classes is None:
        raise WeightMismatch(f"{run.weights}: the file holds no class map; ship a run that this project trained")


def _refuse_if_far(run: Run, rounding: Rounding) -> None:
    for name, allowed in TOLERANCE.items():
        if getattr(rounding, name) > allowed:
            raise RunError(f"{run.folder}: half precision changes too much ({rounding}); allowed is {name} {allowed}")


def _thinned(lines: Sequence[dict[str, Any]]) -> str:
    """metrics.jsonl with every n-th line about training steps and all others."""
    training = [number for number, line in enumerate(lines) if line.get("kind") == "train"]
    kept = set(training[:: -(-len(training) // MAX_TRAIN_LINES) or 1])
    left_out = set(training) - kept
    return "".join(json.dumps(line) + "\n" for number, line in enumerate(lines) if number not in left_out)


def _copy_facts(run: Run, folder: Path) -> None:
    """Environment without paths and names of the machine, status, results and ceiling."""
    if run.environment.is_file():
        facts = read_json(run.environment)
        telling = {key: facts[key] for key in TELLING if key in facts}
        if "dataset" in telling:
            telling["dataset"] = {key: value for key, value in telling["dataset"].items() if key != "annotations"}
        write_json(folder / run.environment.name, telling)
    write_json(folder / "status.json", {"state": "finished", "step": run.status()["step"], "message": ""})
    for path in (run.results, run.folder / "ceiling.json"):
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
