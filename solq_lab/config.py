"""The typed schema of an experiment, and its loader. Every default of the project stands here and nowhere else.

The numbers are the paper's (section 4.2) where it gives them; where the released code differs, the field says so.
This module loads without torch, so that the command line answers at once.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from solq_lab.codecs.kinds import CODECS
from solq_lab.errors import UserError
from solq_lab.models.kinds import BACKBONES
from solq_lab.plain_yaml import load_yaml

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"  # of runs, sweeps and their rows: folders and files are called so


class ConfigError(UserError):
    """An experiment that cannot be used: the message names file and key, what was found and what is allowed."""


class Section(BaseModel):
    """Common ground: unknown keys are refused, values cannot change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Schema = TypeVar("Schema", bound=Section)


def _one_of(name: str, known: Iterable[str]) -> str:
    """`name`, where it is known. Raises ValueError with the names that are."""
    if name not in known:
        raise ValueError(f"allowed are {', '.join(map(repr, known))}")
    return name


class ModelSection(Section):
    """The network (paper, section 3.2)."""

    backbone: str = "resnet50"
    pretrained: str = Field("imagenet", description="'imagenet', 'none', or the path of a safetensors or .pth file")
    dilation: bool = Field(False, description="DC5: stride 16 instead of 32 in the last ResNet stage")
    levels: int = Field(4, ge=1, le=6, description="1: C5 alone; 3: C3-C5; more: stride-2 convolutions on top")
    width: int = Field(256, gt=0, description="C; the released SOLQ models have 384, the paper's table 5 has 256")
    heads: int = Field(8, gt=0)
    encoder_layers: int = Field(6, ge=0)
    decoder_layers: int = Field(6, gt=0)
    encoder_points: int = Field(4, gt=0)
    decoder_points: int = Field(4, gt=0)
    feedforward: int = Field(1024, gt=0)
    vector_hidden: int = Field(1024, gt=0, description="hidden size of the vector MLP")
    queries: int = Field(300, gt=0, description="J")
    dropout: float = Field(0.1, ge=0, lt=1)
    activation: Literal["relu", "gelu", "silu"] = "relu"
    refine_boxes: bool = Field(True, description="iterative box refinement; on in all released SOLQ models")
    two_stage: bool = Field(False, description="queries from the encoder's best proposals")
    standardise_vectors: bool = Field(False, description="vectors in units of their spread in training")
    mask_branch: Literal["none", "sqr"] = Field("none", description="sqr: the paper's baseline draws masks (table 2)")

    @field_validator("backbone")
    @classmethod
    def _backbone_exists(cls, name: str) -> str:
        return _one_of(name, BACKBONES)

    @model_validator(mode="after")
    def _sizes_fit(self) -> ModelSection:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.width % 32:
            raise ValueError(f"width {self.width} is not a multiple of 32 (group norm has 32 groups)")
        if self.levels == 2:
            raise ValueError("levels 2 does not exist: 1 is C5 alone, 3 is C3-C5, 4 adds the stride-64 level")
        if self.mask_branch == "sqr" and self.levels == 1:
            raise ValueError("mask_branch sqr needs the maps C3-C5: give levels 3 or more, or mask_branch: none")
        if self.two_stage and not self.refine_boxes:
            raise ValueError("two_stage needs refine_boxes: true; proposals are refined layer by layer")
        if self.dilation and not BACKBONES[self.backbone].dilates:
            dilating = ", ".join(name for name, spec in BACKBONES.items() if spec.dilates)
            raise ValueError(f"dilation is for {dilating}, not {self.backbone}")
        return self


class CodecSection(Section):
    """The mask code (paper, section 3.2, Mask Compression Coding)."""

    kind: str = Field("dct", description="a name in codecs/kinds.py, or 'none', which trains a plain detector")
    mask_size: int = Field(128, gt=0, description="N, cells")
    vector_dim: int = Field(256, gt=0, description="n_k, kept coefficients")
    artifact: str = Field("", description="pca, sparse: file of the fitted tables, written by solq-lab fit-codec")
    pca: Literal["plain", "released"] = Field(
        "plain", description="plain: eq. 4; released: centered, whitened, on noisy logits, other threshold and loss"
    )
    beta: float = Field(1.0, gt=0, description="sparse: price of a coefficient in eq. 3; the paper gives no value")
    threshold: Literal["middle", "half"] | None = Field(
        None, description="masks are cells above the middle of a reconstruction's range, or 0.5; None: the code's own"
    )

    @property
    def is_fitted(self) -> bool:
        """Whether the codec's tables are read from `artifact`."""
        return self.kind in CODECS and CODECS[self.kind].fitted

    @field_validator("kind")
    @classmethod
    def _kind_exists(cls, name: str) -> str:
        return _one_of(name, [*CODECS, "none"])

    @model_validator(mode="after")
    def _sizes_fit(self) -> CodecSection:
        if self.vector_dim > self.mask_size**2:
            raise ValueError(f"vector_dim {self.vector_dim} exceeds mask_size squared ({self.mask_size**2})")
        if self.kind in CODECS and CODECS[self.kind].allowed_length(self.vector_dim) != self.vector_dim:
            raise ValueError(
                f"kind {self.kind!r} needs a square number (784: 28 x 28), not vector_dim {self.vector_dim}"
            )
        if self.is_fitted and not self.artifact:
            raise ValueError(
                f"kind {self.kind!r} needs fitted tables: name their file (codec.artifact=FILE.safetensors), which "
                "`solq-lab fit-codec EXPERIMENT` writes"
            )
        return self


class MatcherSection(Section):
    """Costs of the Hungarian matching (paper, eq. 1); masks take no part in it."""

    class_cost: float = Field(2.0, ge=0)
    l1_cost: float = Field(5.0, ge=0)
    giou_cost: float = Field(2.0, ge=0)


class LossSection(Section):
    """Weights of eq. 2 and eq. 5."""

    class_weight: float = Field(2.0, ge=0)
    l1_weight: float = Field(5.0, ge=0)
    giou_weight: float = Field(2.0, ge=0)
    vector_weight: float = Field(3.0, ge=0, description="lambda_vec")
    vector_layers: int = Field(6, ge=1, description="number of last decoder layers with a vector loss (table 3c)")
    vector_normalisation: Literal["mean", "num_boxes"] = Field(
        "mean", description="mean over pairs and coefficients (released models), or sum over both / number of boxes"
    )
    mask_weight: float = Field(1.0, ge=0, description="focal loss of the mask branch's pixels (released)")
    dice_weight: float = Field(1.0, ge=0, description="dice loss of the mask branch (released)")
    focal_alpha: float = Field(0.25, ge=0, le=1)
    focal_gamma: float = Field(2.0, ge=0)


class DataSection(Section):
    """A COCO-format folder and what happens to its images on the way in."""

    root: str = Field("", description="folder of images and annotations; empty: has to be given")
    train_images: str = "train2017"
    train_annotations: str = "annotations/instances_train2017.json"
    val_images: str = "val2017"
    val_annotations: str = "annotations/instances_val2017.json"
    class_ids: Literal["contiguous", "raw"] = Field("contiguous", description="raw: the category id is the channel")
    num_classes: int | None = Field(None, gt=0, description="class channels; None: as the annotations say")
    generate: Literal["none", "easy", "hard"] = Field("none", description="draw shapes into root when it is missing")
    generate_train: int = Field(6000, gt=0)
    generate_val: int = Field(200, gt=0)
    augment: Literal["released", "flip", "none"] = Field(
        "released", description="released: two resizes, flip, random crop"
    )
    train_scales: list[PositiveInt] = Field([480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800], min_length=1)
    crop_scales: list[PositiveInt] = Field(
        [400, 500, 600], min_length=1, description="short sides before the random crop"
    )
    crop_size: tuple[PositiveInt, PositiveInt] = Field(
        (384, 600), description="smallest and largest side of the random crop, pixels"
    )
    test_scale: int = Field(800, gt=0)
    max_size: int = Field(1333, gt=0, description="longest side, training and test")
    mask_route: Literal["window", "bitmap"] = Field("window", description="bitmap: as released, full masks")
    cache: bool = Field(False, description="keep decoded images and box-frame masks in memory (small data sets)")
    workers: int = Field(4, ge=0, description="loader processes per training process; 0 loads in the training process")
    bucket_by_aspect: bool = Field(False, description="training batches of wide or of tall images: less padding")
    unreadable: Literal["stop", "replace"] = Field(
        "stop", description="a damaged or lost image in training: stop with its name, or take the next one and log it"
    )

    @model_validator(mode="after")
    def _sizes_ascend(self) -> DataSection:
        if self.crop_size[0] > self.crop_size[1]:
            raise ValueError(f"crop_size {list(self.crop_size)}: allowed are a smallest and a largest side, ascending")
        return self


class OptimSection(Section):
    """AdamW with three groups and a step drop (paper, section 4.2)."""

    lr: float = Field(2e-4, gt=0)
    backbone_lr: float = Field(2e-5, ge=0)
    offset_lr_factor: float = Field(0.1, ge=0, description="for sampling_offsets and reference_points")
    weight_decay: float = Field(1e-4, ge=0)
    clip_norm: float = Field(0.1, ge=0, description="largest gradient norm; 0 turns clipping off")
    schedule: Literal["step", "cosine"] = "step"
    drop_at: float = Field(0.8, gt=0, le=1, description="step schedule: share of the training (epoch 40 of 50)")
    drop_factor: float = Field(0.1, gt=0, lt=1)
    warmup: float = Field(0.0, ge=0, lt=1, description="linear warm-up, as a share of the training")
    final_factor: float = Field(0.01, ge=0, le=1, description="cosine schedule: last learning rate over the first")


class TrainSection(Section):
    """Length, batch and hardware of a training."""

    epochs: int = Field(50, gt=0)
    steps: int | None = Field(None, gt=0, description="optimiser steps; overrides epochs where given")
    batch_size: int = Field(32, gt=0, description="images per optimiser step, over all processes and accumulation")
    gpus: int = Field(1, gt=0, description="training processes; without CUDA on the CPU (gloo)")
    accumulate: int = Field(1, gt=0, description="backward passes per optimiser step")
    autocast: Literal["none", "bf16", "fp16"] = "none"
    skip_nonfinite: int = Field(0, ge=0, description="steps in a row that may be left out when not finite; 0: none")
    ema: float = Field(0.0, ge=0, lt=1, description="decay of the averaged weights; 0 is off")
    finetune_from: str = Field("", description="start from this weights file or run; heads and queries are adapted")
    freeze_detector: bool = Field(False, description="train the mask branch alone, on the detector in model.pretrained")
    rank_timeout: float = Field(
        180.0, gt=0, description="seconds without a sign of life after which one of several processes counts as lost"
    )
    threads: int = Field(0, ge=0, description="torch threads per process; 0 leaves the choice to torch")
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, a third more time")
    compile: bool = Field(False, description="torch.compile of the transformer's layers; the first step takes minutes")
    save_every: int = Field(1000, gt=0, description="steps between checkpoints; one is also written at each evaluation")
    evaluate_every: int = Field(1, ge=0, description="epochs between evaluations; 0: only at the end")
    log_every: int = Field(10, gt=0, description="steps between lines of metrics.jsonl")
    tensorboard: bool = Field(False, description="the numbers of metrics.jsonl as TensorBoard files too")

    @model_validator(mode="after")
    def _batch_divides(self) -> TrainSection:
        parts = self.gpus * self.accumulate
        if self.batch_size % parts:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide by gpus x accumulate = {self.gpus} x {self.accumulate}"
            )
        return self


class EvaluationSection(Section):
    """What is reported (paper, section 4.1)."""

    top_k: int = Field(100, gt=0, description="detections kept per image")
    batch_size: int = Field(1, gt=0, description="images per forward pass and process")
    max_images: int | None = Field(None, gt=0, description="evaluate the first so many images only")
    area_sides: tuple[PositiveFloat, PositiveFloat] = Field(
        (32.0, 96.0), description="small below, medium below; pixels"
    )
    boundary_ratio: float = Field(0.02, gt=0, lt=1, description="boundary width over the image's diagonal")

    @model_validator(mode="after")
    def _sizes_ascend(self) -> EvaluationSection:
        if self.area_sides[0] >= self.area_sides[1]:
            raise ValueError(f"area_sides {list(self.area_sides)}: allowed are two sides in pixels, ascending")
        return self


class Experiment(Section):
    """One experiment, complete: what `experiment.yaml` in a run folder holds."""

    name: str = Field(min_length=1, pattern=NAME)
    seed: int = Field(42, ge=0)
    model: ModelSection = ModelSection()
    codec: CodecSection = CodecSection()
    matcher: MatcherSection = MatcherSection()
    loss: LossSection = LossSection()
    data: DataSection = DataSection()
    optim: OptimSection = OptimSection()
    train: TrainSection = TrainSection()
    evaluation: EvaluationSection = EvaluationSection()

    @model_validator(mode="after")
    def _masks_have_one_source(self) -> Experiment:
        if self.model.mask_branch != "none" and self.codec.kind != "none":
            raise ValueError(
                f"model.mask_branch {self.model.mask_branch} and codec.kind {self.codec.kind} would both make masks; "
                "give the mask branch codec.kind: none, or mask vectors model.mask_branch: none"
            )
        if self.train.finetune_from and self.model.pretrained not in ("imagenet", "none"):
            raise ValueError(
                f"train.finetune_from {self.train.finetune_from} and model.pretrained {self.model.pretrained} both "
                "name weights to start from; leave one out"
            )
        if self.train.freeze_detector and self.model.mask_branch == "none":
            raise ValueError(
                "train.freeze_detector leaves nothing to train without a branch: set model.mask_branch: sqr"
            )
        if self.train.freeze_detector and self.model.pretrained in ("imagenet", "none"):
            raise ValueError(
                f"train.freeze_detector needs a trained detector, and model.pretrained is {self.model.pretrained}; "
                "name its weights file there"
            )
        return self

    @property
    def method(self) -> Literal["SOLQ", "SQR", "Deformable DETR"]:
        """What the paper calls a model of this kind: how its queries say their masks, if at all."""
        if self.model.mask_branch == "sqr":
            return "SQR"
        return "Deformable DETR" if self.codec.kind == "none" else "SOLQ"

    def evaluated_on(self, split: Literal["val", "train"]) -> Experiment:
        """The same experiment with the images of `split` to validate on: "train" shows what was learnt by heart.

        Raises:
            ConfigError: another split.
        """
        if split not in ("val", "train"):
            raise ConfigError(f"split {split!r}: allowed are 'val' and 'train'")
        if split == "val":
            return self
        images, annotations = self.data.train_images, self.data.train_annotations
        data = self.data.model_copy(update={"val_images": images, "val_annotations": annotations})
        return self.model_copy(update={"data": data})

    def to_yaml(self) -> str:
        """The experiment as YAML that `load_experiment` reads back unchanged."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class SweepRow(Section):
    """One row of a sweep: what is changed, and which row of the paper it answers."""

    name: str = Field(pattern=NAME)
    overrides: list[str] = Field([], description="section.key=value changes to the experiment")
    experiment: str | None = Field(None, description="instead of the sweep's")
    paper: str | None = Field(None, description="row of the paper's table that this one answers")
    run: str | None = Field(None, pattern=NAME, description="name of its runs, to share them with rows of other sweeps")


class Sweep(Section):
    """A table to fill: rows times seeds, each one a run of the same notebook."""

    name: str = Field(pattern=NAME)
    experiment: str = Field(description="YAML file that all rows start from; in the file, relative to it")
    overrides: list[str] = Field([], description="section.key=value changes that all rows share")
    rows: list[SweepRow] = Field(min_length=1)
    seeds: list[int] = Field([42], min_length=1)
    notebook: str = Field("notebooks/train.ipynb", description="what makes a run")
    paper: str | None = Field(None, description="table of paper_results.yaml that this sweep answers")
    metrics: list[str] = Field(["segm.AP", "box.AP"], min_length=1, description="columns of the table")

    @model_validator(mode="after")
    def _nothing_comes_twice(self) -> Sweep:
        for what, values in (("rows", [row.name for row in self.rows]), ("seeds", self.seeds)):
            twice = sorted({value for value in values if values.count(value) > 1})
            if twice:
                raise ValueError(f"{what}: {', '.join(map(str, twice))} comes more than once; give each its own name")
        return self


def load_experiment(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Experiment:
    """The experiment in a YAML file, its parents (`extends`) filled in and the overrides applied.

    Args:
        path: YAML file; its optional key `extends` names a parent file relative to it.
        overrides: `section.key=value` strings, the value in YAML spelling; later ones win.

    Raises:
        ConfigError: the file, a key or a value cannot be used.
    """
    path = Path(path)
    values = _read_with_parents(path, seen=[])
    for override in overrides:
        _apply_override(values, override)
    values.setdefault("name", path.stem)
    return validate_experiment(values, source=str(path))


def load_sweep(path: str | Path) -> Sweep:
    """The sweep in a YAML file, called like the file, its experiments relative to the working directory.

    Raises:
        ConfigError: the file, a key or a value cannot be used. The experiments are not opened yet.
    """
    path = Path(path)
    values = {"name": path.stem} | read_yaml(path)
    sweep = _validate(Sweep, values, source=str(path))
    rows = [
        row.model_copy(update={"experiment": _beside(path, row.experiment)}) if row.experiment else row
        for row in sweep.rows
    ]
    return sweep.model_copy(update={"experiment": _beside(path, sweep.experiment), "rows": rows})


def _beside(path: Path, relative: str) -> str:
    """A path that is meant relative to a file's folder, seen from here."""
    return os.path.normpath(path.parent / relative)


def parse_experiment(text: str, *, source: str) -> Experiment:
    """The experiment in a YAML text, as `to_yaml` writes it; `source` is what an error message calls it.

    Raises:
        ConfigError: not plain YAML, an unknown key or a value that does not fit.
    """
    return validate_experiment(_parse_mapping(text, source=source), source=source)


def validate_experiment(values: dict[str, Any], *, source: str) -> Experiment:
    """The experiment of a plain dictionary; `source` is what an error message calls it.

    Raises:
        ConfigError: an unknown key or a value that does not fit; all faults are listed at once.
    """
    return _validate(Experiment, values, source=source)


def _validate(schema: type[Schema], values: dict[str, Any], *, source: str) -> Schema:
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        faults = [_describe_fault(fault, schema) for fault in error.errors()]
        raise ConfigError(f"{source}: " + "; ".join(faults)) from None


def _read_with_parents(path: Path, seen: list[Path]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: extends itself by way of {' -> '.join(str(p) for p in seen)}; remove one `extends`")
    values = read_yaml(path)
    parent = values.pop("extends", None)
    if parent is None:
        return values
    if not isinstance(parent, str):
        raise ConfigError(f"{path}: extends: found {parent!r}, allowed is the path of one YAML file")
    if not (path.parent / parent).is_file():
        raise ConfigError(
            f"{path}: extends: found {parent}, allowed is the path of a YAML file as seen from {path.parent}"
        )
    return _merge(_read_with_parents(path.parent / parent, [*seen, path.resolve()]), values)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: no such file, not YAML (object tags included), or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        neighbours = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        nearest = difflib.get_close_matches(path.name, neighbours, n=1)
        found = ", ".join(neighbours) or "no YAML"
        hint = f"; did you mean {path.parent / nearest[0]}?" if nearest else f"; found there: {found}"
        raise ConfigError(f"{path}: no such experiment file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    return _parse_mapping(text, source=str(path))


def _parse_mapping(text: str, *, source: str) -> dict[str, Any]:
    try:
        values = load_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not plain YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: found a {type(values).__name__}, allowed is a mapping of sections")
    return values


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _apply_override(values: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"override {override!r}: allowed is section.key=value, for example train.batch_size=16")
    try:
        value = load_yaml(text)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: {text!r} is not a YAML value; quote it") from None
    *sections, key = dotted.split(".")
    place = values
    for section in sections:
        place = place.setdefault(section, {})
        if not isinstance(place, dict):
            raise ConfigError(f"override {override!r}: {section} is not a section")
    place[key] = value


def _describe_fault(fault: dict[str, Any], schema: type[Section]) -> str:
    location = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        allowed = _allowed_keys(schema, fault["loc"][:-1])
        nearest = _sections_with(fault["loc"][-1], schema) or difflib.get_close_matches(
            str(fault["loc"][-1]), allowed, n=1, cutoff=0.5
        )
        hint = f"did you mean {' or '.join(nearest)}?" if nearest else f"allowed are {', '.join(allowed)}"
        return f"unknown key {location}; {hint}"
    if fault["type"] == "model_type":
        keys = ", ".join(_allowed_keys(schema, fault["loc"]))
        return f"{location}: found {fault['input']!r}, allowed is a section with some of the keys {keys}"
    message = fault["msg"].removeprefix("Value error, ")
    shown = fault["type"] != "missing" and not isinstance(fault["input"], dict | BaseModel)
    found = f" (found {fault['input']!r})" if shown else ""
    return f"{location or schema.__name__.lower()}: {message}{found}"


def _sections_with(key: object, schema: type[Section]) -> list[str]:
    """Where a key belongs that was written elsewhere: `train.steps` for `steps`."""
    sections = {name: field.annotation for name, field in schema.model_fields.items()}
    return [
        f"{name}.{key}"
        for name, section in sections.items()
        if isinstance(section, type) and issubclass(section, Section) and key in section.model_fields
    ]


def _allowed_keys(schema: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    for part in location:
        if isinstance(part, str):  # a number is a place in a list, whose type the step before has found
            annotation = schema.model_fields[part].annotation
            schema = next(iter(get_args(annotation)), annotation)
    return list(schema.model_fields)
