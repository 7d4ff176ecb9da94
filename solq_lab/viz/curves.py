"""Figures of a training and of an evaluation: curves over steps, bars per size and class."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from solq_lab.viz.style import GREY, KIND_COLOURS, LOSS_COLOURS, METHOD_COLOURS, STYLE, new_figure

LOSS_TITLES = {"class": "class (focal)", "l1": "box L1", "giou": "box GIoU", "vector": "mask vector (L1)"}
LOSS_TITLES |= {"mask": "mask pixels (focal)", "dice": "mask overlap (dice)"}
SIZES = {"AP": "all", "APs": "small", "APm": "medium", "APl": "large"}


@mpl.rc_context(STYLE)
def training_curves(metrics: Sequence[Mapping[str, Any]], *, title: str = "") -> Figure:
    """Losses of the last decoder layer, the vector loss beside its plateau, learning rate, and AP over the steps.

    The plateau is the vector loss of a head that predicts the same, best vector for every object. A curve that has not
    left it yet has learnt nothing about masks, which is normal in the first minutes.

    Args:
        metrics: the lines of a run's metrics.jsonl, as `Run.metrics()` gives them.
        title: which run.
    """
    train = [line for line in metrics if line["kind"] == "train"]
    evaluations = [line for line in metrics if line["kind"] == "evaluation"]
    plateaus: dict[str, float] = {}
    for line in metrics:
        plateaus |= line.get("plateau", {})

    names = [name for name in LOSS_TITLES if any(name in line["losses"] for line in train)]
    columns = max(3, math.ceil((len(names) + 2) / 2))  # beside the losses: learning rate and precision
    figure, axes = new_figure(2, columns, size=(11.0, 5.6), title=title)
    panels = iter(axes.flat)

    steps = [line["step"] for line in train]
    for name in names:
        _plot_loss(next(panels), name, steps, [line["losses"][name] for line in train], plateaus.get(name))
    rate = next(panels)
    rate.plot(steps, [line["lr"] for line in train], color=GREY, marker="." if len(steps) == 1 else "", linewidth=1.4)
    rate.set_title("learning rate")
    rate.set_ylim(bottom=0)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    _plot_ap(next(panels), evaluations)

    for panel in axes.flat:
        panel.set_xlim(0, 1.03 * max(steps, default=1))
    for panel in panels:
        panel.set_axis_off()
    for panel in axes[-1]:
        panel.set_xlabel("optimiser step")
    return figure


@mpl.rc_context(STYLE)
def ap_by_size(
    metrics: Mapping[str, float], *, ceiling: Mapping[str, float] | None = None, method: str = "SOLQ", title: str = ""
) -> Figure:
    """Box, mask and boundary AP, overall and by object size, beside the ceiling of the codec.

    Args:
        metrics: "box.AP", "segm.APs", ... in 0..1, as `Evaluation.metrics`.
        ceiling: the same numbers of the codec's ceiling.
        method: whose numbers these are; chooses the colour.
        title: what is compared.
    """
    kinds = [kind for kind in KIND_COLOURS if f"{kind}.AP" in metrics]
    figure, axes = new_figure(1, max(len(kinds), 1), size=(11.0, 3.2), title=title)
    for place, kind in zip(axes.flat, kinds, strict=False):
        ours = [metrics.get(f"{kind}.{key}", math.nan) for key in SIZES]
        best = None if ceiling is None else [ceiling.get(f"{kind}.{key}", math.nan) for key in SIZES]
        _bars(place, list(SIZES.values()), ours, best, method)
        place.set_title(f"{kind} AP")
    axes[0, 0].set_ylabel("AP, percent")
    return figure


@mpl.rc_context(STYLE)
def ap_by_class(
    per_class: Mapping[str, Mapping[str, float]],
    *,
    kind: str = "segm",
    ceiling: Mapping[str, Mapping[str, float]] | None = None,
    method: str = "SOLQ",
    most: int = 30,
    title: str = "",
) -> Figure:
    """AP of each class, best first, beside the ceiling of the codec.

    Args:
        per_class: class name -> {"segm.AP": 0..1, ...}, as `Evaluation.per_class`; NaN (no objects) is left out.
        kind: "box", "segm" or "boundary".
        ceiling: the same numbers of the codec's ceiling.
        method: whose numbers these are; chooses the colour.
        most: classes shown; of more, the best and the worst.
        title: what is compared.
    """
    key = f"{kind}.AP"
    known = {name: values[key] for name, values in per_class.items() if not math.isnan(values.get(key, math.nan))}
    order = sorted(known, key=lambda name: -known[name])
    if len(order) > most:
        order = order[: most // 2] + order[-(most - most // 2) :]
    figure, axes = new_figure(1, 1, size=(11.0, 3.4), title=title)
    best = None if ceiling is None else [ceiling.get(name, {}).get(key, math.nan) for name in order]
    _bars(axes[0, 0], order, [known[name] for name in order], best, method)
    axes[0, 0].set_ylabel(f"{kind} AP, percent")
    if len(order) > 10:
        axes[0, 0].tick_params(axis="x", labelrotation=60)
    return figure


def _plot_loss(axes: Axes, name: str, steps: Sequence[int], values: Sequence[float], plateau: float | None) -> None:
    dots = "." if len(steps) == 1 else ""  # a line of one point would show nothing
    axes.plot(steps, values, color=LOSS_COLOURS[name], marker=dots, linewidth=1.4, label="last decoder layer")
    axes.set_title(f"loss: {LOSS_TITLES[name]}")
    if plateau is not None:
        axes.axhline(plateau, color=GREY, linestyle="--", linewidth=1.2, label="plateau: predict the median")
        axes.legend(loc="lower left")
    axes.set_ylim(0, 1.1 * max([*values, plateau or 0.0], default=1.0))
    axes.set_ylabel("unweighted")


def _plot_ap(axes: Axes, evaluations: Sequence[Mapping[str, Any]]) -> None:
    axes.set_title("AP on the validation images")
    axes.set_ylabel("percent")
    steps = [line["step"] for line in evaluations]
    for kind, colour in KIND_COLOURS.items():
        shares = [line["metrics"].get(f"{kind}.AP") for line in evaluations]
        values = [math.nan if share is None else 100 * share for share in shares]
        if not np.isnan(values).all():
            axes.plot(steps, values, color=colour, marker="o", markersize=3.5, linewidth=1.4, label=kind)
    if axes.get_lines():
        axes.set_ylim(bottom=0)
        axes.legend(loc="best")
    else:
        axes.text(0.5, 0.5, "none yet", transform=axes.transAxes, ha="center", color=GREY)


def _bars(axes: Axes, names: Sequence[str], ours: Sequence[float], best: Sequence[float] | None, method: str) -> None:
    """One bar per name in the method's colour, the ceiling behind it as a wider, paler one."""
    places = np.arange(len(names))
    if best is not None and not np.isnan(best).all():
        colour = METHOD_COLOURS["ceiling"]
        axes.bar(places, 100 * np.asarray(best), width=0.8, color=colour, alpha=0.3, label="ceiling of the codec")

    heights = 100 * np.nan_to_num(ours)  # without objects: a bar of no height, labelled "-"
    bars = axes.bar(places, heights, width=0.55, color=METHOD_COLOURS[method], label=method)
    axes.bar_label(bars, labels=["-" if math.isnan(value) else f"{100 * value:.0f}" for value in ours], fontsize=8)
    axes.set_xticks(places, names)
    axes.grid(axis="x", visible=False)
    axes.set_ylim(0, 105)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, fontsize=8)
