"""What the codec explorer draws of several settings: side by side, as a gallery, as an animation."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from solq_lab.viz.style import CODEC_NAMES, ORANGE, STYLE, new_figure, save_animation
from solq_lab.viz.widgets.codec_lab import CodecLab, ScoredObject
from solq_lab.viz.widgets.codec_panels import SIDE, Setting, error_image, fit_square, grey

GALLERY = 10  # objects
FRAME_MILLISECONDS = 200


def describe(setting: Setting) -> str:
    """The codec of a setting in words."""
    return f"{CODEC_NAMES[setting.method]}, N = {setting.mask_size}, n_k = {setting.vector_dim}"


def gallery_title(setting: Setting, count: int) -> str:
    """What the gallery shows."""
    what = f"{count} worst reconstructions of" if count else "No object of this size in"
    return f"{what} {setting.data_set}: {describe(setting)}"


def errors_of(lab: CodecLab, setting: Setting, side: int = SIDE) -> np.ndarray:
    """(side, side, 3): the surroundings of a setting's object with the pixels that are missed and added."""
    item = lab.folder(setting.data_set)[setting.row]
    pixels = lab.pixels(setting.data_set, item.image)
    return fit_square(error_image(pixels, item, lab.reconstruction(setting).rle)[0], side, sharp=True)


def thumbnail(lab: CodecLab, setting: Setting, one: ScoredObject, side: int) -> tuple[np.ndarray, str]:
    """Pixels (side, side, 3) and caption of an object of the gallery, decoded whole and without noise."""
    whole = setting._replace(row=one.row, terms=setting.vector_dim, error=0.0, step=0.0)
    return errors_of(lab, whole, side), f"{lab.folder(setting.data_set)[one.row].name} {one.iou:.2f}"


def compared_tile(lab: CodecLab, setting: Setting) -> tuple[np.ndarray, str]:
    """A setting's reconstruction beside its errors, (SIDE, 2 * SIDE, 3), and a caption."""
    found = lab.reconstruction(setting)
    decoded = fit_square(grey(found.decoded.numpy()), sharp=True)
    return np.hstack([decoded, errors_of(lab, setting)]), f"{describe(setting)}: IoU {found.iou:.3f}"


@mpl.rc_context(STYLE)
def side_by_side(lab: CodecLab, settings: Mapping[str, Setting], *, width: float, title: str) -> Figure:
    """Reconstruction above errors for each setting, `width` inches each."""
    size = width * len(settings), 0.64 + 2 * width
    figure, axes = new_figure(2, len(settings), size=size, title=title, of_images=True)
    for (above, below), (name, setting) in zip(axes.T, settings.items(), strict=True):
        found = lab.reconstruction(setting)
        above.imshow(grey(found.decoded.numpy()))
        above.set_title(name)
        below.imshow(errors_of(lab, setting))
        below.set_title(f"IoU {found.iou:.2f}")
    return figure


@mpl.rc_context(STYLE)
def gallery_figure(lab: CodecLab, setting: Setting, worst: Sequence[ScoredObject]) -> Figure:
    """The worst objects of a codec in two rows."""
    title = gallery_title(setting, len(worst))
    figure, axes = new_figure(2, GALLERY // 2, size=(11.8, 5.4), title=title, of_images=True)
    for place, one in zip(axes.flat, worst, strict=False):
        pixels, caption = thumbnail(lab, setting, one, SIDE)
        place.imshow(pixels)
        place.set_title(caption)
    return figure


def animate(lab: CodecLab, setting: Setting, counts: Sequence[int], path: Path) -> None:
    """Write the sums of the vector's first entries as a GIF: decoded, binary, and the errors."""
    frames = []
    for count in counts:
        part = setting._replace(terms=count)
        found = lab.reconstruction(part)
        images = [fit_square(grey(values.numpy()), sharp=True) for values in (found.decoded, found.binary)]
        frame = Image.fromarray(np.hstack([*images, errors_of(lab, part)]))
        ImageDraw.Draw(frame).text((4, 2), f"{count} of {counts[-1]}: IoU {found.iou:.3f}", fill=ORANGE)
        frames.append(frame)
    save_animation(frames, path, milliseconds=FRAME_MILLISECONDS)
