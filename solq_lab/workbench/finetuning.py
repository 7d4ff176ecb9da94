"""A recipe for fine-tuning on one's own images: looks at the data and the device, chooses, and says why.

The result is an experiment like any other, written as YAML with the reasons in it.
"""

import logging
import math
import os
import re
import shlex
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
import yaml

from solq_lab.allocation import keep_freed_memory
from solq_lab.bench.network import stepper
from solq_lab.build import build_augmentation, build_dataset, build_model
from solq_lab.config import ConfigError, Experiment, validate_experiment
from solq_lab.data.annotations import read_annotations
from solq_lab.data.coco import CocoDataset
from solq_lab.data.loader import BatchLoader
from solq_lab.data_folder import split_of
from solq_lab.files import write_text
from solq_lab.inference.predictor import find_weights, read_trained
from solq_lab.models.official import WeightMismatch
from solq_lab.models.onednn import use_onednn
from solq_lab.models.released import RELEASED
from solq_lab.progress import describe_duration
from solq_lab.runs import RunError
from solq_lab.workbench.check.rules import queries_for
from solq_lab.workbench.download.weights import download_weights
from solq_lab.workbench.released import import_released

logger = logging.getLogger(__name__)

SHAPES = Path(__file__).resolve().parents[2] / "experiments" / "shipped" / "uqr"  # a CPU can train this network
MIN_STEPS, MIN_OBJECTS = 500, 10  # below these a warning
EVALUATION_SHARE = 0.2  # of the time, at most
ENOUGH_SECONDS = 20.0  # of measured steps
GB = 2**30


class Device(NamedTuple):
    """Where the training will run; `memory` is the GPU's or the free memory of the host, bytes."""

    name: str
    cuda: bool
    bf16: bool
    cores: int
    memory: int


class Plan(NamedTuple):
    """An experiment, the reason of each choice by its key, and what may go wrong."""

    experiment: Experiment
    reasons: dict[str, str]
    warnings: list[str]

    def __str__(self) -> str:
        """The experiment as YAML: all that is no default, the choices with their reasons as comments."""
        every, given = self.experiment.model_dump(mode="json"), self.experiment.model_dump(exclude_defaults=True)
        del every["seed"]
        lines = [_yaml_line("name", every.pop("name"))]
        for section, values in every.items():
            keys = [key for key in values if f"{section}.{key}" in self.reasons or key in given.get(section, ())]
            rows = [_yaml_line(key, values[key]) for key in keys]
            width = max(map(len, rows), default=0)
            lines += [f"{section}:"] * bool(rows)
            for key, row in zip(keys, rows, strict=True):
                reason = self.reasons.get(f"{section}.{key}", "")
                lines.append(f"  {row:{width}}  # {reason}" if reason else f"  {row}")
        return "\n".join([*lines, *(f"# warning: {text}" for text in self.warnings)])

    def write(self, path: Path, command: str) -> None:
        """Write the experiment, below the command."""
        write_text(path, f"# {command}\n{self}\n")


def _yaml_line(key: str, value: Any) -> str:
    return yaml.safe_dump({key: value}, allow_unicode=True, default_flow_style=True, width=math.inf).strip()[1:-1]


def plan_finetuning(
    found: Experiment, overrides: Sequence[str], *, start: str, minutes: float | None, name: str, runs_dir: Path
) -> Plan:
    """Choose everything for a training on the images of a data folder.

    Args:
        found: the folder as `open_folder` finds it, with the user's choices.
        overrides: these choices, `section.key=value`; the others follow from them.
        start: weights of ours, a run, a released or Hugging Face's checkpoint, or a name in `RELEASED`; "": the small
            model of drawn shapes on a CPU, ImageNet weights on a GPU.
        minutes: how long it may take, by the speed that is measured here; None: as long as the data asks for.
        name: of the run.
        runs_dir: released checkpoints are converted into its folder `imported`.

    Raises:
        DataError, ConfigError, WeightMismatch, RunError: the data or the weights cannot be used.
    """
    planner = _Planner(name, found, overrides)
    planner.choose_start(start, runs_dir)
    planner.read_data()
    planner.choose_sizes()
    planner.choose_batch()
    planner.choose_length(minutes)
    planner.warn()
    return Plan(planner.experiment(), planner.reasons, planner.warnings)


def planned_experiment(
    found: Experiment, overrides: Sequence[str], *, start: str, minutes: float | None, name: str = "", runs_dir: Path
) -> Path:
    """The experiment file `runs_dir`/NAME.yaml: planned and written, or as the same command wrote it, perhaps edited.

    Args:
        found, overrides, start, minutes, name, runs_dir: as in `plan_finetuning`.

    Raises:
        ConfigError: the file exists and is another command's; and as `plan_finetuning`.
    """
    data = found.data.root
    name = name or re.sub(r"[^A-Za-z0-9._-]", "-", f"{Path(os.path.abspath(data)).name}-finetuned").lstrip("._-")
    options = {"--from": start, "--minutes": "" if not minutes else f"{minutes:g}", "--name": name}
    words = [data, *overrides, *(word for pair in options.items() if pair[1] for word in pair)]
    path, command = runs_dir / f"{name}.yaml", f"solq-lab finetune {shlex.join(words)}"
    if not path.exists():
        plan = plan_finetuning(found, overrides, start=start, minutes=minutes, name=name, runs_dir=runs_dir)
        plan.write(path, command)
        return path

    first = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
    if first != command:
        raise ConfigError(f"{path}: exists, and was written by `{first}`; remove it, or give --name")
    logger.info("%s: planned earlier, used as it stands; remove it to plan anew", path)
    return path


def described_choices(path: Path) -> str:
    """What a planned experiment, perhaps edited, will train: its file, below the command."""
    return path.read_text(encoding="utf-8").partition("\n")[2].strip()


def describe_device() -> Device:
    """The first GPU, or the CPU."""
    cores = len(os.sched_getaffinity(0))
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
        return Device(torch.cuda.get_device_name(0), True, torch.cuda.is_bf16_supported(), cores, memory)
    return Device(f"{cores} CPU core{'s' * (cores > 1)}", False, False, cores, psutil.virtual_memory().available)


class _Planner:
    """The choices made so far, in the order of `plan_finetuning`: each one may look at those before it."""

    def __init__(self, name: str, found: Experiment, overrides: Sequence[str]) -> None:
        keys, data = [override.partition("=")[0] for override in overrides], found.data.model_dump(mode="json")
        if wrong := [key for key in keys if key.count(".") != 1]:
            raise ConfigError(f"{wrong[0]}: give section.key=value, and the name as --name")
        names = ("root", "train_images", "train_annotations", "val_images", "val_annotations", "val_fraction")
        self.values: dict[str, Any] = {"name": name, "data": {key: data[key] for key in names}}
        chosen = found.model_dump(mode="json")
        self.given = {key: chosen[section][name] for key in keys for section, _, name in [key.partition(".")]}
        self.reasons = dict.fromkeys(keys, "as given")
        self.warnings: list[str] = []
        self.device = describe_device()
        self.base = validate_experiment({"name": "base"}, source="the defaults")  # has the rates to scale
        self.dataset: CocoDataset
        self.val_images = 0

    def choose(self, key: str, value: Any, reason: str = "") -> None:
        """Set a key, to the user's value where there is one; without a reason it is not shown."""
        section, name = key.split(".")
        self.values.setdefault(section, {})[name] = self.given.get(key, value)
        if reason:
            self.reasons.setdefault(key, reason)

    def experiment(self) -> Experiment:
        """The experiment so far."""
        for key, value in self.given.items():
            self.choose(key, value)
        return validate_experiment(self.values, source="the fine-tuning recipe")

    def choose_start(self, start: str, runs_dir: Path) -> None:
        """The network and its first weights; those of others are converted once."""
        why = "as given"
        if not start and not self.device.cuda and SHAPES.is_dir():
            start, why = str(SHAPES), "a network for CPUs that comes with the project; it knows drawn shapes"
        if not start:
            better = "solq-lab download-weights hf_ddetr_r50_refine, then --from that"
            self.choose("model.pretrained", "imagenet", f"COCO weights would need far fewer steps: {better}")
            return

        path = download_weights(start) if start in RELEASED else Path(start)
        try:
            path = find_weights(path)
            _, self.base, _ = read_trained(path)
        except (WeightMismatch, RunError):
            imported = runs_dir / "imported" / f"{path.stem}.safetensors"
            imported.parent.mkdir(parents=True, exist_ok=True)
            logger.info("%s: converted to %s: %s", path, imported, import_released(path, imported))
            path, why = imported, f"{why}, converted"
            _, self.base, _ = read_trained(path)

        self.values["model"] = self.base.model.model_dump(mode="json") | {"pretrained": "none"}
        self.values["loss"] = self.base.loss.model_dump(mode="json")
        if self.base.codec.kind == "none":
            why += "; a detector without masks, its mask vectors start fresh"
        else:
            self.values["codec"] = self.base.codec.model_dump(mode="json")
        self.choose("train.finetune_from", os.path.relpath(path), why)

    def read_data(self) -> None:
        """Read the annotations."""
        if fraction := self.values["data"]["val_fraction"]:
            self.choose("data.val_fraction", fraction, "one split only: a fixed random part of it becomes val")
        self.dataset = build_dataset(self.experiment(), "train")  # the loader's judgement of the data comes first
        self.val_images = len(read_annotations(split_of(self.experiment(), "val").annotations)["images"])

    def choose_sizes(self) -> None:
        """Image size, augmentation, cache, queries."""
        truth, device = self.dataset.truth, self.device
        short, long = np.median(np.sort(truth.sizes, axis=1), axis=0).tolist()
        side, why = 128, "what a CPU trains in minutes"
        if device.cuda:
            side = next(side for least, side in ((20, 800), (10, 640), (0, 480)) if device.memory >= least * GB)
            why = f"fits {device.memory / GB:.0f} GB"
        if short < side:
            side, why = max(32, round(short / 32) * 32), "the images are no larger"
        longest = round(side * min(long / short, 5 / 3))
        seen = float(np.median(np.sqrt((truth.boxes[:, 2:] - truth.boxes[:, :2]).prod(axis=1))))
        sizes = (
            f"median image {short:.0f} x {long:.0f}, object {seen:.0f} px, {seen * side / short:.0f} px at this size"
        )
        self.choose("data.test_scale", side, f"{why}; {sizes}")
        self.choose("data.max_size", longest, "the long side then, at most 5 / 3 of the short one")

        # The released augmentation in proportion; a small network learns few images faster without crops.
        if device.cuda:
            scales = sorted({round(side * share / 32) * 32 for share in (0.6, 0.7, 0.8, 0.9, 1.0)})
            self.choose("data.train_scales", scales, "the released augmentation, in proportion")
            self.choose("data.crop_scales", [round(side * share) for share in (0.5, 0.625, 0.75)])
            self.choose("data.crop_size", [round(side * 0.48), round(side * 0.75)])
        else:
            self.choose("data.augment", "flip", "a small network learns few images faster without crops")
        decoded = (len(self.dataset) + self.val_images) * short * long * 3
        fits = decoded < 0.25 * psutil.virtual_memory().available
        self.choose("data.cache", fits, f"all images decoded take {decoded / GB:.2f} GB")
        self.choose("data.workers", max(2, device.cores - 1) if device.cuda else 0)

        most = int(np.diff(truth.starts).max())
        if queries_for(most) > self.experiment().model.queries:
            self.choose("model.queries", queries_for(most), f"up to {most} objects in an image, half as many to spare")

    def choose_batch(self) -> None:
        """Batch, accumulation, precision, learning rates."""
        device, images = self.device, len(self.dataset)
        wanted = min(16 if device.cuda else 10, images)
        batch = next((size for size in range(wanted, wanted // 2, -1) if images % size == 0), wanted)
        batch = self.given.get("train.batch_size", batch)
        left = images % batch
        self.choose("train.batch_size", batch, f"up to {wanted} a step" if left else f"divides {images} images")
        if left:
            self.warnings.append(f"{left} of {images} images fall out of each epoch, other ones each time")

        if device.cuda:
            size = self.values["data"]["test_scale"] * self.values["data"]["max_size"] / (800 * 1333)
            each = (4 if device.bf16 else 7) * GB * size
            fits = max(1, int((0.85 * device.memory - 2 * GB) / each))
            parts = next(parts for parts in range(1, batch + 1) if batch % parts == 0 and batch // parts <= fits)
            self.choose("train.accumulate", parts, f"about {fits} images of {each / GB:.1f} GB fit on {device.name}")
            precision = ("bf16", "half the memory, no scaling") if device.bf16 else ("none", "the GPU has no bf16")
            self.choose("train.autocast", *precision)
        else:
            self.choose("train.threads", device.cores, f"{device.name} to use")

        base = self.base
        for key in ("lr", "backbone_lr"):
            rate = getattr(base.optim, key) * (batch / base.train.batch_size) ** 0.5
            why = f"{getattr(base.optim, key):g} at batch {base.train.batch_size}, by the square-root rule"
            self.choose(f"optim.{key}", float(f"{rate:.2g}"), why)

    def choose_length(self, minutes: float | None) -> None:
        """Steps by the measured speed, warm-up, averaged weights, evaluations, early stopping."""
        images, batch = len(self.dataset), self.values["train"]["batch_size"]
        speed = measure_speed(self.experiment(), self.dataset)
        if minutes is None:
            steps = min(max(50 * images // batch, 1500), 50_000)
            taken = steps * batch / speed / (1 - EVALUATION_SHARE)
            why = f"50 passes, at least 1500 steps; about {describe_duration(taken)}"
        else:
            taken = 60 * minutes
            steps = max(1, int(taken * (1 - EVALUATION_SHARE) * speed / batch))
            why = f"{minutes:g} minutes, a fifth of them for evaluations,"
        self.choose("train.steps", steps, f"{why} at the measured {speed:.1f} images/s")

        warmup = round(min(0.1, max(0.02, 100 / steps)), 3)
        self.choose("optim.schedule", "cosine", "there is no drop to place")
        self.choose("optim.warmup", warmup, f"{round(warmup * steps)} steps: head and queries are partly new")
        window = max(10, round(0.02 * steps))
        self.choose("train.ema", round(1 - 1 / window, 4), f"averages the last {window} steps: steadier on few images")

        # An evaluated image costs about a third of a trained one, and scoring as much again.
        evaluations = max(1, min(12, int(EVALUATION_SHARE * taken * speed / (0.6 * self.val_images or 1))))
        every = max(1, steps // max(1, images // batch) // evaluations)
        self.choose("train.evaluate_every", every, f"epochs; about {evaluations} evaluations take a fifth of the time")
        self.choose("train.stop_after", max(3, evaluations // 2), "evaluations without a better AP; the best is kept")
        self.choose("train.save_every", max(100, min(1000, steps // 5)))

    def warn(self) -> None:
        """What may go wrong with so many steps and objects."""
        steps = self.values["train"]["steps"]
        if steps < MIN_STEPS:
            self.warnings.append(f"{steps} steps are few: below {MIN_STEPS} masks are hardly learnt; give more minutes")
        classes, counts = self.dataset.classes, Counter(self.dataset.truth.category_ids.tolist())
        objects: Counter[str] = Counter()  # categories of one name are added up
        for number, name in zip(classes.category_ids, classes.names, strict=True):
            objects[name] += counts[number]
        rare = [f"{name} {count}" for name, count in objects.items() if count < MIN_OBJECTS]
        if rare:
            shown = ", ".join(rare[:8]) + (", ..." if len(rare) > 8 else "")
            self.warnings.append(f"{len(rare)} classes have under {MIN_OBJECTS} training objects ({shown})")


def measure_speed(experiment: Experiment, train_set: CocoDataset, *, steps: int = 7) -> float:
    """Training images per second of this process on its device: the median of some steps, without the first.

    Args:
        experiment: what will be trained.
        train_set: its training images; they get its augmentation.
        steps: to take, two at least; after `ENOUGH_SECONDS` no further one is begun.
    """
    keep_freed_memory()  # as a training does
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(experiment.train.threads or threads)
    train_set.transform = build_augmentation(experiment.data)
    model = build_model(experiment, len(train_set.classes)).to(device).train()
    use_onednn(model, training=True)

    # The same images in each step: read once, as a cache keeps them or loaders read them ahead.
    size = experiment.train.batch_size // experiment.train.accumulate
    batch = next(iter(BatchLoader(train_set, [list(range(size))], 0)))
    step = stepper(model, experiment, batch, experiment.train.autocast)
    seconds: list[float] = []
    while len(seconds) < 2 or (len(seconds) < steps and sum(seconds) < ENOUGH_SECONDS):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    torch.set_num_threads(threads)
    return size / median(seconds[1:])
