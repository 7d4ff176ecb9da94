"""Evaluation of a model: predict a data set, on one process or several, and score the detections."""

import logging
import time
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from solq_lab import distributed
from solq_lab.bars import progress_bar
from solq_lab.build import build_dataset
from solq_lab.codecs.base import MaskCodec
from solq_lab.config import Experiment
from solq_lab.data.coco import CocoDataset
from solq_lab.data.folders import Split
from solq_lab.data.loader import BatchLoader
from solq_lab.data.orientation import check_orientation
from solq_lab.data_folder import annotations_of
from solq_lab.evaluation.coco import DEFAULTS, KINDS, evaluate_results
from solq_lab.evaluation.gathering import share_from_main, stream_to_main
from solq_lab.evaluation.results import detections_to_results, write_results
from solq_lab.evaluation.summary import MAX_DETECTIONS, Evaluation
from solq_lab.files import hash_file, read_json, write_json
from solq_lab.inference.postprocess import decoding_of, postprocess
from solq_lab.inference.predictor import Predictor
from solq_lab.models.sqr import SQRDetector
from solq_lab.runs import Run, RunError
from solq_lab.schema import EvaluationSection
from solq_lab.structures import Detections

logger = logging.getLogger(__name__)


def predict_dataset(
    model: nn.Module,
    codec: MaskCodec | None,
    dataset: CocoDataset,
    settings: EvaluationSection = DEFAULTS,
    *,
    device: torch.device | str = "cpu",
    workers: int = 0,
) -> Generator[tuple[int, Detections]]:
    """Image id and detections of every image, one after the other; only one batch is in memory.

    In a process group, each process predicts its share of the batches. The batches do not depend on the number of
    processes, because padding an image to its batch's size changes its numbers slightly.

    Args:
        model: the network, on `device`; it predicts in evaluation mode and is left in the mode it came in.
        codec: its codec, on `device`, or None where it has no mask vectors.
        dataset: the images, with and without objects.
        settings: its `batch_size`, `top_k`, `rescore`, `vector_dim` and `max_images`.
        device: where the network is.
        workers: processes that read images; 0 reads them here.
    """
    indices = list(range(len(dataset))[: settings.max_images])
    size = settings.batch_size
    batches = [indices[start : start + size] for start in range(0, len(indices), size)]
    share = batches[distributed.rank() :: distributed.world_size()]
    was_training = model.training

    model.eval()
    try:
        bar: dict[str, Any] = {"total": sum(map(len, share)), "desc": "evaluating", "unit": "img"}
        with progress_bar(**bar, disable=not distributed.is_main()) as progress:
            for images, targets in BatchLoader(dataset, share, workers):
                sizes = [target.original_size for target in targets]
                with torch.inference_mode():  # not around the yield: the caller's code would run in it too
                    prediction = model(images.to(device).normalised()).layers[-1]
                    names, top_k = dataset.classes.names, settings.top_k
                    detected = postprocess(
                        prediction, sizes, codec, top_k=top_k, class_names=names, **decoding_of(settings)
                    )
                for target, detections in zip(targets, detected, strict=True):
                    yield target.image_id, detections
                progress.update(len(targets))
    finally:
        model.train(was_training)


def evaluate_model(
    model: nn.Module,
    codec: MaskCodec | None,
    dataset: CocoDataset,
    settings: EvaluationSection = DEFAULTS,
    *,
    device: torch.device | str = "cpu",
    workers: int = 0,
    should_stop: Callable[[], bool] | None = None,
) -> tuple[list[dict], Evaluation]:
    """Predicts a data set and scores it; a plain detector, without mask vectors or mask branch, has box numbers only.

    Every process of a group has to call it: each predicts its share and streams it to the main one, which scores. An
    error in one of them is raised in all.

    Args:
        model, codec, dataset, device, workers: as in `predict_dataset`.
        settings: images per pass, detections per image, how many images, and what counts as small and as boundary.
        should_stop: called between images; True in any process stops all of them. None: never.

    Returns:
        COCO results of all images by rising image id (empty on other processes than the main one), and the numbers
        (on every process).

    Raises:
        EvaluationStopped: `should_stop` returned True in a process.
        ProcessFailed: another process failed.
    """
    predicted = predict_dataset(model, codec, dataset, settings, device=device, workers=workers)
    with closing(predicted):
        # A split may list fewer categories than the training; its scores are of those that it lists.
        listed = {category["id"] for category in dataset.truth.categories}
        share = (
            [
                result
                for result in detections_to_results(detections, image_id, dataset.classes)
                if result["category_id"] in listed
            ]
            for image_id, detections in predicted
        )
        results = [result for of_one_image in stream_to_main(share, should_stop) for result in of_one_image]
    results.sort(key=lambda result: result["image_id"])  # stable: best score stays first

    def score() -> Evaluation:
        return evaluate_results(
            dataset.annotations,
            results,
            settings,
            kinds=KINDS if codec is not None or isinstance(model, SQRDetector) else ("box",),
            should_stop=should_stop,
        )

    return results, share_from_main(score)


def evaluate_run(
    run: Run,
    *,
    split: Literal["val", "train"] | Split = "val",
    device: torch.device | str | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Evaluation:
    """Evaluates a run's trained weights on its validation split, with the settings of its experiment.

    Writes `detections.json.gz` and `results.json` (the numbers, the settings, and fingerprints of weights and
    annotations) into the run folder. Existing results of the same weights, annotations and settings are returned, and
    nothing is computed.

    Args:
        run: a run whose training is finished.
        split: "train" evaluates on the training images instead, into files of their own (`results_train.json`), and a
            `Split` on other images (`results_NAME.json`, after the annotation file), read by its orientation, or
            what its file says, or the run's.
        device: where to predict. None: this process's GPU, or the CPU.
        should_stop: as in `evaluate_model`; a stopped evaluation writes nothing.

    Raises:
        RunError: the run has no trained weights.
        DataError: the split cannot be used.
        EvaluationStopped: `should_stop` returned True in a process.
        ProcessFailed: another process failed.
    """
    if not run.weights.exists():
        raise RunError(f"{run.folder}: no {run.weights.name} yet ({run.status()['state']}); finish the training first")
    experiment = run.experiment.evaluated_on(split)
    results_file, detections_file = file_of_split(run.results, split), file_of_split(run.detections, split)
    scale = [experiment.data.test_scale, experiment.data.max_size]
    inputs = inputs_of_scoring(experiment) | {"scale": scale, "weights": hash_file(run.weights)}
    if isinstance(split, Split):
        inputs["orientation"] = split.orientation

    def look_up() -> Evaluation | None:  # by one process: a shared disk may show different files to others
        return stored_evaluation(results_file, inputs) if detections_file.exists() else None

    finished = share_from_main(look_up)
    if finished is not None:
        logger.info("%s: results of these weights exist already", results_file)
        return finished

    device = distributed.device() if device is None else torch.device(device)
    predictor = Predictor(run.weights, device=device)
    dataset = build_dataset(experiment, "val", classes=predictor.classes)
    if isinstance(split, Split):
        dataset.orientation = split.orientation or dataset.truth.orientation or dataset.orientation
        if split.orientation is None and experiment.data.orientation is None:
            check_orientation([dataset])
    started = time.perf_counter()
    results, evaluation = evaluate_model(
        predictor.model,
        predictor.codec,
        dataset,
        experiment.evaluation,
        device=device,
        workers=experiment.data.workers,
        should_stop=should_stop,
    )

    def write() -> None:
        write_results(detections_file, results)
        write_json(results_file, evaluation.to_dict() | inputs | {"seconds": time.perf_counter() - started})

    share_from_main(write)
    return evaluation


def inputs_of_scoring(experiment: Experiment) -> dict:
    """What scores depend on besides the detections, as JSON types."""
    annotations = annotations_of(experiment, "val")
    settings, neutral = experiment.evaluation.model_dump(mode="json"), {"rescore": "none", "vector_dim": None}
    inputs = {  # results of 0.1.0 have no such keys
        "settings": {key: value for key, value in settings.items() if neutral.get(key, ...) != value},
        "annotations": hash_file(annotations) if annotations.is_file() else None,
    }
    # 0.1.0 scored 100 detections per class and image whatever top_k was: its numbers are not those of a larger one.
    return inputs if experiment.evaluation.top_k <= MAX_DETECTIONS else inputs | {"scored": "top_k"}


def file_of_split(path: Path, split: str | Split) -> Path:
    """The file itself for the validation split; beside it, with the split in its name, for another."""
    stem, dot, suffixes = path.name.partition(".")
    name = f"of_{split.annotations.stem}" if isinstance(split, Split) else split
    return path if split == "val" else path.with_name(f"{stem}_{name}{dot}{suffixes}")


def stored_evaluation(results_file: Path, inputs: dict) -> Evaluation | None:
    """The evaluation in a file, where it was computed from these inputs."""
    if not results_file.exists():
        return None
    stored = read_json(results_file)
    return Evaluation.from_dict(stored) if all(stored.get(key) == value for key, value in inputs.items()) else None
