"""Figures of decoder attention: sampling points, heat maps, shares near outlines. Paper: figure 4."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import CircleCollection, LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from PIL import Image

from solq_lab.evaluation.sizes import SIZES
from solq_lab.inference.attention import LayerAttention, ObjectView, heat_map
from solq_lab.masks import encode_rle
from solq_lab.structures import Detections
from solq_lab.studies.attention import AttentionStudy
from solq_lab.viz.images import Backdrop, MaskWindow, Window, draw_outlines, frame_box, show_window, square_around
from solq_lab.viz.style import (
    GREY,
    METHOD_COLOURS,
    ORANGE,
    PURPLE,
    SKY,
    STYLE,
    VERMILION,
    YELLOW,
    colours_of,
    new_figure,
    new_panels,
)

LEVEL_COLOURS = (SKY, YELLOW, VERMILION, PURPLE, ORANGE, GREY)
PANEL = 2.75  # side of a panel, inches
LEGEND = 0.34  # inches below the panels, for a line of the legend
LEGEND_WIDTHS = (10.0, 5.0)  # inches of a figure: a narrower one has a second line, and a third
FADED = 0.45  # opacity of an image behind points
DARKENED = 0.55  # brightness of an image behind a heat map
SURROUNDINGS = 2.0  # side of a close-up over the longer side of its box
MAX_POINT = 0.2  # of a panel's side: the diameter of a point that has all the weight
HEAT_CELLS = 160  # side of a heat map's grid
HEAT_STD = 0.03  # standard deviation of a point in a heat map, share of the panel's side


@mpl.rc_context(STYLE)
def attention_of_object(*views: ObjectView, title: str = "", close_up: bool = False) -> Figure:
    """One object: its mask and box, the sampling points of its query, and their weights as a heat map.

    Args:
        views: the object; as several models see it, each with points and heat map only.
        title: what is shown.
        close_up: show the surroundings of the object instead of the whole image.
    """
    window = _window(views[0], close_up)
    aspect = (window[3] - window[1]) / (window[2] - window[0])
    columns, alone = max(2 * len(views), 3), len(views) == 1
    side = 3.3 if alone else 3.0  # inches
    figure, axes = new_panels(1, columns, panel=(side, side * aspect), title=title, below=LEGEND)
    places = iter(axes[0])

    for view in views:
        if alone:
            place = next(places)
            _show(place, view.pixels, window, lambda image: image)
            frame_box(place, view.box)
            if view.mask is not None:
                _draw_outline(place, view)
            place.set_title(view.caption)
        for draw, name in ((_draw_points, "sampling points"), (_draw_heat, "attention, summed")):
            place = next(places)
            draw(place, view, window)
            place.set_title(name if alone or draw is _draw_heat else view.caption)
    _draw_scale(axes[0, 0], window)
    _add_legend(figure, views)
    return figure


@mpl.rc_context(STYLE)
def attention_of_queries(
    pixels: np.ndarray, models: Mapping[str, tuple[Detections, Sequence[LayerAttention]]]
) -> Figure:
    """All queries of an image: where each starts and where its box ends up, and the boxes themselves.

    Args:
        pixels: (H, W, 3) uint8, the image.
        models: name -> as returned by `predict_with_attention`; the queries of the detections are drawn in the colour
            of their class, the others grey.
    """
    height, width = pixels.shape[:2]
    window, scale = (0.0, 0.0, float(width), float(height)), np.array([width, height])
    columns = 2 * len(models)
    side = 13.2 / max(columns, 3)
    figure, axes = new_panels(1, columns, panel=(side, side * height / width))
    for (name, (detections, layers)), (paths, last) in zip(models.items(), axes[0].reshape(-1, 2), strict=True):
        starts = layers[0].reference[:, :2].numpy() * scale - 0.5
        boxes, scores = layers[-1].boxes.numpy(), layers[-1].scores.numpy()
        ends = boxes[:, :2] * scale - 0.5
        colours = np.full(len(boxes), "#555555", dtype=object)
        colours[detections.queries.numpy()] = colours_of(detections.labels.tolist())
        for place, what in ((paths, "queries, start to end"), (last, "last boxes")):
            _show(place, pixels, window, _fade)
            place.set_title(f"{name}: {len(boxes)} {what}" if place is paths else what)

        paths.add_collection(
            LineCollection(list(np.stack([starts, ends], axis=1)), colors=colours, linewidths=1.0), False
        )
        paths.scatter(*starts.T, s=6, color=colours)
        paths.scatter(*ends.T, s=12 + 90 * scores, color=colours, edgecolors="black", linewidths=0.6, zorder=3)
        for row in np.argsort(scores):
            corner, size = (boxes[row, :2] - boxes[row, 2:] / 2) * scale - 0.5, boxes[row, 2:] * scale
            line = {"edgecolor": colours[row], "alpha": float(max(scores[row], 0.12)), "linewidth": 1.4}
            last.add_patch(Rectangle(tuple(corner), *size, fill=False, **line))
    return figure


@mpl.rc_context(STYLE)
def attention_by_size(
    runs: Mapping[str, Sequence[ObjectView]],
    columns: Sequence[str],
    *,
    title: str = "",
    with_heat: bool = True,
    close_up: bool = True,
    outline: str = "predicted mask",
) -> Figure:
    """Objects side by side, a row of points and a row of heat maps per run.

    Args:
        runs: method -> its views of the objects, the same objects in the same order for each.
        columns: what the objects are, for example their sizes.
        title: what is shown.
        with_heat: False leaves the heat maps out.
        close_up: show the surroundings of the objects instead of whole images.
        outline: what a view's mask is.

    Raises:
        ValueError: a run with another number of objects.
    """
    for name, views in runs.items():
        if len(views) != len(columns):
            raise ValueError(f"{name}: {len(views)} views for {len(columns)} columns")
    if not runs or not columns:
        figure, axes = new_figure(1, 1, size=(6.0, 1.6), title=title)
        axes[0, 0].set_axis_off()
        axes[0, 0].text(0.5, 0.5, "no object was found by every run", ha="center", va="center")
        return figure

    # Every run shows the same cut of an image: the largest of the close-ups.
    windows = [
        max((_window(views[column], close_up) for views in runs.values()), key=lambda one: sum(one[2:]) - sum(one[:2]))
        for column in range(len(columns))
    ]
    aspect = max((bottom - top) / (right - left) for left, top, right, bottom in windows)
    kinds = (("sampling points", _draw_points), ("attention, summed", _draw_heat))[: 2 if with_heat else 1]
    rows, below = len(kinds) * len(runs), LEGEND * _legend_lines(0.5 + PANEL * len(columns))
    figure, axes = new_panels(rows, len(columns), panel=(PANEL, PANEL * aspect), title=title, left=0.5, below=below)

    places = iter(axes)
    for number, (name, views) in enumerate(runs.items()):
        for what, draw in kinds:
            row = next(places)
            names = [name] * (len(runs) > 1) + [what] * (with_heat or len(runs) == 1)
            beside = {"rotation": 90, "ha": "right", "va": "center", "transform": row[0].transAxes}
            row[0].text(-0.03, 0.5, "\n".join(names), **beside)
            for place, view, window in zip(row, views, windows, strict=True):
                draw(place, view, window)
        for place, column, view in zip(axes[number * len(kinds)], columns, views, strict=True):
            place.set_title(f"{column}: {view.caption}" if number == 0 else view.caption)
    for place, window in zip(axes[0], windows, strict=True):
        _draw_scale(place, window)
    _add_legend(figure, [view for views in runs.values() for view in views], outline)
    return figure


@mpl.rc_context(STYLE)
def attention_shares(studies: Mapping[str, AttentionStudy], *, title: str = "") -> Figure:
    """Share of the attention near outlines and near extremities, by decoder layer and size of the object.

    Args:
        studies: method -> what was measured. Dashed: points of another object's query. Dotted: uniform over the box.
        title: what is compared.
    """
    figure, axes = new_figure(2, len(SIZES), size=(9.5, 5.2), title=title)
    free = iter(colour for name, colour in METHOD_COLOURS.items() if name not in studies)
    colours = {name: METHOD_COLOURS[name] if name in METHOD_COLOURS else next(free) for name in studies}

    for row, what in enumerate(("outline", "extremities")):
        for size, word in enumerate(SIZES):
            place = axes[row, size]
            for name, study in studies.items():
                colour = colours[name]
                layers = np.arange(1, study.outline.shape[1] + 1)
                place.plot(layers, 100 * study.mean(what, size), color=colour, marker="o", linewidth=2)
                place.plot(layers, 100 * study.mean(f"other_{what}", size), color=colour, linestyle="--")
                place.plot(layers, 100 * study.mean(f"even_{what}", size), color=colour, linestyle=":")
                place.set_xticks(layers)
            counts = " / ".join(str(int((study.sizes == size).sum())) for study in studies.values())
            if row == 0:
                place.set_title(f"{word} objects ({counts})")
            else:
                place.set_xlabel("decoder layer")
        band = " / ".join(dict.fromkeys(f"{study.band:g}" for study in studies.values()))
        axes[row, 0].set_ylabel(f"weight within {band} px\nof the {what}, %")
        top = max(place.get_ylim()[1] for place in axes[row])
        for place in axes[row]:
            place.set_ylim(0, top)

    handles = [Line2D([], [], color=colour, marker="o", label=name) for name, colour in colours.items()]
    handles.append(Line2D([], [], color=GREY, linestyle="--", label="points of another object's query"))
    handles.append(Line2D([], [], color=GREY, linestyle=":", label="uniform over the box"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def _draw_points(axes: Axes, view: ObjectView, window: Window) -> None:
    """Every point; its area is its weight, the largest points at the bottom."""
    _show(axes, view.pixels, window, _fade)
    _draw_outline(axes, view)
    height, width = view.pixels.shape[:2]
    _draw_reference(axes, view.reference, (height, width))

    looked = view.looked
    order = looked.weights.argsort(descending=True)
    places = (looked.points[order] * torch.tensor([width, height]) - 0.5).numpy()
    share = looked.weights[order] / max(float(looked.weights.sum()), 1e-12)
    diameter = MAX_POINT * 72 * PANEL  # in points, as marker areas are
    colours = [_level_colour(level) for level in looked.levels[order].tolist()]
    # Not `axes.scatter`, which takes as long as all else that is drawn here.
    circles = CircleCollection(
        math.pi / 4 * (6 + (diameter**2 * share).numpy()),  # areas in points
        offsets=places,
        offset_transform=axes.transData,
        facecolors=colours,
        edgecolors="black",
        linewidths=0.6,
        alpha=0.9,
        zorder=3,
    )
    axes.add_collection(circles, autolim=False)


def _draw_heat(axes: Axes, view: ObjectView, window: Window) -> None:
    """The summed weights, bright where there is much, over the darkened image."""
    height, width = view.pixels.shape[:2]
    left, top, right, bottom = window
    rows, columns = HEAT_CELLS, max(round(HEAT_CELLS * (right - left) / (bottom - top)), 1)
    scale, corner = torch.tensor([width, height]), torch.tensor([left, top])
    inside = (view.looked.points * scale - corner) / torch.tensor([right - left, bottom - top])
    heat = heat_map(view.looked._replace(points=inside), (rows, columns), std=HEAT_STD * rows)
    heat /= max(heat.max(), 1e-12)

    painted = mpl.colormaps["inferno"](heat)
    painted[..., 3] = np.clip(1.6 * heat, 0, 0.92)
    glow = Image.fromarray((255 * painted).round().astype(np.uint8))

    def light(image: Image.Image) -> Image.Image:
        over = glow.resize(image.size, Image.Resampling.BILINEAR)
        return Image.alpha_composite(image.convert("L").point(lambda value: DARKENED * value).convert("RGBA"), over)

    _show(axes, view.pixels, window, light)
    _draw_outline(axes, view)


def _show(axes: Axes, pixels: np.ndarray, window: Window, finish: Callable[[Image.Image], Image.Image]) -> None:
    """The window of an image (H, W, 3), changed by `finish`."""
    image = Image.fromarray(pixels)
    axes.add_artist(Backdrop(image, window, resample=Image.Resampling.BICUBIC, finish=finish))
    show_window(axes, window)


def _fade(image: Image.Image) -> Image.Image:
    return image.point(lambda value: 255 - FADED * (255 - value))


def _draw_scale(axes: Axes, window: Window) -> None:
    """A bar of a round number of pixels, about a quarter of the window wide."""
    most = max((window[2] - window[0]) / 4, 1.0)
    power = 10.0 ** math.floor(math.log10(most))
    length = max(step * power for step in (1, 2, 5) if step * power <= most)
    x, y = window[0] + 0.05 * (window[2] - window[0]), window[3] - 0.05 * (window[3] - window[1])
    halo: dict[str, Any] = {
        "path_effects": [withStroke(linewidth=4, foreground="black")],
        "color": "white",
        "zorder": 4,
    }
    axes.plot([x - 0.5, x + length - 0.5], [y, y], linewidth=2.2, solid_capstyle="butt", **halo)
    axes.text(x - 0.5, y - 0.03 * (window[3] - window[1]), f"{length:g} px", fontsize=8, va="bottom", **halo)


def _draw_outline(axes: Axes, view: ObjectView) -> None:
    """The mask's outline; the box where there is no mask."""
    if view.mask is None or not view.mask.any():
        frame_box(axes, view.box)
    else:
        (rle,) = encode_rle(torch.from_numpy(view.mask)[None])
        draw_outlines(axes, [(MaskWindow.of_rle(rle).outline(), "white")], edge="black")


def _draw_reference(axes: Axes, reference: np.ndarray, size: tuple[int, int]) -> None:
    """The box the points are placed around, dashed; a cross where the layer starts from a point."""
    height, width = size
    x, y = reference[:2] * (width, height) - 0.5
    if len(reference) == 2:
        for colour, thickness in (("white", 4.0), ("black", 2.0)):
            axes.plot([x], [y], marker="+", markersize=12, markeredgewidth=thickness, color=colour, zorder=2)
        return
    half = reference[2:] * (width, height) / 2
    frame_box(axes, np.array([x - half[0], y - half[1], x + half[0], y + half[1]]) + 0.5, style=(0, (4, 2)))


def _add_legend(figure: Figure, views: Sequence[ObjectView], outline: str = "predicted mask") -> None:
    """The levels that occur, and what the lines that are drawn mean."""
    levels = sorted({level for view in views for level in view.looked.levels.unique().tolist()})
    dot: dict[str, Any] = {
        "linestyle": "",
        "marker": "o",
        "markersize": 9,
        "markeredgecolor": "black",
        "markeredgewidth": 0.6,
    }
    names = {level: f"level {level + 1}" + ("" if level else " (finest)") for level in levels}
    handles = [Line2D([], [], color=_level_colour(level), label=name, **dot) for level, name in names.items()]

    drawn = {outline if view.mask is not None and view.mask.any() else "predicted box" for view in views}
    for name in sorted(drawn):  # a box is drawn black on white, a mask white on black
        colour, edge = ("black", "white") if name == "predicted box" else ("white", "black")
        look: dict[str, Any] = {"path_effects": [withStroke(linewidth=2.6, foreground=edge)]}
        handles.append(Line2D([], [], color=colour, linewidth=1.3, label=name, **look))

    # Layers that start from a point have a cross for a reference, the others a dashed box.
    cross: dict[str, Any] = {"marker": "+", "markersize": 9, "markeredgewidth": 2, "linestyle": ""}
    kinds = {len(view.reference) for view in views}
    for length, name, look in ((2, "reference point", cross), (4, "reference box", {"linestyle": "--"})):
        if length in kinds:
            handles.append(Line2D([], [], color="black", label=name, **look))
    across = math.ceil(len(handles) / _legend_lines(figure.get_figwidth()))
    figure.legend(handles=handles, loc="lower center", ncols=across, handletextpad=0.4, borderaxespad=0.3)


def _legend_lines(width: float) -> int:
    """Lines that the legend of a figure needs, by its inches."""
    return 1 + sum(width < limit for limit in LEGEND_WIDTHS)


def _level_colour(level: int) -> str:
    return LEVEL_COLOURS[level % len(LEVEL_COLOURS)]


def _window(view: ObjectView, close_up: bool) -> Window:
    """A square around the object's box; or the whole image."""
    height, width = view.pixels.shape[:2]
    if not close_up:
        return 0.0, 0.0, float(width), float(height)
    return square_around(view.box.tolist(), (height, width), sides=SURROUNDINGS)
