"""From an experiment to objects. The only place where configuration meets the network, the codecs and the data."""

from __future__ import annotations

import dataclasses
import logging
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from solq_lab import distributed
from solq_lab.codecs.artifact import ArtifactError, load_tables
from solq_lab.codecs.base import FittedCodec, MaskCodec
from solq_lab.codecs.dct import LearnedDCTCodec
from solq_lab.codecs.kinds import CODECS
from solq_lab.config import ConfigError, Experiment
from solq_lab.data.classes import ClassMap
from solq_lab.data.coco import CocoDataset
from solq_lab.data.kinds import AUGMENTATIONS, MIXED
from solq_lab.data.order import BatchStream
from solq_lab.data.transforms import TestResize, Transform
from solq_lab.data_folder import split_of
from solq_lab.errors import DataError
from solq_lab.models.kinds import backbone_spec
from solq_lab.models.official import is_official
from solq_lab.models.released import IMAGENET, cached_file
from solq_lab.models.solq import SOLQ
from solq_lab.models.sqr import SQRDetector
from solq_lab.models.weights import (
    LEARNED_DECODER,
    WeightMismatch,
    initialise,
    read_backbone_weights,
    read_official,
)
from solq_lab.schema import DataSection, ModelSection

if TYPE_CHECKING:
    from solq_lab.models.backbone import Backbone

log = logging.getLogger(__name__)


def build_codec(experiment: Experiment, *, tables: Mapping[str, Tensor] | None = None) -> MaskCodec | None:
    """The mask codec in evaluation mode, or None for a plain detector.

    Args:
        experiment: section `codec` is read.
        tables: the tables of a fitted codec or the decoder that was learnt, as a weights file holds them; without them
            `codec.artifact` is read, or the decoder is the DCT's.

    Raises:
        ConfigError: the artifact is missing, damaged, or holds another codec.
    """
    codec = new_codec(experiment)
    if codec is None:
        return None
    if isinstance(codec, FittedCodec):
        try:
            if tables:
                codec.load_state_dict(tables)
            else:
                load_tables(codec, experiment.codec.artifact)
        except (ArtifactError, RuntimeError) as error:  # RuntimeError: tables of other names or sizes
            raise ConfigError(f"codec.artifact: {error}") from None
    if isinstance(codec, LearnedDCTCodec) and tables:
        codec.decoder = tables[LEARNED_DECODER]
    return codec.eval()


def new_codec(experiment: Experiment) -> MaskCodec | None:
    """The mask codec, without tables where it has to be fitted; None for a plain detector."""
    section = experiment.codec
    if section.kind == "none":
        return None
    try:
        codec = CODECS[section.kind].build(**section.model_dump(exclude={"kind", "artifact", "threshold"}))
    except ValueError as error:  # sizes that this kind cannot have
        raise ConfigError(f"codec.kind={section.kind}: {error}") from None
    if section.threshold is not None:
        codec.threshold = section.threshold
    return codec


def build_backbone(model: ModelSection) -> Backbone:
    """The backbone, freshly initialised, with the maps that the network reads."""
    spec = backbone_spec(model.backbone)
    return spec.build(dilation=model.dilation, c5_only=model.levels == 1, c2=model.mask_look > 0)


def build_model(experiment: Experiment, num_classes: int, *, pretrained: bool = False) -> SOLQ:
    """The network on the CPU, freshly initialised.

    Args:
        experiment: sections `model` and `codec` are read, `loss.vector_layers` and `train.freeze_detector`.
        num_classes: number S of class channels.
        pretrained: load `model.pretrained`, as a training does: ImageNet weights of the backbone, or a file of a
            backbone or of a whole detector.

    Raises:
        WeightMismatch: the file cannot be read, or nothing in it fits.
        ConfigError: ImageNet weights are not there, or the backbone needs a package that is not installed.
    """
    start = None if not pretrained or experiment.model.pretrained == "none" else _file_to_start_from(experiment.model)
    network = _build_network(experiment, num_classes)
    if start is not None:
        _start_from_file(network, start)
    return network


def _build_network(experiment: Experiment, num_classes: int) -> SOLQ:
    model, codec = experiment.model, experiment.codec
    try:
        backbone = build_backbone(model)
    except (ValueError, ImportError) as error:  # a name that timm does not know, no timm
        raise ConfigError(f"model.backbone={model.backbone}: {error}") from None

    sizes = model.model_dump(exclude={"backbone", "pretrained", "dilation", "mask_branch", "mask_detail"})
    match model.mask_branch:
        case "sqr":
            frozen = experiment.train.freeze_detector
            return SQRDetector(backbone, num_classes, detail=model.mask_detail, freeze_detector=frozen, **sizes)
        case "none":
            vector_dim = None if codec.kind == "none" else codec.vector_dim
            decoder = getattr(new_codec(experiment), "decoder", None) if codec.learn_decoder else None
            sizes |= {"vector_layers": experiment.loss.vector_layers, "mask_decoder": decoder}
            return SOLQ(backbone, num_classes, vector_dim=vector_dim, **sizes)


def _file_to_start_from(model: ModelSection) -> Path:
    if model.pretrained != "imagenet":
        return Path(model.pretrained)

    where = f"model.backbone={model.backbone}, model.pretrained=imagenet"
    if model.backbone not in IMAGENET:
        raise ConfigError(
            f"{where}: no ImageNet weights are fetched for it; name their file (huggingface.co/timm has those of timm) "
            "as model.pretrained, or set pretrained: none"
        )
    path = cached_file(model.backbone)
    if not path.exists():
        raise ConfigError(
            f"{where}: they are not at {path}; `solq-lab download-weights {model.backbone}` fetches them. Or start "
            "without them: model.pretrained=none"
        )
    return path


def _start_from_file(network: SOLQ, path: Path) -> None:
    """Load what fits from a detector's file, or the backbone from a classifier's."""
    frozen = isinstance(network, SQRDetector) and network.freeze_detector
    names = read_official(path).state.keys()
    if frozen:  # it must not keep a freshly initialised tensor
        fresh = [name for name in initialise(network, path).missing if not name.startswith("mask_branch.")]
        if fresh:
            raise WeightMismatch(
                f"{path}: {len(fresh)} tensors of the frozen detector are not in it, the first is {fresh[0]}; give the "
                "weights of a detector of this very size and these classes, or set train.freeze_detector: false"
            )
    elif is_official(names) or not names.isdisjoint(network.state_dict()):
        initialise(network, path)
    else:
        backbone = network.backbone
        backbone.load_state_dict(read_backbone_weights(path, backbone.state_dict()))


def build_dataset(
    experiment: Experiment,
    split: Literal["train", "val"],
    classes: ClassMap | None = None,
    *,
    with_masks: bool = False,
) -> CocoDataset:
    """Images and targets of one split; training targets include masks.

    Args:
        experiment: sections `data` and `codec`, `model.mask_branch` and the seed are read.
        split: "train" augments, "val" only resizes.
        classes: the class map of the training, or of a trained model; None: of this split's annotations.
        with_masks: include masks in validation targets; evaluation does not need them, figures do.

    Raises:
        ConfigError: `data.root` is empty.
        DataError: a folder or file is missing, the annotations are not COCO, or there is no object to train on.
    """
    data, training = experiment.data, split == "train"
    masks = training or with_masks
    place = split_of(experiment, split)

    mixed = training and data.augment in MIXED
    dataset = (pkgutil.resolve_name(MIXED[data.augment]) if mixed else CocoDataset)(
        place.images,
        place.annotations,
        classes=classes,
        class_ids=data.class_ids,
        num_classes=data.num_classes,
        mask_size=experiment.codec.mask_size if masks and experiment.codec.kind != "none" else None,
        with_bitmaps=masks and experiment.model.mask_branch != "none",
        transform=build_augmentation(data) if training else TestResize(data.test_scale, data.max_size),
        seed=experiment.seed,
        mask_route=data.mask_route,
        cache=data.cache,
        allow_links=data.allow_links,
        orientation=data.orientation,
    )
    if training and not len(dataset.truth):
        raise DataError(f"{place.annotations}: no training image has an object: nothing can be learnt")
    if not len(dataset.truth):
        log.warning("%s: no image has an object: AP is not measured, and no weights are the best", place.annotations)
    return dataset


def build_stream(
    experiment: Experiment, dataset: CocoDataset, *, total_steps: int, start_step: int, accumulate: int
) -> BatchStream:
    """The images of this process, from the next step to the last, `accumulate` batches per step."""
    return BatchStream(
        len(dataset),
        experiment.train.batch_size,
        seed=experiment.seed,
        total_steps=total_steps,
        start_step=start_step,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        accumulate=accumulate,
        aspects=dataset.aspects if experiment.data.bucket_by_aspect else None,
    )


def build_images(experiment: Experiment, classes: ClassMap | None = None) -> CocoDataset:
    """The validation images without resizing, with ground-truth masks for figures.

    Raises:
        ConfigError, DataError: as in `build_dataset`.
    """
    data, place = experiment.data, split_of(experiment, "val")
    return CocoDataset(
        place.images,
        place.annotations,
        classes=classes,
        class_ids=data.class_ids,
        num_classes=data.num_classes,
        mask_size=experiment.codec.mask_size,
        allow_links=data.allow_links,
        orientation=data.orientation,
    )


def build_augmentation(data: DataSection) -> Transform:
    """The transform of training images; its fields are taken from the keys of the same names."""
    augmentation = pkgutil.resolve_name(AUGMENTATIONS[data.augment])
    return augmentation(**{field.name: getattr(data, field.name) for field in dataclasses.fields(augmentation)})
