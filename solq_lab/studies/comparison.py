"""Two models on the same images, object by object. Paper: figures 3 and 5, unified against separate queries."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

from solq_lab.bars import progress_bar
from solq_lab.build import build_images
from solq_lab.codecs.base import MaskCodec
from solq_lab.codecs.reconstruct import paste_and_compare, reconstruct
from solq_lab.data.coco import CocoDataset
from solq_lab.data_folder import annotations_of
from solq_lab.files import hash_file
from solq_lab.inference.predictor import Predictor
from solq_lab.runs import Run, RunError
from solq_lab.structures import Detections
from solq_lab.studies.pairing import UNMATCHED, overlaps, pair_objects
from solq_lab.workbench.workspace import trained_run

logger = logging.getLogger(__name__)


class Comparison(NamedTuple):
    """One run, two or three, with their models and images."""

    runs: list[Run]  # the first one first
    predictors: dict[str, Predictor]  # their models by name, in the same order
    dataset: CocoDataset  # the images of all, as they lie in their files, with their true masks
    missing: str  # the experiment file of the second run where there is none, else empty

    def __str__(self) -> str:
        steps = {name: run.status()["step"] for name, run in zip(self.predictors, self.runs, strict=True)}
        lines = [
            f"{name}: {run.folder}, {steps[name]:,} steps" for name, run in zip(self.predictors, self.runs, strict=True)
        ]
        if len(set(steps.values())) > 1:
            longest = max(steps, key=lambda name: steps[name])
            lines.append(f"WARNING: {longest} was trained for more steps; what it does better may be due to that alone")
        if self.missing:
            lines.append(f"{self.missing} is missing, so one run is shown; name a second run's experiment.yaml")
        return "\n".join(lines)


class ComparedImage(NamedTuple):
    """One image, its K ground-truth objects, and the detections of one model or several."""

    # image_index, image_id: place in its data set, and id in the annotation file
    image_index: int
    image_id: int
    pixels: np.ndarray  # (H, W, 3) uint8
    ground_truth: Detections
    detections: dict[str, Detections]  # model -> its detections, best score first
    ious: dict[str, np.ndarray]  # model -> (K,) IoU of each object with its detection; 0 where it is not found

    def mean_iou(self, name: str) -> float:
        """Of one model, over all objects; 0 for an image without any."""
        return float(self.ious[name].mean()) if len(self.ious[name]) else 0.0

    @property
    def gain(self) -> float:
        """Mean IoU of the first model less that of the second; of a single model its mean IoU."""
        first, *others = (self.mean_iou(name) for name in self.ious)
        return first - sum(others[:1])


def open_comparison(
    experiment: str | Path,
    other: str | Path,
    *,
    third: str | Path = "",
    overrides: Sequence[str] = (),
    runs_dir: str | Path = "runs",
) -> Comparison:
    """Open the finished run of an experiment, and that of another where its file exists.

    Args:
        experiment, overrides, runs_dir: as for `trained_run`.
        other: the second run's experiment file.
        third: a third one's, left out with a warning where it has other images or classes; "": none.

    Raises:
        ConfigError, DataError, RunError: as `trained_run`, and where the two cannot be compared (`check_comparable`).
    """
    runs, there = [trained_run(experiment, overrides, runs_dir)], Path(other).is_file()
    if there:
        runs.append(trained_run(other, (), runs_dir))
    if len({run.folder.resolve() for run in runs}) < len(runs):
        raise RunError(f"{runs[0].folder}: a run cannot be compared with itself; name another run's experiment.yaml")
    check_comparable(runs)

    # The third is an addition: where it does not fit, the two are shown without it.
    if Path(third).is_file():
        last = trained_run(third, (), runs_dir)
        try:
            check_comparable([runs[0], last])
            runs += [last] if last.folder.resolve() not in {run.folder.resolve() for run in runs} else []
        except RunError as error:
            logger.warning("left out: %s", error)

    predictors = dict(zip(run_names(runs), map(Predictor, runs), strict=True))
    dataset = build_images(runs[0].experiment, next(iter(predictors.values())).classes)
    return Comparison(runs, predictors, dataset, "" if there else str(other))


def run_names(runs: Sequence[Run]) -> list[str]:
    """Distinct names of runs: their methods, or where these are the same their names, or folders."""
    methods: list[str] = [run.experiment.method for run in runs]
    names, folders = [run.name for run in runs], [str(run.folder) for run in runs]
    return next((called for called in (methods, names) if len(set(called)) == len(runs)), folders)


def check_comparable(runs: Sequence[Run]) -> None:
    """Check that runs have the same validation images and classes.

    Raises:
        RunError: they differ; the message names both runs, and what differs.
    """
    first = runs[0]
    for other in runs[1:]:
        here, there = first.experiment.data, other.experiment.data
        files = [annotations_of(run.experiment, "val") for run in (first, other)]
        differing = []
        if files[0] != files[1] and hash_file(files[0]) != hash_file(files[1]):
            differing.append(f"validation annotations ({files[0]} and {files[1]})")
        if (here.class_ids, here.num_classes) != (there.class_ids, there.num_classes):
            differing.append("the numbers of classes (data.class_ids, data.num_classes)")
        if differing:
            raise RunError(
                f"{first.folder} and {other.folder} cannot be compared object by object, they have different "
                f"{' and '.join(differing)}; name two runs of one data set"
            )


def compare_images(
    predictors: Mapping[str, Predictor], dataset: CocoDataset, *, score: float = 0.3, max_images: int | None = None
) -> list[ComparedImage]:
    """Every image with its objects and the detections of all models; where the first is furthest ahead comes first.

    An object is found by a detection of its class whose box overlaps by half (`pair_objects`); how well is then the IoU
    of the masks. Where a model has no masks, boxes count for all.

    Args:
        predictors: by name, the first one first.
        dataset: images with true masks (`build_images`).
        score: less certain detections are left out.
        max_images: only the first so many images. None: all.
    """
    without_masks = any(predictor.experiment.method == "Deformable DETR" for predictor in predictors.values())
    by: Literal["box", "mask"] = "box" if without_masks else "mask"
    compared = []
    for index in progress_bar(range(len(dataset))[:max_images], desc="comparing", unit="img"):
        pixels, ground_truth = dataset[index][0].permute(1, 2, 0).numpy(), dataset.objects(index)
        detections = {name: predictor.predict(pixels).above(score) for name, predictor in predictors.items()}
        ious = {}
        for name, of_model in detections.items():
            partners, _ = pair_objects(of_model, ground_truth)
            found = np.flatnonzero(partners != UNMATCHED)
            ious[name] = np.zeros(len(partners))
            ious[name][found] = overlaps(of_model, ground_truth, by=by)[partners[found], found]
        compared.append(ComparedImage(index, dataset.image_ids[index], pixels, ground_truth, detections, ious))
    return sorted(compared, key=lambda image: -image.gain)  # stable: equal ones by index


def compare_codecs(codecs: Mapping[str, MaskCodec], dataset: CocoDataset) -> list[ComparedImage]:
    """Every image with its objects, and as detections what codecs leave of their masks in the true boxes.

    Codecs are fitted where they have to be; the data set has true masks of their side N, and no transform.
    """
    compared = []
    for index in range(len(dataset)):
        pixels, target = dataset[index]
        truth = dataset.objects(index)
        assert target.masks is not None  # `objects` has raised otherwise
        assert truth.masks is not None
        detections, ious = {}, {}
        for name, codec in codecs.items():
            masks = reconstruct(codec, target.masks).masks
            rles, ious[name] = paste_and_compare(masks, truth.boxes, target.image_size, truth.masks)
            detections[name] = dataclasses.replace(truth, masks=rles)
        image_id = dataset.image_ids[index]
        compared.append(ComparedImage(index, image_id, pixels.permute(1, 2, 0).numpy(), truth, detections, ious))
    return compared


def comparison_frame(images: Sequence[ComparedImage]) -> pd.DataFrame:
    """One row per model: objects found, those that no other model finds, and how closely the shared ones are met.

    Returns:
        Columns "objects", "found", "found by it alone"; "IoU of shared, %", the mean over the objects that all find;
        and "best IoU of shared, %", the percentage of them on which the model's IoU is the largest.
    """
    names = list(images[0].ious) if images else []
    rows = {}
    ious = np.array([np.concatenate([image.ious[name] for image in images]) for name in names])  # (models, K)
    shared = ious[:, (ious > 0).all(axis=0)] if names else ious
    for row, name in enumerate(names):
        others = np.delete(ious, row, axis=0)
        best = (shared[row] > np.delete(shared, row, axis=0)).all(axis=0)
        alone = (ious[row] > 0) & ~(others > 0).any(axis=0)
        means = [100 * values.mean() if values.size else np.nan for values in (shared[row], best)]
        rows[name] = [ious.shape[1], (ious[row] > 0).sum(), alone.sum(), *means]
    columns = ["objects", "found", "found by it alone", "IoU of shared, %", "best IoU of shared, %"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)
