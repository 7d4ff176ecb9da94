"""Tables of results as figures: our mean and std over seeds beside the paper's numbers."""

from collections.abc import Sequence
from itertools import cycle
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from solq_lab.viz.style import (
    BLACK,
    BLUE,
    FIGURE_WIDTH,
    GREEN,
    GREY,
    KIND_COLOURS,
    ORANGE,
    PURPLE,
    STYLE,
    VERMILION,
    metric_title,
    new_figure,
)
from solq_lab.workbench.paper import PaperTable
from solq_lab.workbench.tables import ResultTable, TableRow

ROOM = 0.15  # of a panel's range, above and below its points


@mpl.rc_context(STYLE)
def beside_paper(tables: Sequence[ResultTable], metric: str = "segm.AP", *, title: str = "") -> Figure:
    """One column of panels per table: the paper's numbers above, ours below, row by row of the table.

    The scales of the panels differ: numbers of other images compare in which row is ahead, and by how much. Small marks
    are single seeds, bars their standard deviation; a row with one seed has a pale bar, the largest of the others.

    Args:
        tables: results, each with the paper's table; those that have not been run are left out where others have
            been, and so are rows without a number.
        metric: which number is shown.
        title: what is compared.
    """
    tables = [table.with_numbers(metric) for table in tables if any(row.runs for row in table.rows)] or tables
    single = _largest_std(tables, metric)
    ratios = [max(3, len(table.rows)) for table in tables]
    size = max(6.0, 1.0 + 0.52 * sum(ratios)), 5.0
    figure, axes = new_figure(2, len(tables), size=size, title=title, width_ratios=ratios)
    colour = KIND_COLOURS[metric.partition(".")[0]]

    for (above, below), table in zip(axes.T, tables, strict=True):
        ours, printed = [row.values(metric) for row in table.rows], [row.paper.get(metric) for row in table.rows]
        # Steps of one quantity, which a line may join; through single seeds it would show noise.
        scale = all(row.name[0].isdigit() for row in table.rows)
        several = all(len(values) > 1 for values in ours)
        _points(above, [[] if value is None else [value] for value in printed], BLACK, joined=scale)
        _points(below, ours, colour, joined=scale and several, single=single)

        above.set_title(f"paper: {table.name.removeprefix('shapes_')}")
        below.set_title(f"ours: {table.name}")
        _name_rows(above, [row.paper_name if scale and row.paper_name else row.name for row in table.rows])
        _name_rows(below, [row.name for row in table.rows])
        if not any(row.runs for row in table.rows):
            hint = f"not run yet:\nsolq-lab sweep\n{table.name}"
            below.text(0.5, 0.5, hint, transform=below.transAxes, ha="center", va="center", color=GREY, fontsize=8)
            below.set_yticks([])
    for panel in axes[:, 0]:
        panel.set_ylabel(f"{metric_title(metric)}, percent")
    return figure


@mpl.rc_context(STYLE)
def among_methods(
    paper: PaperTable, table: ResultTable, metrics: Sequence[str] = ("segm.AP", "box.AP"), *, title: str = ""
) -> Figure:
    """Every method of one of the paper's tables as a dot, SOLQ's in blue, and our runs as diamonds in its line.

    Args:
        paper: the paper's table.
        table: our results; a row that repeats none of the paper's rows gets a line of its own.
        metrics: one panel each.
        title: what is compared.
    """
    extra = [row for row in table.rows if row.paper_name not in paper.rows]
    names = [*paper.rows, *(row.name for row in extra)]
    size = min(3.2 + 2.6 * len(metrics), FIGURE_WIDTH), 1.3 + 0.24 * len(names)
    figure, axes = new_figure(1, len(metrics), size=size, title=title)

    for place, (panel, metric) in enumerate(zip(axes.flat, metrics, strict=True)):
        for line, name in enumerate(names):
            printed = paper.row(name).get(metric) if name in paper.rows else None
            if printed is not None:
                solq = "SOLQ" in name or "UQR" in name
                panel.plot(printed, line, "o", color=BLUE if solq else GREY, markersize=6 if solq else 5)
        for row in table.rows:
            mean, std = row.mean(metric), row.std(metric)
            line = names.index(row.paper_name if row.paper_name in paper.rows else row.name)
            if mean is not None:
                panel.errorbar(mean, line, xerr=std or 0.0, color=VERMILION, marker="D", markersize=6, capsize=3)
        panel.set_ylim(len(names) - 0.5, -0.5)
        panel.set_yticks(range(len(names)), names if place == 0 else [])
        panel.set_xlabel(f"{metric_title(metric)}\npercent")

    axes[0, 0].plot([], [], "o", color=GREY, label="paper, other methods")
    axes[0, 0].plot([], [], "o", color=BLUE, label="paper, SOLQ")
    extent = " (where run)" if any(row.runs for row in table.rows) else " (not run)"
    axes[0, 0].plot([], [], "D", color=VERMILION, label="ours" + (extent if table.missing else ""))
    figure.legend(loc="outside lower center", ncols=3)
    return figure


@mpl.rc_context(STYLE)
def ladder(
    table: ResultTable, metrics: Sequence[str] = ("segm.AP", "boundary.AP", "box.AP"), *, title: str = ""
) -> Figure:
    """One panel per number, our rows that have been run in the table's order; bars and marks as in `beside_paper`.

    Args:
        table: results.
        metrics: one panel each.
        title: what is compared.
    """
    rows = [row for row in table.rows if row.runs]
    lines, size = range(len(rows)), (FIGURE_WIDTH, 1.1 + 0.19 * len(rows))
    figure, axes = new_figure(1, len(metrics), size=size, title=title)
    for panel, metric in zip(axes.flat, metrics, strict=True):
        colour, single = KIND_COLOURS[metric.partition(".")[0]], _largest_std([table], metric)
        for line, row in enumerate(rows):
            values, std = row.values(metric), row.std(metric)
            look = {"color": colour, "marker": "o", "markersize": 6, "capsize": 3}
            panel.errorbar(np.mean(values), line, xerr=std or single, alpha=1 if std else 0.6, **look)
            if std:
                panel.plot(values, [line + 0.3] * len(values), "o", color=colour, markersize=3, alpha=0.6)

        panel.set_yticks(lines, [row.name for row in rows] if panel is axes.flat[0] else [""] * len(rows))
        panel.set_ylim(len(rows) - 0.5, -0.5)
        panel.grid(axis="x", visible=True)
        panel.grid(axis="y", visible=False)
        panel.set_title(f"{metric_title(metric)}, percent")
    return figure


@mpl.rc_context(STYLE)
def against_length(
    table: ResultTable, metrics: Sequence[str] = ("segm.AP", "boundary.AP"), *, title: str = ""
) -> Figure:
    """A line per recipe through trainings of several lengths; one row of panels per number, against steps and minutes.

    Args:
        table: results whose rows are called <recipe>-<steps>; rows without a run are left out.
        metrics: one row of panels each.
        title: what is compared.
    """
    recipes: dict[str, list[tuple[int, TableRow]]] = {}
    for row in table.rows:
        recipe, _, steps = row.name.rpartition("-")
        if row.runs:
            recipes.setdefault(recipe, []).append((int(steps), row))

    figure, axes = new_figure(len(metrics), 2, size=(FIGURE_WIDTH, 0.6 + 2.6 * len(metrics)), title=title)
    for (by_step, by_minute), metric in zip(axes, metrics, strict=True):
        for (recipe, rows), colour in zip(recipes.items(), cycle((ORANGE, BLUE, GREEN, PURPLE))):
            look: dict[str, Any] = {"color": colour, "marker": "o", "label": recipe}
            means = [row.mean(metric) for _, row in rows]
            by_step.plot([steps for steps, _ in rows], means, **look)
            by_minute.plot([row.minutes for _, row in rows], means, **look)
        by_step.set(xlabel="optimiser steps", ylabel=f"{metric_title(metric)}, percent")
        by_minute.set(xlabel="minutes of training")
        if recipes:
            by_step.legend()
    return figure


def _largest_std(tables: Sequence[ResultTable], metric: str) -> float:
    """Over the rows that have several seeds, percent; 0 where none has."""
    stds = [row.std(metric) for table in tables for row in table.rows]
    return max((std for std in stds if std is not None), default=0.0)


def _points(axes: Axes, rows: Sequence[Sequence[float]], colour: str, *, joined: bool, single: float = 0.0) -> None:
    """Mean and std of every row, and its single values where there are several; `single` is the bar of one value."""
    shown = [line for line, values in enumerate(rows) if values]
    means = [float(np.mean(rows[line])) for line in shown]
    stds = [float(np.std(rows[line], ddof=1)) if len(rows[line]) > 1 else 0.0 for line in shown]
    look: dict[str, Any] = {"color": colour, "marker": "o", "markersize": 6, "linestyle": ":" if joined else "none"}
    axes.errorbar(shown, means, yerr=stds if any(stds) else None, capsize=3, **look)
    for line in shown:
        if len(rows[line]) > 1:
            axes.plot([line + 0.17] * len(rows[line]), rows[line], "o", color=colour, markersize=3, alpha=0.6)
        elif single:
            axes.errorbar(line, rows[line][0], yerr=single, color=colour, alpha=0.35, capsize=3)
    axes.margins(y=ROOM)


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.grid(axis="x", visible=False)
    if max(map(len, names)) > 4:
        for label in axes.get_xticklabels():
            label.set(rotation=35, ha="right", rotation_mode="anchor")
