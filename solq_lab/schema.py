"""The typed schema of an experiment and of a sweep. Every default of the project stands here and nowhere else.

The numbers are the paper's (section 4.2) where it gives them; where the released code differs, the field says so.
Loads without torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, model_validator

from solq_lab.codecs.kinds import CODECS
from solq_lab.conflicts import conflicts
from solq_lab.data.folders import Split
from solq_lab.data.kinds import AUGMENTATIONS, Orientation
from solq_lab.models.kinds import BACKBONES, TIMM, backbone_spec
from solq_lab.sections import NAME, ConfigError, PathText, Role, Section, one_of

Backbone = Annotated[
    str, AfterValidator(lambda name: one_of(name, [*BACKBONES, f"{TIMM}NAME", *([name] * name.startswith(TIMM))]))
]
Codec = Annotated[str, AfterValidator(lambda name: one_of(name, [*CODECS, "none"]))]
Augmentation = Annotated[str, AfterValidator(lambda name: one_of(name, AUGMENTATIONS))]


class ModelSection(Section):
    """The network (paper, section 3.2)."""

    backbone: Backbone = Field(
        "resnet50", description="a name in models/kinds.py, or timm:NAME (ConvNeXt, ViT with patch 16)"
    )
    pretrained: Annotated[PathText, Role.START, Role.ADAPTED] = Field(
        "imagenet", description="'imagenet', 'none', or the path of a safetensors or .pth file"
    )
    dilation: bool = Field(False, description="DC5: stride 16 instead of 32 in the last ResNet stage")
    levels: int = Field(4, ge=1, le=6, description="1: C5 alone; 3: C3-C5; more: stride-2 convolutions on top")
    width: int = Field(256, gt=0, description="C; the released SOLQ models have 384, the paper's table 5 has 256")
    heads: int = Field(8, gt=0)
    encoder_layers: int = Field(6, ge=0)
    decoder_layers: int = Field(6, gt=0)
    encoder_points: int = Field(4, gt=0)
    decoder_points: int = Field(4, gt=0)
    feedforward: int = Field(1024, gt=0)
    vector_hidden: Annotated[int, Role.ADAPTED] = Field(1024, gt=0, description="hidden size of the vector MLP")
    queries: Annotated[int, Role.ADAPTED] = Field(300, gt=0, description="J")
    dropout: Annotated[float, Role.ADAPTED] = Field(0.1, ge=0, lt=1)
    activation: Literal["relu", "gelu", "silu"] = "relu"
    refine_boxes: bool = Field(True, description="iterative box refinement; on in all released SOLQ models")
    two_stage: bool = Field(False, description="queries from the encoder's best proposals")
    mixed_queries: bool = Field(False, description="positions of queries from the best proposals, content learned")
    look_twice: Annotated[bool, Role.ADAPTED] = Field(
        False, description="a layer's box loss also trains the layer before; needs refine_boxes"
    )
    denoising: Annotated[int, Role.ADAPTED] = Field(
        0,
        ge=0,
        description="groups of noisy copies of the objects that training restores (class, box, vector); 0: none",
    )
    mask_look: Annotated[int, Role.ADAPTED] = Field(
        0, ge=0, description="points inside the predicted box where the vector MLP reads a map of stride 4; 0: none"
    )
    standardise_vectors: Annotated[bool, Role.ADAPTED] = Field(
        False, description="vectors in units of their standard deviation in training"
    )
    mask_branch: Annotated[Literal["none", "sqr"], Role.ADAPTED] = Field(
        "none", description="sqr: the paper's baseline (table 2)"
    )
    mask_detail: Annotated[int, Role.ADAPTED] = Field(
        1, gt=0, description="logits per side of a cell of the mask branch: 2 halves the stride of its masks"
    )

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
        if self.mask_detail > 1 and self.mask_branch == "none":
            raise ValueError(f"mask_detail {self.mask_detail} is about a mask branch; set it to 1, or mask_branch: sqr")

        # What mask vectors are read from.
        if self.mask_look and self.width % self.mask_look:
            allowed = ", ".join(str(number) for number in range(8, self.width + 1) if self.width % number == 0)
            raise ValueError(f"mask_look {self.mask_look} does not divide width {self.width}; allowed are 0, {allowed}")
        if self.mask_look and self.levels == 1:
            raise ValueError(f"mask_look {self.mask_look} needs the maps C2-C5: give levels 3 or more, or set it to 0")

        # Where queries come from.
        for key in ("two_stage", "mixed_queries", "look_twice"):
            if getattr(self, key) and not self.refine_boxes:
                raise ValueError(f"{key}: true needs refine_boxes: true; it is about boxes that the layers refine")
        if self.denoising and not (self.two_stage or self.mixed_queries):
            raise ValueError(f"denoising {self.denoising} needs mixed_queries: true or two_stage: true, or set it to 0")
        if self.two_stage and self.mixed_queries:
            raise ValueError("two_stage and mixed_queries both say where queries come from; set one of them to false")
        if self.dilation and not backbone_spec(self.backbone).dilates:
            dilating = ", ".join(name for name, spec in BACKBONES.items() if spec.dilates)
            raise ValueError(f"dilation is for {dilating}, not {self.backbone}")
        return self


class CodecSection(Section):
    """The mask codec (paper, section 3.2, Mask Compression Coding)."""

    kind: Codec = Field("dct", description="a name in codecs/kinds.py, or 'none', which trains a plain detector")
    mask_size: int = Field(128, gt=0, description="N, pixels per side of the box frame")
    vector_dim: int = Field(256, gt=0, description="n_k, kept coefficients")
    artifact: Annotated[PathText, Role.START] = Field(
        "", description="pca, sparse: file of the fitted tables, written by solq-lab fit-codec"
    )
    pca: Literal["plain", "released"] = Field(
        "plain", description="plain: eq. 4; released: centered, whitened, on noisy logits, other threshold and loss"
    )
    learn_decoder: bool = Field(False, description="dct: a decoder that starts as the DCT's and is learnt")
    beta: float = Field(1.0, gt=0, description="sparse: price of a coefficient in eq. 3; the paper gives no value")
    threshold: Literal["middle", "half"] | None = Field(
        None,
        description="pixels above the middle of a reconstruction's range, or above 0.5; None: the codec's own",
    )

    @property
    def is_fitted(self) -> bool:
        """Whether the codec's tables are read from `artifact`."""
        return self.kind in CODECS and CODECS[self.kind].fitted

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
    """Costs of the Hungarian matching (paper, eq. 1); masks have none."""

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
    vector_kind: Literal["codec", "l1", "smooth_l1", "l2"] = Field(
        "codec", description="distance of vectors; codec: the one its paper trains it with"
    )
    vector_units: Literal["raw", "std"] = Field(
        "raw", description="std: every coefficient over its standard deviation; needs model.standardise_vectors"
    )
    vector_frame: Literal["truth", "predicted"] = Field(
        "truth", description="box that target masks are drawn in; predicted: the query's own, once it is about right"
    )
    class_loss: Literal["focal", "quality"] = Field(
        "focal", description="quality: the score to reach is the IoU of the query's mask, not 1"
    )
    decoded_dice_weight: float = Field(0.0, ge=0, description="dice loss of decoded masks, beside the vector loss")
    outline_dice_weight: float = Field(0.0, ge=0, description="the same near the masks' outlines alone")
    band_limit: float = Field(0.0, ge=0, description="highest frequency that counts, half periods per pixel; 0: all")
    tail_drop: float = Field(0.0, ge=0, le=1, description="share of decoded masks whose vectors lose a random tail")
    proposals_per_object: int = Field(1, gt=0, description="encoder proposals that one object is matched to")
    mask_weight: float = Field(1.0, ge=0, description="focal loss of the mask branch's pixels (released)")
    dice_weight: float = Field(1.0, ge=0, description="dice loss of the mask branch (released)")
    focal_alpha: float = Field(0.25, ge=0, le=1)
    focal_gamma: float = Field(2.0, ge=0)


class DataSection(Section):
    """A data folder, and the transforms of its images.

    Names that are left empty are those that `data.folders` finds in the folder.
    """

    root: Annotated[PathText, Role.MACHINE] = Field("", description="folder of images and annotations; has to be given")
    train_images: str = Field("", description="folder, relative to root; empty: found, as the next three")
    train_annotations: str = Field("", description="COCO file, or FILE#PART: a split of a data.yaml or of val_fraction")
    val_images: str = ""
    val_annotations: str = ""
    val_fraction: float = Field(
        0.0, ge=0, lt=1, description="share of the images that becomes val, the same always, where there is no val"
    )
    class_ids: Literal["contiguous", "raw"] = Field("contiguous", description="raw: the category id is the channel")
    num_classes: int | None = Field(None, gt=0, description="class channels; None: as in the annotations")
    generate: Literal["none", "easy", "hard"] = Field("none", description="draw shapes into root when it is missing")
    generate_train: int = Field(6000, gt=0)
    generate_val: int = Field(200, gt=0)
    orientation: Orientation | None = Field(
        None,
        description="images with an EXIF orientation: 'stored' as in the file, as COCO's annotations count pixels; "
        "'upright' turned, as most tools show and annotate them; None: stored in a data set, upright in predict",
    )
    allow_links: Annotated[bool, Role.MACHINE, Role.MAY_CHANGE] = Field(
        False, description="images may be links that leave their folder, as DVC and git-annex make them"
    )
    augment: Augmentation = Field(
        "released", description="released: two resizes, flip, random crop; lsj; flip; mosaic; copy_paste; none"
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
    cache: Annotated[bool, Role.MAY_CHANGE] = Field(
        False, description="keep decoded images and box-frame masks in memory (small data sets)"
    )
    workers: Annotated[int, Role.MAY_CHANGE, Role.MACHINE] = Field(
        4, ge=0, description="loader processes per training process; 0 loads in the training process"
    )
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
    gpus: Annotated[int, Role.MACHINE] = Field(
        1, ge=0, description="training processes, on the CPU without CUDA; 0: one on a GPU, two on a CPU of two cores"
    )
    accumulate: Annotated[int, Role.MAY_CHANGE, Role.MACHINE] = Field(1, gt=0, description="passes per optimiser step")
    autocast: Literal["none", "bf16", "fp16"] = "none"
    skip_nonfinite: Annotated[int, Role.MAY_CHANGE] = Field(0, ge=0, description="not finite steps in a row to skip")
    ema: float = Field(0.0, ge=0, lt=1, description="decay of the averaged weights; 0 is off")
    finetune_from: Annotated[PathText, Role.START] = Field(
        "", description="start from this weights file or run; heads and queries are adapted"
    )
    freeze_detector: bool = Field(False, description="train the mask branch alone, on the detector in model.pretrained")
    rank_timeout: Annotated[float, Role.MAY_CHANGE] = Field(
        180.0, gt=0, description="seconds without a heartbeat after which one of several processes counts as lost"
    )
    threads: Annotated[int, Role.MAY_CHANGE, Role.MACHINE] = Field(
        0, ge=0, description="per process; 0: torch's choice"
    )
    gradient_checkpointing: Annotated[bool, Role.MAY_CHANGE] = Field(
        False, description="recompute activations: less memory, a third more time"
    )
    compile: bool = Field(False, description="torch.compile of the transformer's layers; the first step takes minutes")
    save_every: Annotated[int, Role.MAY_CHANGE] = Field(
        1000, gt=0, description="steps between checkpoints; one is also written at each evaluation"
    )
    evaluate_every: int = Field(1, ge=0, description="epochs between evaluations; 0: only at the end")
    stop_after: int = Field(0, ge=0, description="evaluations in a row without a better AP that end it; 0: never")
    log_every: int = Field(10, gt=0, description="steps between lines of metrics.jsonl")
    tensorboard: bool = Field(False, description="the numbers of metrics.jsonl as TensorBoard files too")

    @model_validator(mode="after")
    def _batch_divides(self) -> TrainSection:
        parts = max(self.gpus, 1) * self.accumulate
        if self.batch_size % parts:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide by gpus x accumulate = {self.gpus} x {self.accumulate}"
            )
        return self


class EvaluationSection(Section):
    """What is reported (paper, section 4.1)."""

    top_k: int = Field(100, gt=0, description="detections kept and scored per image")
    batch_size: int = Field(1, gt=0, description="images per forward pass and process")
    vector_dim: int | None = Field(None, gt=0, description="decode the first so many coefficients; None: all")
    rescore: Literal["none", "sharpness"] = Field("none", description="sharpness: scores times certainty of the mask")
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
    def _sections_fit(self) -> Experiment:
        for message in conflicts(self):
            raise ValueError(message)
        return self

    @property
    def method(self) -> Literal["SOLQ", "SQR", "Deformable DETR"]:
        """The paper's name for a model of this kind."""
        if self.model.mask_branch == "sqr":
            return "SQR"
        return "Deformable DETR" if self.codec.kind == "none" else "SOLQ"

    def value(self, key: str) -> Any:
        """The value of "section.key"."""
        section, name = key.split(".")
        return getattr(getattr(self, section), name)

    @property
    def starting_files(self) -> dict[str, str]:
        """The files that a training starts from, by key."""
        files = {key: self.value(key) for key in sorted(keys_with(Role.START))}
        if not self.codec.is_fitted:
            del files["codec.artifact"]
        return {key: file for key, file in files.items() if file not in ("", "imagenet", "none")}

    def evaluated_on(self, split: Literal["val", "train"] | Split) -> Experiment:
        """The same experiment with the images of `split` to validate on: "train" shows overfitting.

        Raises:
            ConfigError: another name of a split.
        """
        if isinstance(split, Split):
            files = {"val_images": str(split.images.absolute()), "val_annotations": str(split.annotations.absolute())}
            return self.model_copy(update={"data": self.data.model_copy(update=files)})
        if split not in ("val", "train"):
            raise ConfigError(f"split {split!r}: allowed are 'val' and 'train'")
        if split == "val":
            return self
        if self.data.root and not self.data.train_annotations:
            raise ConfigError(f"data.train_annotations: found '', allowed is the annotation file of {self.data.root}")
        train = {"val_images": self.data.train_images, "val_annotations": self.data.train_annotations}
        return self.model_copy(update={"data": self.data.model_copy(update=train)})

    def to_yaml(self) -> str:
        """The experiment as YAML that `load_experiment` reads back unchanged."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def keys_with(role: Role) -> frozenset[str]:
    """The keys of an experiment that have a role, as "section.key"."""
    return frozenset(
        f"{name}.{key}"
        for name, field in Experiment.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        for key, inner in field.annotation.model_fields.items()
        if role in inner.metadata
    )
