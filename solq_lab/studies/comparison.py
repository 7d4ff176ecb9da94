"""Two models on the same images, object by object. Paper: figures 3 and 5, unified against separate queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from solq_lab.build import build_images
from solq_lab.data.coco import CocoDataset
from solq_lab.files import hash_file
from solq_lab.inference.predictor import Predictor
from solq_lab.runs import Run, RunError
from solq_lab.structures import Detections
from solq_lab.studies.pairing import UNMATCHED, overlaps, pair_objects
from solq_lab.workbench.workspace import trained_run


class Comparison(NamedTuple):
    """One run or two, opened to look into.

    runs: the first one first.
    predictors: their models by name, in the same order.
    dataset: the images of all, as they lie in their files, with their true masks.
    missing: the experiment file of the second run where there is none, else empty.
    """

    runs: list[Run]
    predictors: dict[str, Predictor]
    dataset: CocoDataset
    missing: str

    def __str__(self) -> str:
        lines = [f"{name}: {run.folder}" for name, run in zip(self.predictors, self.runs, strict=True)]
        if self.missing:
            lines.append(f"{self.missing} is missing, so one run is shown; name a second run's experiment.yaml")
        return "\n".join(lines)


class ComparedImage(NamedTuple):
    """One image, its K true objects, and what one model or several make of them.

    index: of the image in its data set.
    pixels: (H, W, 3) uint8.
    truth: the true objects.
    found: model -> its detections, best score first.
    ious: model -> (K,) IoU of each true object with what the model drew for it; 0 where it is not found.
    """

    index: int
    pixels: np.ndarray
    truth: Detections
    found: dict[str, Detections]
    ious: dict[str, np.ndarray]

    def mean_iou(self, name: str) -> float:
        """Of one model, over all true objects; 0 for an image without any."""
        return float(self.ious[name].mean()) if len(self.ious[name]) else 0.0

    @property
    def gain(self) -> float:
        """Mean IoU of the first model less that of the second; of a single model its mean IoU."""
        first, *others = (self.mean_iou(name) for name in self.ious)
        return first - sum(others[:1])


def open_comparison(
    experiment: str | Path, other: str | Path, *, overrides: Sequence[str] = (), runs_dir: str | Path = "runs"
) -> Comparison:
    """Open the finished run of an experiment, and that of another where its file exists.

    Args:
        experiment, overrides, runs_dir: as for `trained_run`.
        other: the second run's experiment file.

    Raises:
        ConfigError, DataError, RunError: as `trained_run`, and where the two cannot be compared (`check_comparable`).
    """
    runs, there = [trained_run(experiment, overrides, runs_dir)], Path(other).is_file()
    if there:
        runs.append(trained_run(other, (), runs_dir))
    if len({run.folder.resolve() for run in runs}) < len(runs):
        raise RunError(f"{runs[0].folder}: a run cannot be compared with itself; name another run's experiment.yaml")
    check_comparable(runs)
    predictors = dict(zip(run_names(runs), map(Predictor, runs), strict=True))
    dataset = build_images(runs[0].experiment, next(iter(predictors.values())).classes)
    return Comparison(runs, predictors, dataset, "" if there else str(other))


def run_names(runs: Sequence[Run]) -> list[str]:
    """What runs are called in a comparison: by their methods, or where these are the same by name, or by folder."""
    methods, names = [run.experiment.method for run in runs], [run.name for run in runs]
    folders = [str(run.folder) for run in runs]
    return next((called for called in (methods, names) if len(set(called)) == len(runs)), folders)


def check_comparable(runs: Sequence[Run]) -> None:
    """Refuse runs whose validation images or classes differ.

    Raises:
        RunError: they do; the message names both runs, and what differs.
    """
    first = runs[0]
    for other in runs[1:]:
        here, there = first.experiment.data, other.experiment.data
        files = [Path(data.root) / data.val_annotations for data in (here, there)]
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
    """Every image with its objects and the detections of one model or two; where the first is furthest ahead first.

    A detection is about a true object when it has its class and its box overlaps by half (`pair_objects`); how well it
    is drawn is then the IoU of the masks. Where a model has no masks, boxes count for all.

    Args:
        predictors: by name, the first one first.
        dataset: images with true masks (`build_images`).
        score: less certain detections are left out.
        max_images: only the first so many images. None: all.
    """
    by = "box" if any(_draws_no_masks(predictor) for predictor in predictors.values()) else "mask"
    compared = []
    for index in tqdm(range(len(dataset))[:max_images], desc="comparing", unit="img"):
        pixels, truth = dataset[index][0].permute(1, 2, 0).numpy(), dataset.objects(index)
        found = {name: predictor.predict(pixels).above(score) for name, predictor in predictors.items()}
        ious = {name: _drawn(detections, truth, by=by) for name, detections in found.items()}
        compared.append(ComparedImage(index, pixels, truth, found, ious))
    return sorted(compared, key=lambda image: -image.gain)  # stable: equal ones by index


def describe_comparison(images: Sequence[ComparedImage]) -> str:
    """How many objects each model finds, and how closely it draws those that all find."""
    names = list(images[0].ious) if images else []
    ious = np.array([np.concatenate([image.ious[name] for image in images]) for name in names])  # (models, K)
    lines = [f"{ious.shape[-1]} objects in {len(images)} images"]
    if not names:
        return lines[0]
    shared = (ious > 0).all(axis=0)
    for name, values in zip(names, ious, strict=True):
        drawn = f"{100 * values[shared].mean():.1f} %" if shared.any() else "-"
        alone = int(((values > 0) & ((ious > 0).sum(axis=0) == 1)).sum())
        also = f", {alone} of them alone" if len(names) > 1 else ""
        found = f"{name:<16} finds {int((values > 0).sum())}{also}"
        lines.append(f"{found}; mean IoU of the {shared.sum()} that are shared: {drawn}")
    if len(names) > 1 and shared.any():
        ahead = 100 * (ious[0, shared] > ious[1, shared]).mean()
        lines.append(f"{names[0]} is closer than {names[1]} on {ahead:.0f} % of the shared ones")
    return "\n".join(lines)


def _draws_no_masks(predictor: Predictor) -> bool:
    return predictor.experiment.method == "Deformable DETR"


def _drawn(found: Detections, truth: Detections, *, by: Literal["box", "mask"]) -> np.ndarray:
    """(K,) IoU of each true object with the detection that is about it."""
    partners, _ = pair_objects(found, truth)
    overlap = overlaps(found, truth, by=by)
    return np.array([0.0 if row == UNMATCHED else overlap[row, column] for column, row in enumerate(partners.tolist())])
