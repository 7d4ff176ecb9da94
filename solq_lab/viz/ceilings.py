"""Upper bounds of mask codecs over the length of their vectors and over noise. Paper: table 3."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from solq_lab.viz.style import BLACK, CODEC_COLOURS, CODEC_NAMES, STYLE, new_figure

Row = Mapping[str, Any]

NUMBERS = {"segm.IoU": "mean IoU", "segm.AP": "mask AP", "boundary.AP": "boundary AP"}
SIZES = {"s": "small objects", "m": "medium objects", "l": "large objects"}
NOISES = {
    "box_noise": "error of each box edge, sides of the box",
    "vector_noise": "error of each entry, its std over all objects",
    "step": "step of the quantiser, std of the entries over all objects",
}
MAX_ACROSS = 7  # entries of a legend beside each other
_LINES: tuple[Any, ...] = ("-", "--", ":", "-.")  # one per N, in rising order
_MARKERS = ("o", "s", "^", "D")


@mpl.rc_context(STYLE)
def ceiling_curves(rows: Sequence[Row], *, over: str = "vector_dim", title: str = "") -> Figure:
    """Mean IoU, mask AP and boundary AP of codecs with true boxes and classes: colour is the codec, line style its N.

    Args:
        rows: as `UpperBound.row` gives them; numbers are shares in 0..1.
        over: what runs along the axis: "vector_dim", "box_noise", "vector_noise", "step", or "bits" of a stored mask,
            which follow from the step. Rows that differ in another of these are drawn as lines of their own.
        title: which data.
    """
    figure, axes = new_figure(1, len(NUMBERS), size=(11.0, 3.6), title=title)
    for panel, (number, name) in zip(axes[0], NUMBERS.items(), strict=True):
        _draw(panel, rows, number, over)
        panel.set_title(name)
    axes[0, 0].set_ylabel("percent")
    _add_legend(figure, rows)
    return figure


@mpl.rc_context(STYLE)
def ceilings_by_size(rows: Sequence[Row], *, number: str = "segm.IoU", title: str = "") -> Figure:
    """One number of codecs over the length of their vectors, for small, medium and large objects on one scale.

    Args:
        rows: as `UpperBound.row` gives them.
        number: "segm.IoU", "segm.AP" or "boundary.AP".
        title: which data.
    """
    figure, axes = new_figure(1, len(SIZES), size=(11.0, 3.6), title=title)
    for panel, (size, name) in zip(axes[0], SIZES.items(), strict=True):
        panel.sharey(axes[0, 0])
        _draw(panel, rows, number + size, "vector_dim")
        panel.set_title(name)
    axes[0, 0].set_ylabel(f"{NUMBERS[number]}, percent")
    _add_legend(figure, rows)
    return figure


def _draw(axes: Axes, rows: Sequence[Row], number: str, over: str) -> None:
    """One line per codec, side N and value of what does not run along the axis."""
    sides = sorted({row["mask_size"] for row in rows})
    same = [
        "kind",
        "pca",
        "mask_size",
        *(key for key in ("vector_dim", *NOISES) if key != (over if over != "bits" else "step")),
    ]
    lines: dict[tuple, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row[over]):
        lines.setdefault(tuple(row[key] for key in same), []).append(row)
    for (kind, _, side, *_), line in lines.items():
        values = [np.nan if row[number] is None else 100 * row[number] for row in line]
        place = sides.index(side) % len(_LINES)
        look: dict[str, Any] = {"color": CODEC_COLOURS[kind], "linestyle": _LINES[place], "marker": _MARKERS[place]}
        axes.plot([row[over] for row in line], values, markersize=4, linewidth=1.5, **look)

    axes.margins(x=0.04)
    if over == "vector_dim":
        axes.set_xscale("log", base=2)
        # Only lengths far enough from the one before have room for a label.
        ticks: list[int] = []
        for length in sorted({row[over] for row in rows}):
            if not ticks or length >= 1.25 * ticks[-1]:
                ticks.append(length)
        axes.set_xticks(ticks, [str(length) for length in ticks])
        axes.minorticks_off()
    elif over == "bits":
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel({"vector_dim": "vector length n_k", "bits": "bits per mask", **NOISES}[over])


def _add_legend(figure: Figure, rows: Sequence[Row]) -> None:
    """Codecs by colour and, where there are several, sides N by line style, below the panels."""
    kinds = dict.fromkeys(row["kind"] for row in rows)
    sides = sorted({row["mask_size"] for row in rows})
    handles = [Line2D([], [], color=CODEC_COLOURS[kind], linewidth=2, label=CODEC_NAMES[kind]) for kind in kinds]
    for place, side in enumerate(sides if len(sides) > 1 else []):
        line, marker = _LINES[place % len(_LINES)], _MARKERS[place % len(_MARKERS)]
        label = f"N = {side}"
        handles.append(Line2D([], [], color=BLACK, linestyle=line, marker=marker, markersize=4, label=label))
    lines = math.ceil(len(handles) / MAX_ACROSS) or 1
    figure.legend(handles=handles, loc="outside lower center", ncols=math.ceil(len(handles) / lines) or 1)
