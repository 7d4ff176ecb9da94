"""Trained models for others: one safetensors file to share, or a small run folder to publish with a project.

Both carry weights, mask codec, classes and experiment, and nothing of the machine that trained them.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from solq_lab.build import build_codec, build_dataset
from solq_lab.codecs.base import FittedCodec
from solq_lab.config import ConfigError, Experiment
from solq_lab.files import hash_file, read_json, replacing, replacing_folder, write_json
from solq_lab.inference.compare import Difference, Tolerance, compare_detections
from solq_lab.inference.predictor import Predictor, find_weights, read_trained
from solq_lab.models.weights import WeightMismatch, read_weights, save_weights
from solq_lab.runs import SHIPPED, Run, RunError

MAX_COMPARED = 50  # images
MIN_SCORE = 0.3  # objects below this score are not compared
TOLERANCE = Tolerance(score=0.03, box=0.5, mask_iou=0.98)  # box: pixels
MAX_TRAIN_LINES = 600  # of metrics.jsonl: enough for a smooth curve
REPORTED = ("versions", "git", "operator", "device", "processes", "dataset", "codec")  # of environment.json


def share(weights_or_run: str | Path | Run, destination: Path) -> Predictor:
    """Write a file from which `Predictor(file)` can do everything, on a machine that has nothing else.

    A fitted codec's tables go into the file even where the original left them beside it.

    Returns:
        The predictor of the written file.

    Raises:
        ConfigError: the destination exists, or the tables of its mask codec are not found.
        RunError, WeightMismatch: as for `Predictor`.
    """
    if destination.exists():
        raise ConfigError(f"{destination}: exists already and is not written over; remove it or name another file")
    weights, experiment, classes = read_trained(find_weights(weights_or_run))
    codec = build_codec(experiment, tables=weights.codec)
    tables = codec.state_dict() if isinstance(codec, FittedCodec) else {}
    with replacing(destination) as unfinished:
        about = {"experiment": without_paths(experiment).to_yaml(), "classes": classes.to_json()}
        save_weights(unfinished, weights.state, codec=tables, **about)
        unfinished.chmod(0o644)  # temporary files are private, this one is to be shared
        return Predictor(unfinished, device="cpu")


def without_paths(experiment: Experiment) -> Experiment:
    """The same experiment, its paths cut to their last part and the data's folder left out."""
    data = experiment.data.model_copy(update={"root": ""})
    model = experiment.model.model_copy(update={"pretrained": Path(experiment.model.pretrained).name})
    codec = experiment.codec.model_copy(update={"artifact": Path(experiment.codec.artifact).name})
    train = experiment.train.model_copy(update={"finetune_from": Path(experiment.train.finetune_from).name})
    return experiment.model_copy(update={"data": data, "model": model, "codec": codec, "train": train})


def package_run(run: Run, destination: Path, experiment: Experiment) -> Difference:
    """Write a finished run as a small folder with half-precision weights, all or nothing.

    Half precision is only how weights are stored: `Predictor` computes in float32 with them.

    Args:
        run: the finished run.
        destination: folder to make; an earlier package is replaced.
        experiment: the run's own, with its name and its data changed. Its validation images have to exist.

    Returns:
        How far the packaged weights differ, on the first images; boxes in pixels.

    Raises:
        RunError: the run has no weights, the destination holds something else, the experiment describes another model,
            or half precision moves the detections further than `TOLERANCE`.
    """
    _check(run, destination, experiment)
    trained = read_weights(run.weights)
    if trained.classes is None:
        raise WeightMismatch(f"{run.weights}: the file holds no class map; package a run that this project trained")

    with replacing_folder(destination) as unfinished:
        # Both predictors follow the new experiment, whose evaluation may score or decode differently.
        weights, whole, yaml = unfinished / run.weights.name, unfinished / "whole.safetensors", experiment.to_yaml()
        for path, state in ((weights, halved(trained.state)), (whole, trained.state)):
            save_weights(path, state, experiment=yaml, classes=trained.classes, codec=trained.codec)
        exact, rounded = Predictor(whole), Predictor(weights)
        whole.unlink()
        dataset = build_dataset(experiment, "val", exact.classes)
        compared = [dataset[index][0].permute(1, 2, 0).numpy() for index in range(min(MAX_COMPARED, len(dataset)))]
        expected = [exact.predict(image).above(MIN_SCORE) for image in compared]
        loss = compare_detections(expected, [rounded.predict(image) for image in compared], None, TOLERANCE)
        if not loss.agrees(TOLERANCE) or loss.excused:
            raise RunError(
                f"{run.folder}: half precision changes too much ({loss}); allowed are score {TOLERANCE.score}, box "
                f"{TOLERANCE.box} pixels, mean mask IoU {TOLERANCE.mask_iou}"
            )

        (unfinished / "experiment.yaml").write_text(yaml, encoding="utf-8")

        # Every n-th line about training steps, and all others.
        lines = run.metrics()
        training = [number for number, line in enumerate(lines) if line.get("kind") == "train"]
        left_out = set(training) - set(training[:: -(-len(training) // MAX_TRAIN_LINES) or 1])
        kept = (json.dumps(line) + "\n" for number, line in enumerate(lines) if number not in left_out)
        (unfinished / "metrics.jsonl").write_text("".join(kept), encoding="utf-8")
        _copy_facts(run, unfinished)
        origin = {"weights": hash_file(weights), "trained": hash_file(run.weights)}
        found = {"images": loss.images, "objects": loss.detections, "score": loss.score, "box": loss.box}
        found["mask"] = 0.0 if loss.mask_iou is None else 1 - loss.mask_iou
        comparison = {"half_precision": found, "tolerance": TOLERANCE._asdict()}
        write_json(unfinished / SHIPPED, origin | comparison)
    return loss


def halved(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with its float tensors in half precision; tensors of several names stay shared.

    One that holds a number beyond half precision's largest, 65504, stays as it is.
    """
    known: dict[int, Tensor] = {}
    for tensor in state.values():
        half = tensor.half() if tensor.is_floating_point() else tensor
        known[id(tensor)] = half if half.isfinite().all() else tensor
    return {name: known[id(tensor)] for name, tensor in state.items()}


def _check(run: Run, destination: Path, experiment: Experiment) -> None:
    if not run.weights.is_file():
        raise RunError(f"{run.folder}: no {run.weights.name} ({run.status()['state']}); finish the training first")
    if destination.exists() and not (destination / SHIPPED).is_file():
        raise RunError(f"{destination}: exists and was not written by `solq-lab ship`; name another folder")
    for section in ("model", "codec"):
        if getattr(experiment, section) != getattr(run.experiment, section):
            raise RunError(f"{run.folder}: a packaged run keeps its {section}; change only its name and its data")


def _copy_facts(run: Run, folder: Path) -> None:
    """Copy environment without paths and names of the machine, status, results and ceiling."""
    if run.environment.is_file():
        facts = read_json(run.environment)
        reported = {key: facts[key] for key in REPORTED if key in facts}
        if "dataset" in reported:
            reported["dataset"] = {key: value for key, value in reported["dataset"].items() if key != "annotations"}
        write_json(folder / run.environment.name, reported)
    write_json(folder / "status.json", {"state": "finished", "step": run.status()["step"], "message": ""})
    for path in (run.results, run.folder / "ceiling.json"):
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
