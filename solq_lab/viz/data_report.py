"""What is wrong with a data set, as one HTML page: the counts, the classes, and images of the worst of every kind."""

from __future__ import annotations

import base64
import html
import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageFile

from solq_lab.data.annotations import DataError, clamped_box
from solq_lab.data.folders import Split
from solq_lab.masks import decode_rle
from solq_lab.viz.images import MASK_OPACITY, outline_mask
from solq_lab.viz.style import BLUE, GREY, ORANGE, SKY, STYLE, VERMILION, hide_axes, new_figure
from solq_lab.workbench.check.findings import HEADINGS, RULES, SEVERITIES, Finding
from solq_lab.workbench.check.object_rules import read_mask
from solq_lab.workbench.check.report import Report

ACROSS = 4  # images beside each other
SIDE = 2.6  # inches of an image
MAX_SIDE = 640  # pixels of a shown image's longer side
CHARACTERS = 46  # of a line below an image
SPLIT_COLOURS = (BLUE, ORANGE)
MAX_CLASSES = 100  # in the histogram

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.45 sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em; color: #222 }}
table {{ border-collapse: collapse }} td, th {{ padding: .15em .9em .15em 0; text-align: left; vertical-align: top }}
td.n, th.n {{ text-align: right; font-variant-numeric: tabular-nums }}
img {{ max-width: 100% }} h2 {{ margin-top: 2em }} code, li {{ overflow-wrap: anywhere }} .cure {{ color: #666 }}
</style>
<h1>{title}</h1>
{body}
</html>
"""


def report_page(report: Report, *, title: str, worst: int = 8) -> str:
    """The page of a report, complete in itself.

    Args:
        report: what was found.
        title: of the page.
        worst: images of each rule and split.
    """
    parts = [_summary_table(report)]
    if any(summary.per_class for summary in report.summaries.values()):
        parts.append(_image(class_histogram(report), "objects per class"))
    for severity in SEVERITIES:
        rules = list(report.findings.found(severity))
        if rules:
            parts.append(f"<h2>{html.escape(HEADINGS[severity].capitalize())}</h2>")
            parts += [_rule_section(report, rule, worst) for rule in rules]
    if report.is_clean:
        parts.insert(0, "<p><b>Nothing that would stop or harm a training.</b></p>")
    return PAGE.format(title=html.escape(title), body="\n".join(parts))


@mpl.rc_context(STYLE)
def class_histogram(report: Report) -> Figure:
    """Objects per class and split, the class that the first split has most objects of on top."""
    summaries = report.summaries
    first = next(iter(summaries.values())).per_class
    every = dict.fromkeys(name for summary in summaries.values() for name in summary.per_class)
    names = sorted(every, key=lambda name: first.get(name, 0), reverse=True)[:MAX_CLASSES]
    title = "objects per class" + (f", {len(names)} of {len(every)} classes" if len(names) < len(every) else "")
    figure, axes = new_figure(1, 1, size=(9.0, 0.9 + 0.16 * len(names)), title=title)
    place, height = axes[0, 0], 0.8 / len(summaries)
    for row, (split, summary) in enumerate(summaries.items()):
        counts = [summary.per_class.get(name, 0) for name in names]
        offsets = np.arange(len(names)) + (row - (len(summaries) - 1) / 2) * height
        place.barh(offsets, counts, height, color=SPLIT_COLOURS[row % 2], label=f"{split} ({sum(counts)})")
    place.set_yticks(range(len(names)), [_for_figure(name, 30) for name in names], fontsize=7)
    place.set_ylim(len(names) - 0.5, -0.5)
    place.set_xscale("symlog", linthresh=1)
    place.set_xlabel("objects")
    place.grid(axis="y", visible=False)
    place.legend(loc="lower right")
    return figure


@mpl.rc_context(STYLE)
def finding_images(report: Report, split: Split, findings: Sequence[Finding]) -> Figure:
    """The images that findings of a split are about, with the annotated box and mask of the object."""
    rows = -(-len(findings) // ACROSS)
    figure, axes = new_figure(rows, ACROSS, size=(ACROSS * SIDE, rows * (SIDE + 0.55)))
    for place in axes.flat:
        hide_axes(place)
    for place, finding in zip(axes.flat, findings, strict=False):
        entry = report.entries.get(split.name, {}).get(finding.annotation_id)
        size = _draw_image(place, split.images / finding.file_name)
        if entry is not None:
            _draw_object(place, entry, size)
        text = _for_figure(finding.message, 3 * CHARACTERS)
        place.set_title("\n".join(textwrap.wrap(text, CHARACTERS)), fontsize=6.5, loc="left")
    return figure


def _draw_image(axes: Axes, path: Path) -> tuple[int, int]:
    """Show an image in its own pixels, what can be read of it, or an empty frame; its (height, width)."""
    ImageFile.LOAD_TRUNCATED_IMAGES = True  # a truncated image is shown as far as it goes
    try:
        with Image.open(path) as opened:
            width, height = opened.size
            opened.draft("RGB", (MAX_SIDE, MAX_SIDE))
            small = opened.convert("RGB")
            small.thumbnail((MAX_SIDE, MAX_SIDE))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        axes.set(xlim=(0, 1), ylim=(1, 0), aspect="equal")
        axes.add_patch(Rectangle((0, 0), 1, 1, fill=False, edgecolor=GREY))
        axes.text(0.5, 0.5, "no image", horizontalalignment="center", color=GREY)
        return 1, 1
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False
    axes.imshow(np.asarray(small), extent=(0, width, height, 0))
    return height, width


def _draw_object(axes: Axes, entry: dict, size: tuple[int, int]) -> None:
    """An object's mask and its box as annotated, as far as they can be read; the view grows to a box outside."""
    height, width = size
    try:
        mask = read_mask(entry, size, "mask")
    except DataError:
        mask = None
    if mask is not None and (pixels := decode_rle([mask])[0].numpy()).any():
        paint = np.zeros((*pixels.shape, 4))
        paint[pixels] = (*mpl.colors.to_rgb(SKY), MASK_OPACITY)
        axes.imshow(paint, extent=(0, width, height, 0))
        outline_mask(axes, pixels, SKY)
    try:
        clamped_box(entry.get("bbox"), height, width, "box")
    except DataError:
        return
    x, y, w, h = entry["bbox"]
    axes.add_patch(Rectangle((x, y), w, h, fill=False, edgecolor=VERMILION, linewidth=1.6))
    reach = 2 * max(size)
    left, right = max(min(0, x, x + w), -reach), min(max(width, x, x + w), reach)
    top, bottom = max(min(0, y, y + h), -reach), min(max(height, y, y + h), reach)
    axes.set(xlim=(left, right), ylim=(bottom, top))


def _rule_section(report: Report, rule: str, worst: int) -> str:
    about = RULES[rule]
    counts = ", ".join(f"{count} in {split}" for split, count in report.findings.counts[rule].items())
    parts = [f"<h3>{html.escape(about.title)}: {html.escape(counts)}</h3>"]
    parts.append(f"<p class=cure><code>{rule}</code>{': ' + html.escape(about.cure) if about.cure else ''}</p>")
    for split in report.splits:
        findings = report.findings.worst(rule, split.name)
        shown = [finding for finding in findings if finding.file_name is not None][:worst]
        drawn = about.severity != "note" and rule not in ("image-missing", "path-leaves-folder")
        if drawn and shown:
            parts.append(_image(finding_images(report, split, shown), f"{about.title}, {split.name}"))
        lines = [f"<li>{html.escape(_plain(finding.message, 400))}" for finding in findings[:20]]
        more = report.findings.counts[rule][split.name] - len(lines)
        if lines:
            rest = f"<li>and {more} more" if more else ""
            parts.append(
                f"<details><summary>{html.escape(split.name)}</summary><ul>{''.join(lines)}{rest}</ul></details>"
            )
    return "\n".join(parts)


def _summary_table(report: Report) -> str:
    rows = [
        ("images", [s.images for s in report.summaries.values()]),
        ("without objects", [s.empty for s in report.summaries.values()]),
        ("objects", [s.objects for s in report.summaries.values()]),
        ("crowd regions", [s.crowds for s in report.summaries.values()]),
        ("objects per image, median", [f"{s.median:g}" for s in report.summaries.values()]),
        ("objects per image, most", [s.most for s in report.summaries.values()]),
    ]
    head = "".join(f"<th class=n>{html.escape(split)}" for split in report.summaries)
    body = "".join(f"<tr><td>{name}{''.join(f'<td class=n>{v}' for v in values)}" for name, values in rows)
    files = "".join(f"<br>{html.escape(f'{s.name}: {s.annotations}, images in {s.images}')}" for s in report.splits)
    return f"<table><tr><th>{head}{body}</table><p class=cure>{files.removeprefix('<br>')}</p>"


def _image(figure: Figure, description: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<p><img alt="{html.escape(description)}" src="data:image/png;base64,{data}">'


def _plain(text: str, longest: int) -> str:
    """A text from an annotation file, printable and not too long."""
    printable = "".join(character if character.isprintable() else "?" for character in text)
    return printable if len(printable) <= longest else printable[: longest - 3] + "..."


def _for_figure(text: str, longest: int) -> str:
    return _plain(text, longest).replace("$", r"\$")  # a pair of them would be a formula
