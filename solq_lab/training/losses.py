"""The training losses over matched pairs. Paper: eq. 2 (class, L1, GIoU), eq. 5 (mask vectors); SQR's image masks.

Shape letters beside those of `structures`: Z decoder layers, T matched pairs of one layer.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from solq_lab.boxes import cxcywh_to_xyxy, generalized_iou
from solq_lab.codecs.base import MaskCodec
from solq_lab.codecs.dct import LearnedDCTCodec
from solq_lab.models.solq import SOLQ
from solq_lab.schema import Experiment, LossSection
from solq_lab.structures import ImageMasks, LayerPrediction, Predictions, Target
from solq_lab.training.decoded import MatchedVectors, coefficients_in_band
from solq_lab.training.focal import quality_focal_loss, sigmoid_focal_loss, soft_dice_loss
from solq_lab.training.guests import matched_guests
from solq_lab.training.matcher import HungarianMatcher, Matches, Matching

PROPOSAL_TERMS = ("class", "l1", "giou")  # of the encoder's proposals, which have no mask vectors
QUALITY_GAMMA = 1.5  # DEIM's


class Objects(NamedTuple):
    """All objects of a batch, the images' one after the other."""

    labels: Tensor  # (K,) int64 class channels
    boxes: Tensor  # (K, 4) (cx, cy, w, h), normalised image
    masks: Tensor | None  # (K, N, N) bool in the box frame, or None for a plain detector
    vectors: Tensor | None  # (K, D) mask vectors, or None
    band: Tensor | None = None  # (K, D) bool, coefficients within the band limit; None without one


class MatchedLayers(NamedTuple):
    """What the terms of the loss compare: Z layers, and the T pairs of each."""

    logits: Tensor  # (Z, B, J, S) of all queries
    boxes: Tensor  # (Z, T, 4) of the matched queries
    true_boxes: Tensor  # (Z, T, 4) of their objects
    # the mask vectors of the pairs in the last layers that have a vector loss; None without any
    vectors: MatchedVectors | None
    matching: Matching
    objects: Objects  # of the batch
    divisor: float  # of sums
    mean_over: float  # number of pairs of the "mean" vector loss


class SetCriterion(nn.Module):
    """Matches predictions to objects and returns the losses by name, none of them weighted yet.

    Names: "class", "l1", "giou", "vector" for the last decoder layer, the same with "/0", "/1", ... for earlier layers,
    with "/proposals" for the encoder's proposals, and with "/guests", "/guests/0", ... for denoising guests; "mask" and
    "dice" where there is a mask branch, which follows the last layer alone. The names depend on the model alone, never
    on the batch, and a loss without pairs is a zero that still reaches the predictions: under DDP all ranks reduce the
    same parameters.

    Everything is computed in float32 at least, outside autocast.

    Args:
        codec: gives the target vectors, and by its `loss` the default kind of vector loss; None for a plain detector.
        matcher: assigns queries to objects.
        settings: weights and kinds of the losses, an experiment's section `loss`.
        vector_std: standard deviations (D,) of the training vectors, for units of "std"; kept as it is, not copied.

    Raises:
        ValueError: a codec with another loss than "l1" and "l2_dice", or units of "std" without `vector_std`.
    """

    def __init__(
        self,
        codec: MaskCodec | None,
        matcher: HungarianMatcher,
        settings: LossSection = LossSection(),  # noqa: B008 - a constant
        *,
        vector_std: Tensor | None = None,
    ) -> None:
        super().__init__()
        if codec is not None and codec.loss not in ("l1", "l2_dice"):
            raise ValueError(f"{type(codec).__name__}.loss {codec.loss!r}: allowed are 'l1' and 'l2_dice'")
        if settings.vector_units == "std" and vector_std is None:
            raise ValueError("vector_units 'std' needs vector_std, of a model built with standardise_vectors")
        self.codec, self.matcher, self.settings = codec, matcher, settings
        self.vector_kind = codec.loss if codec is not None and settings.vector_kind == "codec" else settings.vector_kind
        self.vector_std = vector_std if settings.vector_units == "std" else None  # the model's own, on its device
        self.weights: dict[str, float] = {
            name: getattr(settings, f"{name}_weight") for name in ("class", "l1", "giou", "vector", "mask", "dice")
        }
        # A new term of every layer is a method (MatchedLayers) -> (Z,), a line here, and its weight above.
        self.terms = {"class": self._class_loss, "l1": self._l1_loss, "giou": self._giou_loss}
        if codec is not None:
            self.terms["vector"] = self._vector_loss
        if codec is not None and settings.decoded_dice_weight > 0:
            self.terms["vector_dice"] = self._decoded_dice_loss
            self.weights["vector_dice"] = settings.decoded_dice_weight
        if codec is not None and settings.outline_dice_weight > 0:
            self.terms["outline_dice"] = partial(self._decoded_dice_loss, near_outlines=True)
            self.weights["outline_dice"] = settings.outline_dice_weight

    def forward(
        self,
        predictions: Predictions,
        targets: Sequence[Target],
        *,
        num_boxes: float | None = None,
        matches: Matches | None = None,
    ) -> dict[str, Tensor]:
        """The unweighted losses of one batch, scalars by name.

        Args:
            predictions: of a batch of B images.
            targets: B targets on the same device; with `masks` where there is a codec, with `bitmaps` where the
                predictions have masks.
            num_boxes: objects of the global batch divided by the number of processes, when there are several. The mean
                vector loss is then taken over the global batch too: n processes of B images each have, on average,
                the losses of one process with n*B images. None: the objects of this batch, and the mean over its own
                pairs, as the released models were trained in every process. The two means differ only where an image
                has more objects than queries, because an object without a query has no pair.
            matches: where they are matched already, as in training before mask vectors are made.

        Raises:
            MatchingError: the targets are not one per image.
            NonFiniteCostError: a cost of the matching is not finite.
            ValueError: targets or predictions do not fit the codec.
        """
        with torch.autocast(predictions.layers[0].logits.device.type, enabled=False):
            objects = self._gather_objects(predictions, targets)
            matches = self.matcher(predictions, targets) if matches is None else matches
            count = max(float(len(objects.labels)) if num_boxes is None else num_boxes, 1.0)

            layers = self._match_layers(predictions.layers, matches.layers, objects, count)
            if num_boxes is None:
                layers = layers._replace(mean_over=max(float(len(matches.layers.images)), 1.0))
            losses = _name_by_layer({name: term(layers) for name, term in self.terms.items()}, len(predictions.layers))
            if predictions.layers[-1].masks is not None:
                losses |= self._mask_losses(predictions.layers[-1].masks, matches.layers, targets, count)

            if predictions.guests is not None:
                guest_layers, pairs = matched_guests(predictions.guests, predictions)
                guests = self._match_layers(guest_layers, pairs, objects, count * predictions.guests.groups)
                found = _name_by_layer({name: term(guests) for name, term in self.terms.items()}, len(guest_layers))
                losses |= {"{}/guests{}{}".format(*name.partition("/")): loss for name, loss in found.items()}

            if predictions.proposals is not None:
                assert matches.proposals is not None  # the matcher matches proposals where there are any
                if not predictions.proposals_have_classes:
                    objects = objects._replace(labels=torch.zeros_like(objects.labels))
                share = count * self.matcher.proposals_per_object
                proposals = self._match_layers([predictions.proposals], matches.proposals, objects, share)
                losses |= {f"{name}/proposals": self.terms[name](proposals).squeeze(0) for name in PROPOSAL_TERMS}
        return losses

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """The weighted sum of what `forward` returned, the scalar to differentiate; all layers weigh the same."""
        return torch.stack([self.weights[name.partition("/")[0]] * loss for name, loss in losses.items()]).sum()

    def _gather_objects(self, predictions: Predictions, targets: Sequence[Target]) -> Objects:
        labels = torch.cat([target.labels for target in targets])
        boxes = torch.cat([target.boxes for target in targets])
        if self.codec is None:
            return Objects(labels, boxes, None, None)

        by_image = []
        for target in targets:
            found = None if target.masks is None else tuple(target.masks.shape)
            allowed = (len(target.labels), self.codec.mask_size, self.codec.mask_size)
            if target.masks is None or found != allowed:
                raise ValueError(f"image {target.image_id}: masks {found} do not fit the codec, which wants {allowed}")
            by_image.append(target.masks)

        for index, layer in list(enumerate(predictions.layers))[-self.settings.vector_layers :]:
            length, expected = None if layer.vectors is None else layer.vectors.shape[-1], self.codec.vector_dim
            if length != expected:
                raise ValueError(
                    f"decoder layer {index} predicts vectors of length {length}, the codec has {expected}; "
                    "build the model with the codec's vector_dim"
                )

        masks = torch.cat(by_image)
        limit = self.settings.band_limit
        with torch.no_grad():
            band = coefficients_in_band(self.codec, targets, limit) if limit else None
            return Objects(labels, boxes, masks, self.codec.encode(masks), band)

    def _match_layers(
        self, layers: Sequence[LayerPrediction], matching: Matching, objects: Objects, count: float
    ) -> MatchedLayers:
        boxes = _at_least_float32(_matched(torch.stack([layer.boxes for layer in layers]), matching))  # (Z, T, 4)
        logits = _at_least_float32(torch.stack([layer.logits for layer in layers]))  # (Z, B, J, S)
        true_boxes = objects.boxes[matching.objects].to(boxes.dtype)
        vectors = self._match_vectors(layers, matching, objects, boxes, true_boxes)
        return MatchedLayers(logits, boxes, true_boxes, vectors, matching, objects, count, mean_over=count)

    def _match_vectors(
        self, layers: Sequence[LayerPrediction], matching: Matching, objects: Objects, boxes: Tensor, true_boxes: Tensor
    ) -> MatchedVectors | None:
        """The matched vectors of the last `vector_layers` layers; `boxes` and `true_boxes` (Z, T, 4) of all layers."""
        vectors = [layer.vectors for layer in layers[-self.settings.vector_layers :] if layer.vectors is not None]
        if not vectors or self.codec is None:
            return None
        assert objects.masks is not None  # `_gather_objects` has looked
        assert objects.vectors is not None

        depth, rows = len(vectors), matching.objects[-len(vectors) :]  # (Z, T)
        matching = matching._replace(queries=matching.queries[-depth:], objects=rows)
        predicted = _at_least_float32(_matched(torch.stack(vectors), matching))
        return MatchedVectors(
            self.codec,
            predicted,
            objects.vectors[rows].to(predicted.dtype),
            boxes[-depth:],
            true_boxes[-depth:],
            objects.masks[rows],
            in_predicted_frame=self.settings.vector_frame == "predicted",
            band=None if objects.band is None else objects.band[rows],
            tail_drop=self.settings.tail_drop,
        )

    def _class_loss(self, layers: MatchedLayers) -> Tensor:
        """Focal loss (Z,) of all queries; those without an object are to have no class.

        With class_loss "quality" a query's class is to have the IoU of its mask with its object's as score, not 1; not
        that of proposals, which have no masks.
        """
        logits, matching = layers.logits, layers.matching
        truth = torch.zeros_like(logits)
        index = torch.arange(len(logits), device=logits.device)[:, None]
        present = (index, matching.images, matching.queries, layers.objects.labels[matching.objects])
        truth.index_put_(present, truth.new_ones(()))  # `= 1.0` would be a copy from the host, which waits
        if self.settings.class_loss == "quality" and layers.vectors is not None:
            quality = torch.zeros_like(logits).index_put_(present, layers.vectors.quality().to(logits.dtype))
            focal = quality_focal_loss(logits, truth, quality, gamma=QUALITY_GAMMA)
        else:
            focal = sigmoid_focal_loss(logits, truth, alpha=self.settings.focal_alpha, gamma=self.settings.focal_gamma)
        return focal.sum((1, 2, 3)) / layers.divisor

    def _l1_loss(self, layers: MatchedLayers) -> Tensor:
        """L1 distance (Z,) of matched boxes."""
        return (layers.boxes - layers.true_boxes).abs().sum((1, 2)) / layers.divisor

    def _giou_loss(self, layers: MatchedLayers) -> Tensor:
        """One minus the generalised IoU (Z,) of matched boxes."""
        overlap = generalized_iou(cxcywh_to_xyxy(layers.boxes), cxcywh_to_xyxy(layers.true_boxes))  # (Z, T)
        return (1 - overlap).sum(1) / layers.divisor

    def _vector_loss(self, layers: MatchedLayers) -> Tensor:
        """Distance of matched mask vectors in the last `vector_layers` layers, a tensor of that length.

        "l1" and "smooth_l1" take the mean over pairs and coefficients, or with vector_normalisation "num_boxes" the sum
        over both by the number of boxes; "l2" and "l2_dice" always the mean over coefficients and the sum over pairs by
        the number of boxes.
        """
        vectors = layers.vectors
        assert vectors is not None  # no such term without a codec
        distance = vectors.distance(self.vector_kind, self.vector_std)  # (Z,)
        dim = vectors.codec.vector_dim
        if self.vector_kind in ("l2", "l2_dice"):
            squared = distance / dim
            return (squared + vectors.dice() if self.vector_kind == "l2_dice" else squared) / layers.divisor
        return distance / (layers.mean_over * dim if self.settings.vector_normalisation == "mean" else layers.divisor)

    def _decoded_dice_loss(self, layers: MatchedLayers, *, near_outlines: bool = False) -> Tensor:
        """Dice loss of what matched vectors decode to, of the same layers as the vector loss."""
        assert layers.vectors is not None
        return layers.vectors.dice(near_outlines=near_outlines) / layers.divisor

    def _mask_losses(
        self, masks: ImageMasks, matching: Matching, targets: Sequence[Target], count: float
    ) -> dict[str, Tensor]:
        """Focal and dice loss of the last layer's masks, at the padded size of the images, padding included."""
        padded_size = masks.padding.shape[-2], masks.padding.shape[-1]
        truth = _gather_bitmaps(targets, padded_size)[matching.objects[-1]]  # (T, H, W)
        logits = _at_least_float32(masks.logits[matching.images, matching.queries[-1]])  # (T, h, w)
        logits = F.interpolate(logits.unsqueeze(1), size=padded_size, mode="bilinear").flatten(1)  # (T, H*W)
        truth = truth.flatten(1).to(logits.dtype)
        focal = sigmoid_focal_loss(logits, truth, alpha=self.settings.focal_alpha, gamma=self.settings.focal_gamma)
        return {"mask": focal.mean(1).sum() / count, "dice": soft_dice_loss(logits.sigmoid(), truth).sum() / count}


def build_criterion(experiment: Experiment, codec: MaskCodec | None, model: nn.Module | None = None) -> SetCriterion:
    """The criterion of an experiment, in training mode: the released PCA codec adds noise there.

    Args:
        experiment: gives weights and kinds.
        codec: gives the target vectors; None for a plain detector.
        model: that is trained; units of std, and a decoder that is learnt, are its own. None: there are none.
    """
    if isinstance(codec, LearnedDCTCodec) and isinstance(model, SOLQ) and model.mask_decoder is not None:
        codec.decoder = model.mask_decoder
    loss, costs = experiment.loss, experiment.matcher.model_dump()
    costs |= {key: getattr(loss, key) for key in ("focal_alpha", "focal_gamma", "proposals_per_object")}
    return SetCriterion(codec, HungarianMatcher(**costs), loss, vector_std=getattr(model, "vector_std", None)).train()


def _gather_bitmaps(targets: Sequence[Target], padded_size: tuple[int, int]) -> Tensor:
    """(K, H, W) bool: the objects' masks of all images, padded like the images.

    Raises:
        ValueError: an image has none, or of another size than itself.
    """
    bitmaps = []
    for target in targets:
        found = None if target.bitmaps is None else tuple(target.bitmaps.shape)
        allowed = (len(target.labels), *target.image_size)
        if target.bitmaps is None or found != allowed:
            raise ValueError(f"image {target.image_id}: bitmaps {found} do not fit the mask branch, expected {allowed}")
        height, width = target.image_size
        bitmaps.append(F.pad(target.bitmaps, (0, padded_size[1] - width, 0, padded_size[0] - height)))
    return torch.cat(bitmaps)


def _matched(values: Tensor, matching: Matching) -> Tensor:
    """(Z, T, ...): the rows of values (Z, B, J, ...) that the matching picks."""
    layers = torch.arange(len(values), device=values.device)[:, None]
    return values[layers, matching.images, matching.queries]


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _name_by_layer(by_term: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Scalars by name from tensors of one value for each of the last decoder layers."""
    suffixes = [f"/{index}" for index in range(depth - 1)] + [""]
    return {
        term + suffix: value
        for term, values in by_term.items()
        for suffix, value in zip(suffixes[depth - len(values) :], values.unbind(), strict=True)
    }
