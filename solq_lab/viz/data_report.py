"""Figures of a data set's check: objects per class and by size, and images of what is wrong."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageFile, ImageOps

from solq_lab.data.annotations import DataError, clamped_box
from solq_lab.data.coco import CocoDataset
from solq_lab.data.folders import Split
from solq_lab.data.kinds import IMAGE_FORMATS
from solq_lab.inference.predictor import as_pixels
from solq_lab.schema import EvaluationSection
from solq_lab.viz.images import MaskWindow, draw_objects, draw_outlines, ground_truth
from solq_lab.viz.labels import Label, Labels
from solq_lab.viz.style import BLUE, GREY, ORANGE, SKY, STYLE, VERMILION, colours_of, new_figure
from solq_lab.workbench.check.findings import RULES, Finding
from solq_lab.workbench.check.report import Report
from solq_lab.workbench.check.rules import read_mask

ACROSS = 4  # images beside each other
SIDE = 2.6  # inches of an image
MAX_PIXELS = 640  # of a shown image's longer side
CHARACTERS = 46  # of a line above an image
SPLIT_COLOURS = (BLUE, ORANGE)
MAX_CLASSES = 100  # in the chart
MAX_LINEAR = 50  # times the smallest class that the largest may have on a linear scale
AREA_SIDES = EvaluationSection().area_sides  # COCO's limits between small, medium and large, pixels


@mpl.rc_context(STYLE)
def class_distribution(report: Report) -> Figure:
    """Objects per class and split, the class that the first split has most objects of on top."""
    splits = {name: checked.summary["per_class"] for name, checked in report.splits.items()}
    first = next(iter(splits.values()))
    every = dict.fromkeys(name for per_class in splits.values() for name in per_class)
    names = sorted(every, key=lambda name: first.get(name, 0), reverse=True)[:MAX_CLASSES]
    title = "objects per class" + (f", {len(names)} of {len(every)} classes" if len(names) < len(every) else "")
    figure, axes = new_figure(1, 1, size=(9.0, 1.2 + 0.16 * len(names)), title=title)

    panel, height = axes[0, 0], 0.8 / len(splits)
    for row, (split, per_class) in enumerate(splits.items()):
        counts = [per_class.get(name, 0) for name in names]
        offsets = np.arange(len(names)) + (row - (len(splits) - 1) / 2) * height
        panel.barh(offsets, counts, height, color=SPLIT_COLOURS[row % 2], label=f"{split} ({sum(counts)})")
    panel.set_yticks(range(len(names)), [_printable(name, 30) for name in names], fontsize=7)
    panel.set_ylim(max(len(names), 1) - 0.5, -0.5)
    # A logarithm only where counts differ so much that small ones would have no bar.
    counts = [count for per_class in splits.values() for count in per_class.values() if count]
    if counts and max(counts) > MAX_LINEAR * min(counts):
        panel.set_xscale("symlog", linthresh=1)
        panel.xaxis.set_major_formatter("{x:g}")
    panel.set_xlabel("objects")
    panel.grid(axis="y", visible=False)
    figure.legend(loc="outside lower center", ncols=len(splits))
    return figure


@mpl.rc_context(STYLE)
def size_distribution(report: Report) -> Figure:
    """Share of a split's objects by the side of their box, beside the limits of small, medium and large objects."""
    figure, axes = new_figure(1, 1, size=(9.0, 3.0), title="objects by size")
    panel, every = axes[0, 0], {name: checked.sides() for name, checked in report.splits.items()}
    for colour, (split, sides) in zip(SPLIT_COLOURS, every.items(), strict=False):
        if len(sides):
            weights = np.full(len(sides), 100 / len(sides))
            edges = np.geomspace(1, 2048, 45)
            panel.hist(np.maximum(sides, 1), edges, weights=weights, histtype="step", color=colour, label=split)

    for side in AREA_SIDES:
        panel.axvline(side, color=GREY, linestyle=":")
    shown = np.concatenate([[*AREA_SIDES], *every.values()])
    panel.set_xscale("log", base=2)
    panel.set_xlim(max(shown.min(), 1) / 1.3, shown.max() * 1.3)
    panel.xaxis.set_major_formatter("{x:g}")
    panel.set_xlabel("square root of the box's area, pixels")
    panel.set_ylabel("objects, percent")
    if panel.patches:
        figure.legend(loc="outside lower center", ncols=len(every))
    return figure


@mpl.rc_context(STYLE)
def finding_images(report: Report, name: str, findings: Sequence[Finding], *, title: str = "") -> Figure:
    """The images of some findings, with the box (vermilion) and the mask (blue) that each is about."""
    rows = -(-len(findings) // ACROSS)
    figure, axes = new_figure(
        rows, ACROSS, size=(SIDE * ACROSS, 0.4 + (SIDE + 0.6) * rows), title=title, of_images=True
    )
    for panel, finding in zip(axes.flat, findings, strict=False):
        size = _draw_image(panel, report.splits[name].split, str(finding.file_name))
        entry = report.entry_of(name, finding)
        if entry is not None:
            _draw_object(panel, entry, size)
        text = _printable(finding.message, 3 * CHARACTERS)
        panel.set_title("\n".join(textwrap.wrap(text, CHARACTERS)), fontsize=6.5, loc="left")
    return figure


@mpl.rc_context(STYLE)
def sample_images(report: Report, name: str) -> Figure:
    """The report's samples of a split, the worst first, with the outlines and classes of all objects."""
    checked, samples = report.splits[name], report.samples(name)
    rows = max(-(-len(samples) // ACROSS), 1)
    title = f"images of {name}, those with findings first"
    size = SIDE * ACROSS, 0.4 + (SIDE + 0.2) * rows
    figure, axes = new_figure(rows, ACROSS, size=size, title=title, of_images=True)

    # A class has one colour in all images of all splits, as it has in a training's.
    objects = [checked.objects_of(image) for image in samples]
    listed = [of_class for one in report.splits.values() for _, of_class in sorted(one.names.items())]
    classes = dict.fromkeys([*listed, *(of_class for some in objects for _, of_class in some)])
    colours = dict(zip(classes, colours_of(range(len(classes))), strict=True))
    for panel, image, some in zip(axes.flat, samples, objects, strict=False):
        size = _draw_image(panel, checked.split, image.file_name)
        panel.set_title(_printable(Path(image.file_name).name, CHARACTERS), fontsize=6.5, loc="left")
        labels = list[Label]()
        for entry, of_class in some:
            top = _draw_outline(panel, entry, size, colours[of_class])
            if top is not None:
                labels.append((_printable(of_class, 20), top, colours[of_class]))
        panel.add_artist(Labels(6.5, labels))
    return figure


@mpl.rc_context(STYLE)
def mixed_images(datasets: Mapping[str, CocoDataset], *, epochs: int = 3) -> Figure:
    """What each data set, by name, makes of its first image: a row each, a column an epoch."""
    side = SIDE * ACROSS / epochs
    figure, axes = new_figure(len(datasets), epochs, size=(SIDE * ACROSS, (side + 0.2) * len(datasets)))
    for panels, (name, dataset) in zip(axes, datasets.items(), strict=True):
        for epoch, panel in enumerate(panels):
            image, target = dataset[epoch, 0]
            draw_objects(panel, as_pixels(image), ground_truth(target, dataset.classes.names), font_size=8)
            panel.set_title(f"{name}, epoch {epoch}")
    return figure


def worst_images(report: Report, *, count: int = 8) -> dict[str, Figure]:
    """The worst findings of each broken rule that images can show, by rule and split; notes are left out."""
    figures = {}
    for split in report.splits:  # outside, so that the annotations of each are read once
        for rule in report.findings.failing("harmful"):
            findings = report.findings.worst(rule, split)
            shown = [finding for finding in findings if finding.file_name is not None][:count]
            if shown and rule not in ("image-missing", "path-leaves-folder"):
                title = f"{RULES[rule].title}, {split}"
                figures[f"{rule} {split}"] = finding_images(report, split, shown, title=title)
    return figures


def _draw_image(axes: Axes, split: Split, file_name: str) -> tuple[int, int]:
    """Show an image as the split counts its pixels, what can be read of it, or an empty frame; its (height, width)."""
    path = split.images / file_name
    ImageFile.LOAD_TRUNCATED_IMAGES = True  # a truncated image is shown as far as it goes
    try:
        with Image.open(path, formats=list(IMAGE_FORMATS)) as opened:
            width, height = opened.size
            opened.draft("RGB", (MAX_PIXELS, MAX_PIXELS))
            small: Image.Image = opened
            if split.orientation == "upright":
                small = ImageOps.exif_transpose(opened)
                lying = (small.height > small.width) != (height > width)
                width, height = (height, width) if lying else (width, height)
            small = small.convert("RGB")
            small.thumbnail((MAX_PIXELS, MAX_PIXELS))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        axes.set(xlim=(0, 1), ylim=(1, 0), aspect="equal")
        axes.add_patch(Rectangle((0, 0), 1, 1, fill=False, edgecolor=GREY))
        axes.text(0.5, 0.5, "no image", horizontalalignment="center", color=GREY)
        return 1, 1
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False

    axes.imshow(small, extent=(-0.5, width - 0.5, height - 0.5, -0.5))
    return height, width


def _draw_object(axes: Axes, entry: dict, size: tuple[int, int]) -> None:
    """An object's mask and its box as annotated, as far as they can be read; the view grows to a box outside."""
    height, width = size
    _draw_outline(axes, entry, size, SKY)
    try:
        clamped_box(entry.get("bbox"), (height, width), "box")
    except DataError:
        return
    x, y, w, h = entry["bbox"]
    axes.add_patch(Rectangle((x - 0.5, y - 0.5), w, h, fill=False, edgecolor=VERMILION, linewidth=1.6))
    reach = 2 * max(size)
    left, right = max(min(0, x, x + w), -reach), min(max(width, x, x + w), reach)
    top, bottom = max(min(0, y, y + h), -reach), min(max(height, y, y + h), reach)
    axes.set(xlim=(left - 0.5, right - 0.5), ylim=(bottom - 0.5, top - 0.5))


def _draw_outline(axes: Axes, entry: dict, size: tuple[int, int], colour: str) -> tuple[float, float] | None:
    """Outline an object's mask, as far as it can be read; the middle (x, y) of its upper edge."""
    try:
        rle = read_mask(entry, size, "mask")
    except DataError:
        rle = None
    window = None if rle is None else MaskWindow.of_rle(rle)
    if window is None or not window.bitmap.size:
        return None
    draw_outlines(axes, [(window.outline(), colour)])
    return window.left + window.bitmap.shape[1] / 2, window.top


def _printable(text: str, longest: int) -> str:
    """A text from an annotation file for a figure."""
    printable = "".join(character if character.isprintable() else "?" for character in text)
    return printable if len(printable) <= longest else printable[: longest - 3] + "..."
