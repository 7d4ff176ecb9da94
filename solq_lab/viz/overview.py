"""Learning curves of several runs, and intervals of the difference between two."""

from collections.abc import Mapping, Sequence

import matplotlib as mpl
from matplotlib.figure import Figure

from solq_lab.runs import Run, label_runs
from solq_lab.viz.style import BLUE, GREY, OBJECT_COLOURS, STYLE, VERMILION, YELLOW, metric_title, new_figure

COLOURS = [colour for colour in OBJECT_COLOURS[:7] if colour != YELLOW]  # too pale for a line


@mpl.rc_context(STYLE)
def learning_curves(runs: Sequence[Run], *, title: str = "") -> Figure:
    """Total loss, box AP and mask AP over the steps, one colour per run.

    Args:
        runs: finished or not; one without numbers yet has no curve.
        title: what is compared.
    """
    figure, axes = new_figure(1, 3, size=(11.0, 3.6), title=title)
    for number, (label, run) in enumerate(zip(label_runs(runs), runs, strict=True)):
        look = {"color": COLOURS[number % len(COLOURS)], "linewidth": 1.3, "label": label}
        train, evaluations = run.metrics("train"), run.metrics("evaluation")
        if not train and not evaluations:
            continue
        axes[0, 0].plot([line["step"] for line in train], [line["total"] for line in train], **look)
        for panel, metric in zip(axes[0, 1:], ("box.AP", "segm.AP"), strict=True):
            known = [line for line in evaluations if line["metrics"].get(metric) is not None]
            values = [100 * line["metrics"][metric] for line in known]
            panel.plot([line["step"] for line in known], values, marker="o", markersize=3.5, **look)

    for panel, name in zip(axes.flat, ("total loss", "box AP, percent", "segm AP, percent"), strict=True):
        panel.set(title=name, xlabel="optimiser step")
        panel.set_xlim(left=0)
        panel.set_ylim(0, 1.05 * panel.get_ylim()[1])  # room for the markers at the top
    handles, labels = axes[0, 0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(handles), 4))
    else:
        axes[0, 1].text(0.5, 0.5, "no runs yet", transform=axes[0, 1].transAxes, ha="center", color=GREY)
    return figure


@mpl.rc_context(STYLE)
def change_intervals(
    changes: Mapping[str, tuple[float, float, float]], names: tuple[str, str], *, confidence: float, title: str = ""
) -> Figure:
    """Differences of two runs with their intervals; those that exclude 0 are filled.

    Args:
        changes: number -> change, low and high end of its interval, in 0..1, as `BootstrapComparison.changes`.
        names: of the two runs.
        confidence: of the intervals.
        title: what is compared.
    """
    figure, axes = new_figure(1, 1, size=(7.0, 1.4 + 0.32 * len(changes)), title=title)
    panel = axes[0, 0]
    panel.axvline(0, color=GREY, linewidth=1.2)
    for line, (change, low, high) in enumerate(changes.values()):
        colour = BLUE if low > 0 else VERMILION if high < 0 else GREY
        panel.plot([100 * low, 100 * high], [line, line], color=colour, linewidth=2.5, alpha=0.6)
        face = "white" if colour == GREY else colour
        panel.plot(100 * change, line, "o", markersize=7, markeredgecolor=colour, markerfacecolor=face)

    panel.set_yticks(range(len(changes)), list(map(metric_title, changes)))
    panel.set_ylim(len(changes) - 0.5, -0.5)
    panel.set_xlabel(f"{names[1]} - {names[0]}, percentage points, with {100 * confidence:g} % interval")
    return figure
