"""Figures are made from data alone, name what they compare, and allow the empty case."""

import dataclasses
import itertools
import math
import subprocess
import sys
import tracemalloc

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.transforms import Bbox
from pycocotools import mask as coco_rle
from scipy.ndimage import maximum_filter
from scipy.spatial.distance import pdist

from solq_lab.boxes import xyxy_to_cxcywh
from solq_lab.codecs.dct import DCTCodec
from solq_lab.data.coco import CocoDataset
from solq_lab.masks import decode_rle, encode_rle
from solq_lab.structures import Detections, Target
from solq_lab.viz.codecs import reconstructions
from solq_lab.viz.curves import ap_by_class, ap_by_size, training_curves
from solq_lab.viz.images import (
    MASK_OPACITY,
    MaskWindow,
    draw_detections,
    ground_truth,
    paint_detections,
    prediction_grid,
)
from solq_lab.viz.labels import MAX_SHOWN, Labels
from solq_lab.viz.style import GREY, METHOD_COLOURS, OBJECT_COLOURS, colours_of, save

SIDE = 40


def grey_image() -> np.ndarray:
    return np.full((SIDE, SIDE, 3), 200, dtype=np.uint8)


def detections(*boxes: tuple[int, int, int, int], masks: bool = True) -> Detections:
    """Rectangles (x0, y0, x1, y1), each a class of its own."""
    bitmaps = torch.zeros(len(boxes), SIDE, SIDE, dtype=torch.bool)
    for bitmap, (x0, y0, x1, y1) in zip(bitmaps, boxes, strict=True):
        bitmap[y0:y1, x0:x1] = True
    count = len(boxes)
    return Detections(
        scores=torch.linspace(0.9, 0.5, count),
        labels=torch.arange(count),
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        queries=torch.arange(count),
        masks=encode_rle(bitmaps) if masks else None,
        names=[f"class {label}" for label in range(count)],
    )


def labels_of(axes) -> Labels | None:
    return next((artist for artist in axes.artists if isinstance(artist, Labels)), None)


def texts(axes) -> list[str]:
    labels = labels_of(axes)
    return [text.get_text() for text in axes.texts] + [text for text, _, _ in (labels.labels if labels else ())]


@pytest.fixture(autouse=True)
def nothing_stays_open():
    yield
    assert plt.get_fignums() == []


# ---- images


def test_ground_truth_puts_box_frame_masks_where_their_boxes_are():
    boxes = torch.tensor([[10.0, 4.0, 30.0, 24.0]])
    target = Target(
        image_id=1,
        labels=torch.tensor([1]),
        boxes=xyxy_to_cxcywh(boxes / SIDE),
        masks=torch.ones(1, 8, 8, dtype=torch.bool),
        image_size=(SIDE, SIDE),
        original_size=(80, 80),
    )
    found = ground_truth(target, ("a", "b"))
    assert found.names == ["b"]
    torch.testing.assert_close(found.boxes, boxes)
    expected = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    expected[4:24, 10:30] = True
    different = decode_rle(found.masks)[0] != expected
    assert different.sum() <= 4  # pasting rounds the corners of a full mask
    assert not different[5:23, 11:29].any()


def test_a_mask_is_a_translucent_fill_of_its_classs_colour():
    figure = draw_detections(grey_image(), detections((10, 10, 30, 30)))
    shown = np.array(figure.axes[0].artists[0].image)
    colour = np.array(to_rgb(OBJECT_COLOURS[0]))
    np.testing.assert_allclose(shown[20, 20], (1 - MASK_OPACITY) * 200 + MASK_OPACITY * 255 * colour, atol=0.5)
    np.testing.assert_array_equal(shown[5, 5], 200)


def test_labels_give_class_and_score_and_titles_are_shown():
    figure = draw_detections(grey_image(), detections((2, 2, 10, 10), (20, 20, 30, 30)), title="two things")
    assert sorted(texts(figure.axes[0])) == ["class 0 0.90", "class 1 0.50"]
    assert figure.axes[0].get_title() == "two things"


@pytest.mark.parametrize("width", [SIDE, 4 * SIDE])
def test_labels_stay_inside_their_image(width):
    corners = detections((0, 0, 3, 3), (SIDE - 3, 0, SIDE, 3), (0, SIDE - 3, 3, SIDE), (SIDE - 3, 9, SIDE, SIDE))
    figure = prediction_grid([(grey_image(), detections(), corners)] * (width // SIDE))
    figure.draw_without_rendering()
    place = figure.axes[2]
    extents = labels_of(place).extents
    assert len(extents) == 4
    assert (extents[:, 0] >= place.bbox.min - 1e-6).all()
    assert (extents[:, 1] <= place.bbox.max + 1e-6).all()


def test_labels_of_objects_in_one_place_do_not_cover_each_other():
    figure = draw_detections(grey_image(), detections((20, 20, 40, 40), (22, 21, 41, 40), (18, 19, 40, 40)))
    for _ in range(2):  # also where a figure is drawn again
        figure.draw_without_rendering()
        extents = [Bbox(extent) for extent in labels_of(figure.axes[0]).extents]
        assert len(extents) == 3
        assert not any(first.overlaps(second) for first, second in itertools.combinations(extents, 2))


def test_a_crowd_has_few_labels_and_one_artist_for_all_outlines():
    def drawn(count):
        figure = draw_detections(grey_image(), detections(*[(x % 30, 3 * x % 30, 36, 38) for x in range(count)]))
        figure.draw_without_rendering()
        return figure.axes[0]

    few, many = drawn(4), drawn(100)
    assert len(labels_of(many).extents) <= MAX_SHOWN < len(texts(many)) == 100
    assert len(many.get_children()) == len(few.get_children())  # 785 ms for two crowds, most of it in artists


def test_names_in_any_script_are_drawn_without_a_word_on_the_terminal():
    code = """
import numpy as np, torch
from solq_lab.structures import Detections
from solq_lab.viz.images import paint_detections
first, box = torch.zeros(1, dtype=torch.long), torch.tensor([[1.0, 1, 9, 9]])
found = Detections(torch.ones(1), first, box, first, None, ["$文_^ع$"])
paint_detections(np.zeros((40, 40, 3), np.uint8), found)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_label_too_long_for_its_image_begins_inside():
    long = dataclasses.replace(
        detections((20, 20, 30, 30)), names=["a class with a name that no image of this size can hold"]
    )
    figure = prediction_grid([(grey_image(), detections(), long)] * 2)
    figure.draw_without_rendering()
    place = figure.axes[2]
    (((left, _), _),) = labels_of(place).extents
    assert place.bbox.xmin - 1e-6 <= left < place.bbox.xmin + 3


def test_the_best_score_lies_on_top():
    figure = draw_detections(grey_image(), detections((5, 5, 25, 25), (5, 5, 25, 25)))
    shown = figure.axes[0].artists[0].image.getpixel((15, 15))
    below, above = (255 * np.array(to_rgb(colour)) for colour in OBJECT_COLOURS[1::-1])
    below = (1 - MASK_OPACITY) * 200 + MASK_OPACITY * below
    np.testing.assert_allclose(shown, (1 - MASK_OPACITY) * below + MASK_OPACITY * above, atol=1)


@pytest.mark.parametrize("box", [(0, 0, 0, 0), (0, 0, SIDE, SIDE), (3, 0, 4, SIDE), (0, 5, SIDE, 6), (7, 9, 20, 11)])
def test_a_window_is_the_part_of_the_mask_in_its_box(box):
    mask = np.zeros((SIDE, SIDE), dtype=bool)
    x0, y0, x1, y1 = box
    mask[y0:y1, x0:x1] = np.random.default_rng(0).random((y1 - y0, x1 - x0)) < 0.7
    window = MaskWindow.of_rle(encode_rle(torch.from_numpy(mask)[None])[0])
    height, width = window.bitmap.shape
    back = np.zeros_like(mask)
    back[window.top : window.top + height, window.left : window.left + width] = window.bitmap
    np.testing.assert_array_equal(back, mask)
    assert not window.bitmap.size or all(window.bitmap.any(axis=axis)[[0, -1]].all() for axis in (0, 1))


def test_masks_are_laid_over_every_pixel_of_a_painted_photograph_and_no_other():
    """But for its outline, which is found in every fourth pixel: it lies within its own width."""
    mask = np.zeros((1000, 4000), dtype=bool)
    mask[101:903, 53:3947] = True
    mask[400:503, 300:1701] = False
    (rle,) = encode_rle(torch.from_numpy(mask)[None])
    first, box = torch.zeros(1, dtype=torch.long), torch.tensor([[53.0, 101, 3947, 903]])
    pixels = np.random.default_rng(0).integers(0, 256, (*mask.shape, 3), dtype=np.uint8)
    painted = np.asarray(paint_detections(pixels, Detections(torch.ones(1), first, box, first, [rle], [""])))
    colour = 255 * np.array(to_rgb(OBJECT_COLOURS[0]))
    expected = np.where(mask[..., None], (1 - MASK_OPACITY) * pixels + MASK_OPACITY * colour, pixels)
    wrong = (np.abs(painted - expected) > 1).any(axis=2)
    on_edge, near = (maximum_filter(mask, size) & maximum_filter(~mask, size) for size in (3, 23))
    assert not (wrong & ~near)[95:].any()  # below the label; a line's white edge reaches 7.6 pixels from its middle
    assert (np.abs(painted - colour) < 2).all(axis=2)[on_edge].mean() > 0.99


def test_the_objects_of_a_large_photograph_need_little_memory():
    height, width, count = 1500, 2000, 30
    places = range(0, 60 * count, 60)
    outlines = [[x, 100, x + 70, 100, x + 70, 200, x, 200] for x in places]
    masks = [coco_rle.frPyObjects([outline], height, width)[0] for outline in outlines]
    boxes = torch.tensor([[x, 100, x + 70, 200] for x in places]).float()
    found = Detections(torch.ones(count), torch.arange(count), boxes, torch.arange(count), masks, ["x"] * count)
    image = np.zeros((height, width, 3), dtype=np.uint8)
    tracemalloc.start()
    draw_detections(image, found)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * image.nbytes


def test_a_plain_detectors_objects_are_boxes():
    figure = draw_detections(grey_image(), detections((5, 6, 25, 36), masks=False))
    edge, line = figure.axes[0].collections[0].get_segments()
    np.testing.assert_array_equal(edge, line)
    np.testing.assert_array_equal(np.ptp(line, axis=0), (20, 30))


@pytest.mark.parametrize("masks", [True, False])
def test_an_image_without_objects_is_just_an_image(masks):
    figure = draw_detections(grey_image(), detections(masks=masks))
    assert texts(figure.axes[0]) == []
    prediction_grid([(grey_image(), detections(masks=masks), detections(masks=masks))])


def test_a_tensor_is_drawn_like_an_array():
    pixels = np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    drawn = [draw_detections(image, detections()) for image in (pixels, torch.from_numpy(pixels).permute(2, 0, 1))]
    first, second = (np.array(figure.axes[0].artists[0].image) for figure in drawn)
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("image", [np.zeros((4, 4)), np.zeros((4, 4, 3)), torch.zeros(4, 4, 3, dtype=torch.uint8)])
def test_what_is_no_image_is_rejected_with_its_shape_and_type(image):
    with pytest.raises(ValueError, match=r"\(4, 4.* of .*; allowed is"):
        draw_detections(image, detections())


def test_a_grid_shows_image_truth_and_prediction_of_each_example():
    truth, prediction = detections((5, 5, 20, 20)), detections((6, 6, 20, 20))
    figure = prediction_grid([(grey_image(), truth, prediction)] * 3, title="three")
    assert len(figure.axes) == 12  # two rows of two examples; the last place stays empty
    assert [axes.get_title() for axes in figure.axes[:3]] == ["image", "ground truth", "prediction"]
    assert [len(texts(axes)) for axes in figure.axes[:3]] == [0, 1, 1]
    assert [len(axes.artists) for axes in figure.axes[8:]] == [2, 0, 0, 0]
    assert figure.get_suptitle() == "three"


def test_a_grid_of_nothing_is_empty():
    assert all(not axes.artists for axes in prediction_grid([]).axes)


def test_every_class_has_its_own_colour_in_all_images_as_long_as_there_are_enough():
    assert len(set(OBJECT_COLOURS)) == len(OBJECT_COLOURS) >= 24
    assert colours_of([3, 0, len(OBJECT_COLOURS)]) == [OBJECT_COLOURS[3], OBJECT_COLOURS[0], OBJECT_COLOURS[0]]


def test_colours_of_objects_can_be_told_apart():
    linear = np.array([to_rgb(colour) for colour in OBJECT_COLOURS])
    linear = np.where(linear > 0.04045, ((linear + 0.055) / 1.055) ** 2.4, linear / 12.92)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(linear @ to_xyz.T / (0.9505, 1, 1.089)).T  # no colour is so dark that CIELAB is linear
    lab = np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)
    assert pdist(lab).min() > 25  # 2.3 is what an eye can just see


def test_real_images_and_their_masks_can_be_drawn(coco_tiny):
    annotations = coco_tiny / "annotations" / "instances_val2017.json"
    dataset = CocoDataset(coco_tiny / "val2017", annotations, mask_size=32)
    pixels, target = dataset[0]
    figure = draw_detections(pixels, ground_truth(target, dataset.classes.names))
    assert len(texts(figure.axes[0])) == len(target.labels) > 0


# ---- curves and bars


def train_lines(*steps: int, vector: bool = True) -> list[dict]:
    losses = {"class": 1.0, "l1": 0.5, "giou": 0.7} | ({"vector": 1.4} if vector else {})
    return [{"kind": "train", "step": step, "losses": losses, "lr": 1e-3} for step in steps]


def panel(figure, title):
    return next(axes for axes in figure.axes if axes.get_title() == title)


def test_the_vector_loss_is_shown_beside_its_plateau():
    start = {"kind": "start", "plateau": {"vector": 1.52}, "ceiling": {}}
    axes = panel(training_curves([start, *train_lines(10, 20, 30)]), "loss: mask vector (L1)")
    curve, plateau = axes.get_lines()
    np.testing.assert_array_equal(curve.get_xdata(), [10, 20, 30])
    assert set(plateau.get_ydata()) == {1.52}
    assert plateau.get_color() == GREY
    assert axes.get_ylim()[0] == 0
    assert axes.get_ylim()[1] > 1.52


def test_ap_is_shown_over_the_steps_in_percent():
    evaluations = [
        {"kind": "evaluation", "step": step, "metrics": {"box.AP": step / 100, "segm.AP": None}} for step in (10, 20)
    ]
    (curve,) = panel(training_curves([*train_lines(10), *evaluations]), "AP on the validation images").get_lines()
    np.testing.assert_allclose(curve.get_ydata(), [10, 20])
    assert curve.get_label() == "box"


@pytest.mark.parametrize("metrics", [[], train_lines(1, vector=False)])
def test_a_run_that_has_only_begun_and_a_plain_detector_have_curves_too(metrics):
    assert "none yet" in texts(panel(training_curves(metrics), "AP on the validation images"))


def test_bars_have_the_methods_colour_and_stand_before_the_ceiling():
    metrics = {"segm.AP": 0.3, "segm.APs": math.nan, "segm.APm": 0.2, "segm.APl": 0.5}
    figure = ap_by_size(metrics, ceiling=dict.fromkeys(metrics, 0.9))
    ceiling, ours = figure.axes[0].containers
    assert [bar.get_height() for bar in ceiling] == [90.0] * 4
    assert to_rgb(ours[0].get_facecolor()[:3]) == to_rgb(METHOD_COLOURS["SOLQ"])
    assert texts(figure.axes[0]) == ["30", "-", "20", "50"]


def test_sizes_that_no_object_has_and_missing_kinds_do_not_break_the_bars():
    ap_by_size({})
    ap_by_size(dict.fromkeys(["box.AP", "box.APs", "box.APm", "box.APl"], math.nan))


def test_classes_are_sorted_and_those_without_objects_left_out():
    per_class = {"a": {"segm.AP": 0.2}, "b": {"segm.AP": math.nan}, "c": {"segm.AP": 0.6}}
    axes = ap_by_class(per_class).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["c", "a"]


def test_of_many_classes_the_best_and_the_worst_are_shown():
    per_class = {f"{number}": {"box.AP": number / 100} for number in range(50)}
    axes = ap_by_class(per_class, kind="box", most=4).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["49", "48", "1", "0"]


def test_no_classes_at_all_is_an_empty_plot():
    ap_by_class({})


# ---- codes


def test_reconstructions_say_what_each_number_of_coefficients_keeps():
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[8:24, 4:28] = True
    figure = reconstructions(mask, [4, 64], title="a box")
    codec = DCTCodec(32, 64)
    back = codec.binarize(codec.decode(codec.encode(mask[None])))[0]
    overlap = float((back & mask).sum() / (back | mask).sum())
    titles = [axes.get_title() for axes in figure.axes]
    assert f"n_k = 64, IoU {overlap:.3f}" in titles
    assert "first 64 coefficients" in titles


@pytest.mark.parametrize("fill", [True, False])
def test_full_and_empty_masks_can_be_shown(fill):
    reconstructions(torch.full((8, 8), fill), [1, 64])


def test_saving_makes_the_folder_and_gives_the_figure_back(tmp_path):
    figure = ap_by_class({"a": {"segm.AP": 0.2}})
    assert save(figure, tmp_path / "new" / "a.png") is figure
    assert (tmp_path / "new" / "a.png").stat().st_size > 1000
