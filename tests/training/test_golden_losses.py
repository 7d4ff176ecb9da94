"""Assignments, losses, gradients and detections of every golden model folder, in float64 and in float32.

Each fixture says how far its float32 numbers are from the released model in float64 (`float64_check`). Our float64 run
has to stay within ten times that, our float32 run within fifty times.
"""

import copy
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import golden_folder
from golden import Fixture, fixtures
from pycocotools import mask as coco_mask
from torch import Tensor

from solq_lab.codecs.dct import DCTCodec
from solq_lab.inference.postprocess import postprocess
from solq_lab.masks import crop_and_resize, rle_iou
from solq_lab.models.weights import to_official_state
from solq_lab.schema import LossSection
from solq_lab.structures import Detections, Predictions, Target
from solq_lab.training.losses import SetCriterion
from solq_lab.training.matcher import HungarianMatcher, Matches

pytestmark = pytest.mark.golden

FACTOR = {torch.float64: 10.0, torch.float32: 50.0}  # times the fixture's own float32 noise
TIE = 1e-6  # scores this close may come in any order
TERMS = {"loss_ce": "class", "loss_bbox": "l1", "loss_giou": "giou", "loss_vector": "vector"}
TERMS |= {"loss_mask": "mask", "loss_dice": "dice"}
# In float32 a ReLU, or a sample between two cells, that lies on its kink may fall to its other side when sums are taken
# in another order (another number of threads is enough). So many of the gradients may be off, by up to so much.
KINKED, KINK = 0.1, 3e-3
ROUNDING = 1e-5  # lengths of a gradient below this are noise: a bias before a norm of single channels has none

FOLDERS = fixtures(golden_folder())
CASES = [(Fixture(folder), dtype) for folder in FOLDERS for dtype in FACTOR]


class Replay:
    """A golden model run by us: one forward pass, its losses and their gradients, shared by the tests below."""

    def __init__(self, fixture: Fixture, dtype: torch.dtype) -> None:
        self.fixture, self.record, self.dtype = fixture, fixture.record, dtype
        self.factor, self.noise = FACTOR[dtype], fixture.noise
        self.codec = DCTCodec(fixture.args["gt_mask_len"], fixture.args["n_keep"])
        if not fixture.args["with_vector"]:
            self.codec = None
        self.criterion = build_criterion(fixture.args, self.codec)
        self.targets = build_targets(fixture)
        self.model = fixture.build_model(dtype)
        self.predictions: Predictions = self.model(fixture.images(dtype))

    @cached_property
    def matches(self) -> Matches:
        return self.criterion.matcher(self.predictions, self.targets)

    @cached_property
    def losses(self) -> dict[str, Tensor]:
        return self.criterion(self.predictions, self.targets)

    @cached_property
    def gradients(self) -> dict[str, Tensor]:
        """By the released model's names, all of them; parameters without a gradient are missing."""
        self.model.zero_grad()
        self.criterion.total(self.losses).backward(retain_graph=True)
        by_name = {name: parameter.grad for name, parameter in self.model.named_parameters(remove_duplicate=False)}
        filled = {name: torch.full_like(value, torch.nan) for name, value in self.model.state_dict().items()}
        filled |= {name: gradient for name, gradient in by_name.items() if gradient is not None}
        official = to_official_state(filled, refine_boxes=self.fixture.args["with_box_refine"])
        return {name: gradient for name, gradient in official.items() if not gradient.isnan().any()}

    @cached_property
    def detections(self) -> list[Detections]:
        sizes = [tuple(size) for size in self.record["target_sizes_hw"]]
        names = [str(channel) for channel in range(self.fixture.num_classes)]
        return postprocess(self.predictions.layers[-1], sizes, self.codec, top_k=100, class_names=names)


def build_criterion(args: dict, codec: DCTCodec | None) -> SetCriterion:
    matcher = HungarianMatcher(
        class_cost=args["set_cost_class"],
        l1_cost=args["set_cost_bbox"],
        giou_cost=args["set_cost_giou"],
        focal_alpha=0.25,
        focal_gamma=2.0,
    )
    settings = LossSection(
        class_weight=args["cls_loss_coef"],
        l1_weight=args["bbox_loss_coef"],
        giou_weight=args["giou_loss_coef"],
        vector_weight=args["vector_loss_coef"],
        vector_layers=max(1, args["dec_layers"] - args["vector_start_stage"]),
        vector_normalisation="num_boxes" if args["no_vector_loss_norm"] else "mean",
        mask_weight=args["mask_loss_coef"],
        dice_weight=args["dice_loss_coef"],
        focal_alpha=args["focal_alpha"],
    )
    return SetCriterion(codec, matcher, settings)


def build_targets(fixture: Fixture) -> list[Target]:
    """The targets with bitmaps, and masks cropped the released way: ROI-align at network size, at least one half.

    The released bitmaps are padded like the images, so that a cell on the inner border of the padding sees zeros.
    """
    side = fixture.args["gt_mask_len"]
    height, width = fixture.images().padding.shape[1:]
    targets = []
    for number, target in enumerate(fixture.targets):
        bitmaps = fixture.bitmaps(number)
        padded = F.pad(bitmaps, (0, width - bitmaps.shape[2], 0, height - bitmaps.shape[1]))
        masks = crop_and_resize(padded, fixture.boxes_xyxy(number), side) >= 0.5
        targets.append(target._replace(masks=masks, bitmaps=bitmaps.bool()))
    return targets


def without_objects(target: Target) -> Target:
    none = {name: getattr(target, name)[:0] for name in ("labels", "boxes", "masks", "bitmaps")}
    return target._replace(**none)


def name_of(case: tuple[Fixture, torch.dtype]) -> str:
    return f"{case[0].name}-{str(case[1]).removeprefix('torch.')}"


def is_heavy(case: tuple[Fixture, torch.dtype]) -> bool:
    """Whether a backward pass takes the better part of a minute."""
    return case[1] == torch.float64 and case[0].args["num_queries"] > 100


each_case = pytest.mark.parametrize("replay", CASES, ids=name_of, indirect=True)
each_case_heavy_ones_slow = pytest.mark.parametrize(
    "replay",
    [pytest.param(case, marks=pytest.mark.slow if is_heavy(case) else ()) for case in CASES],
    ids=name_of,
    indirect=True,
)


@pytest.fixture(scope="module")
def replay(request: pytest.FixtureRequest) -> Replay:
    return Replay(*request.param)


def test_a_golden_folder_was_found(golden_root: Path):
    assert FOLDERS, f"no model folder in {golden_root}"


@each_case
def test_golden_assignments(replay: Replay):
    compare_assignments(replay)


@each_case
def test_golden_losses(replay: Replay):
    compare_losses(replay)


@each_case
def test_golden_detections(replay: Replay):
    compare_detections(replay)


@each_case_heavy_ones_slow
def test_golden_gradients(replay: Replay):
    compare_gradients(replay)


def compare_assignments(replay: Replay) -> None:
    """Queries and objects of each set and image pair up as stored, or at the very same cost (identical queries)."""
    depth = len(replay.predictions.layers)
    sets = {"last": (replay.matches.layers, depth - 1, replay.predictions.layers[-1])}
    sets |= {f"aux_{i}": (replay.matches.layers, i, replay.predictions.layers[i]) for i in range(depth - 1)}
    if replay.matches.proposals is not None:
        sets["enc"] = (replay.matches.proposals, 0, replay.predictions.proposals)
    assert set(replay.record["hungarian"]) == set(sets)
    for name, stored in replay.record["hungarian"].items():
        matching, layer, prediction = sets[name]
        first = 0
        for image, (queries, objects) in enumerate(stored):
            mine = matching.images == image
            ours = dict(
                zip(
                    (matching.objects[layer][mine] - first).tolist(),
                    matching.queries[layer][mine].tolist(),
                    strict=True,
                )
            )
            theirs = dict(zip(objects, queries, strict=True))
            first += len(replay.targets[image].labels)
            assert sorted(ours) == sorted(theirs), f"{name}, image {image}: objects {sorted(ours)} != {sorted(theirs)}"
            for number, query in theirs.items():
                assert query == ours[number] or same_answer(prediction, image, query, ours[number]), (
                    f"{name}, image {image}, object {number}: query {ours[number]}, stored {query}"
                )


def same_answer(prediction, image: int, first: int, second: int) -> bool:
    """Two-stage queries from proposals that tie exactly are the same query twice."""
    return torch.allclose(prediction.boxes[image, first], prediction.boxes[image, second], rtol=0, atol=1e-6) and (
        torch.allclose(prediction.logits[image, first], prediction.logits[image, second], rtol=0, atol=1e-5)
    )


def compare_losses(replay: Replay) -> None:
    compare_named_losses(replay, replay.losses, replay.record["losses"])
    if "losses_all_images_empty" in replay.record:
        empty = replay.criterion(replay.predictions, [without_objects(target) for target in replay.targets])
        compare_named_losses(replay, empty, replay.record["losses_all_images_empty"])
    close("total_loss", replay.criterion.total(replay.losses), replay.record["total_loss"], loss_tolerance(replay))


def compare_named_losses(replay: Replay, losses: dict[str, Tensor], stored: dict[str, float]) -> None:
    named = {}
    for name, loss in losses.items():
        term, _, suffix = name.partition("/")
        official = next(key for key, ours in TERMS.items() if ours == term)
        suffix = {"": "", "proposals": "_enc"}.get(suffix, f"_{suffix}")
        # the released vector loss carries its coefficient inside
        named[official + suffix] = loss * (replay.criterion.weights["vector"] if term == "vector" else 1.0)
    logged_only = {key for key in stored if key.startswith(("class_error", "cardinality_error"))}
    assert set(named) == set(stored) - logged_only
    for name, loss in named.items():
        close(name, loss, stored[name], loss_tolerance(replay))


def loss_tolerance(replay: Replay) -> float:
    return replay.factor * replay.noise["losses_max_rel"]


def compare_gradients(replay: Replay) -> None:
    tolerance = replay.factor * replay.noise["grad_l2_max_rel"]
    errors, squares = {}, 0.0
    assert replay.record["gradients"], "no gradients stored"
    for name, stored in replay.record["gradients"].items():
        gradient = replay.gradients.get(name)
        if stored is None:
            assert gradient is None, f"{name}: has a gradient, the released parameter has none"
            continue
        assert gradient is not None, f"{name}: has no gradient"
        gradient = gradient.double().flatten()
        errors[name] = gradient_error(gradient, stored)
        squares += float(gradient.square().sum())
    close("total_grad_l2", squares**0.5, replay.record["total_grad_l2"], tolerance)
    beyond = {name: error for name, error in errors.items() if not error <= tolerance}
    few = replay.dtype == torch.float32 and len(beyond) <= KINKED * len(errors)
    wrong = {name: error for name, error in beyond.items() if not (few and error <= KINK)}
    assert not wrong, f"relative errors of gradients, allowed {tolerance:.2e}: {wrong}"


def gradient_error(gradient: Tensor, stored: dict) -> float:
    """How far length, sum and first values are off, relative to the length; sum and values may be off thrice as far."""
    first = gradient[:8] - torch.tensor(stored["first8"], dtype=torch.float64)
    sum_reach = gradient.numel() ** 0.5  # of errors that all have one sign
    errors = (
        gradient.norm() - stored["l2"],
        (gradient.sum() - stored["sum"]) / (3 * sum_reach),
        first.abs().max() / 3,
    )
    return max(abs(float(error)) for error in errors) / max(stored["l2"], ROUNDING)


def compare_detections(replay: Replay) -> None:
    arrays = replay.fixture.arrays
    score_tolerance = replay.factor * replay.noise["pred_logits_maxabs"] / 4  # a sigmoid's slope is at most 1/4
    box_tolerance = replay.factor * replay.noise["pred_boxes_maxabs"] * 1.5  # a corner is centre and half a side
    for image, ours in enumerate(replay.detections):
        height, width = replay.record["target_sizes_hw"][image]
        scores, labels, boxes = (arrays[f"post_{key}"][image] for key in ("scores", "labels", "boxes"))
        close(f"image {image}: scores", ours.scores, scores, score_tolerance, scale=1.0)
        scale = np.array([width, height, width, height])
        partner = pair_up(ours, scores, labels, boxes / scale, scale, score_tolerance + TIE, box_tolerance)
        tied_at_the_end = scores <= scores[-1] + score_tolerance + TIE
        missing = [row for row in range(len(scores)) if row not in partner and not tied_at_the_end[row]]
        assert not missing, f"image {image}: ranks {missing} are not among our detections"
        masks = [ours.masks[mine] for mine in partner.values()]
        overlap = rle_iou(masks, [replay.record["masks_rle"][image][row] for row in partner]).mean()
        assert overlap >= 0.999, f"image {image}: mean IoU of the masks is {overlap}"
        areas = coco_mask.area(masks).astype(np.int64)
        stored_areas = arrays["mask_areas"][image][list(partner)]
        assert np.abs(areas - stored_areas).sum() <= 0.002 * stored_areas.sum(), f"image {image}: mask areas"


def pair_up(
    ours: Detections, scores, labels, boxes, scale, score_tolerance: float, box_tolerance: float
) -> dict[int, int]:
    """Stored rank -> our rank, of the same label, score and box (relative to the image)."""
    our_boxes = ours.boxes.numpy() / scale
    free = np.ones(len(ours.scores), dtype=bool)
    partner = {}
    for row, (score, label, box) in enumerate(zip(scores, labels, boxes, strict=True)):
        same = free & (ours.labels.numpy() == label) & (np.abs(ours.scores.numpy() - score) <= score_tolerance)
        distance = np.where(same, np.abs(our_boxes - box).max(axis=1), np.inf)
        best = int(distance.argmin())
        if distance[best] <= box_tolerance + 1e-6:  # float32 pixels of the stored boxes
            partner[row], free[best] = best, False
    return partner


def close(name: str, ours, stored, tolerance: float, *, scale: float | None = None) -> None:
    """Fail, and say what differs, where |ours - stored| exceeds `tolerance` times `scale` (None: times |stored|)."""
    ours = torch.as_tensor(ours).detach().double().cpu().numpy()
    stored = np.asarray(stored, dtype=np.float64)
    bound = tolerance * (np.abs(stored) if scale is None else scale)
    worst = np.max(np.abs(ours - stored) - bound, initial=-np.inf)
    assert np.shape(ours) == np.shape(stored), f"{name}: shape {np.shape(ours)}, stored {np.shape(stored)}"
    assert worst <= 0, f"{name}: {ours}, stored {stored}, off by more than {tolerance:.2e} x {scale or 'itself'}"


def scale_entry(numbers: dict, key: str) -> None:
    numbers[key] *= 1.1


def swap_queries(images: list) -> None:
    queries = max((queries for queries, _ in images), key=len)
    queries[0], queries[1] = queries[1], queries[0]


def change_gradient(record: dict, what: str) -> None:
    name = [name for name, stored in record["gradients"].items() if stored][-1]
    stored = record["gradients"][name]
    if what == "first8":
        stored["first8"][0] += stored["l2"] / 10
    elif what == "null":
        record["gradients"][name] = None
    else:
        stored[what] *= 1.1


def invert_mask(rles: list[dict]) -> None:
    rles[0] = coco_mask.encode(np.asfortranarray(1 - coco_mask.decode(rles[0])))


PERTURBED = {
    "a loss": (compare_losses, lambda record, _: scale_entry(record["losses"], "loss_giou")),
    "a vector loss": (compare_losses, lambda record, _: scale_entry(record["losses"], "loss_vector")),
    "the total": (compare_losses, lambda record, _: scale_entry(record, "total_loss")),
    "an assignment": (compare_assignments, lambda record, _: swap_queries(record["hungarian"]["last"])),
    "a gradient": (compare_gradients, lambda record, _: change_gradient(record, "l2")),
    "a value of a gradient": (compare_gradients, lambda record, _: change_gradient(record, "first8")),
    "an absent gradient": (compare_gradients, lambda record, _: change_gradient(record, "null")),
    "a score": (compare_detections, lambda _, arrays: arrays["post_scores"].__setitem__((0, 3), 0.5)),
    "a label": (compare_detections, lambda _, arrays: arrays["post_labels"].__setitem__((-1, 0), -1)),
    "a box": (compare_detections, lambda _, arrays: arrays["post_boxes"].__setitem__((0, 2, 1), -9.0)),
    "a mask": (compare_detections, lambda record, _: invert_mask(record["masks_rle"][-1])),
}


@pytest.fixture(scope="module")
def small_replay() -> Replay:
    if not FOLDERS:
        pytest.skip(f"no golden fixtures at {golden_folder()}")
    return Replay(min((fixture for fixture, _ in CASES), key=lambda fixture: fixture.args["hidden_dim"]), torch.float32)


@pytest.mark.parametrize("what", PERTURBED)
def test_golden_comparison_fails_when_one_stored_number_changes(small_replay: Replay, what: str):
    compare, change = PERTURBED[what]
    compare(small_replay)
    fixture = small_replay.fixture
    record, arrays = fixture.record, fixture.arrays
    try:
        small_replay.record, fixture.arrays = copy.deepcopy(record), {k: v.copy() for k, v in arrays.items()}
        change(small_replay.record, fixture.arrays)
        with pytest.raises(AssertionError):
            compare(small_replay)
    finally:
        small_replay.record, fixture.arrays = record, arrays
