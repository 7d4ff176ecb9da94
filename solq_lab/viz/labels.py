"""Labels of objects: texts in an image that keep off each other."""

from collections.abc import Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.backend_bases import RendererBase
from matplotlib.colors import to_rgb
from matplotlib.font_manager import FontProperties
from matplotlib.path import Path
from matplotlib.transforms import Bbox, BboxTransformTo

from solq_lab.structures import Detections
from solq_lab.viz.style import text_colour

PAD = 0.6  # around a text, points
OPACITY = 0.8  # of what is behind it
Label = tuple[str, tuple[float, float], str]  # a text, the point (x, y) below it in pixels of the image, its colour
MOVES = np.array([0, *(sign * count for count in range(1, 8) for sign in (-1, 1))])  # off others, in own heights
MAX_SHOWN = 30  # in one image: more would cover it, and take longer than all else that is drawn


def label_of(detections: Detections, row: int) -> str:
    """An object's class and, unless it is 1 as in the ground truth, its score."""
    score = float(detections.scores[row])
    return detections.names[row] + ("" if score == 1 else f" {score:.2f}")


class Labels(Artist):
    """Texts above points of an image; each moves into the axes, and off those before it.

    How large a text is, and how large its axes are, is known only when it is drawn. One artist for all: a `Text` each
    would take longer than the objects.

    Attributes:
        labels: the most important first.
        extents: (K, 2, 2) lower left and upper right corners of those that were drawn last, in pixels of the figure.
    """

    zorder = 3

    def __init__(self, font_size: float, labels: Sequence[Label]) -> None:
        """Labels in a size in points."""
        super().__init__()
        self._font, self.labels = FontProperties(size=font_size), labels
        self.extents = np.empty((0, 2, 2))

    def draw(self, renderer: RendererBase) -> None:
        """Draw the first `MAX_SHOWN` of them that find a place."""
        assert self.axes is not None  # they are always drawn into axes
        self.extents = np.empty((0, 2, 2))
        inside, pad = self.axes.bbox.get_points(), float(np.asarray(renderer.points_to_pixels(PAD)))
        _, line, descent = renderer.get_text_width_height_descent("lp", self._font, ismath=False)
        for text, anchor, colour in self.labels:
            width = renderer.get_text_width_height_descent(text, self._font, ismath=False)[0]
            size = np.array([width, line]) + 2 * pad
            corner = self.axes.transData.transform(anchor) - (size[0] / 2, 0)
            corner = np.maximum(np.minimum(corner, inside[1] - size), inside[0])  # what is too long begins inside

            # Down and up in turn, further and further, until the place is free; without one in a crowd it is left out.
            places = corner + MOVES[:, None] * (0, size[1])
            fits = (places[:, 1] >= inside[0, 1]) & (places[:, 1] + size[1] <= inside[1, 1]) | (MOVES == 0)
            met = (places[:, None] < self.extents[:, 1]) & (self.extents[:, 0] < places[:, None] + size)
            free = np.flatnonzero(fits & ~met.all(axis=2).any(axis=1))
            if not len(free):
                continue
            corner = places[free[0]]
            self.extents = np.concatenate([self.extents, [(corner, corner + size)]])

            context = renderer.new_gc()
            context.set_clip_rectangle(self.axes.bbox)
            context.set_linewidth(0)
            context.set_alpha(OPACITY)
            box = BboxTransformTo(Bbox([corner, corner + size]))
            renderer.draw_path(context, Path.unit_rectangle(), box, to_rgb(colour))
            context.set_alpha(1)
            context.set_foreground(text_colour(colour))
            x, y = corner[0] + pad, corner[1] + pad + descent
            y = renderer.get_canvas_width_height()[1] - y if renderer.flipy() else y
            renderer.draw_text(context, x, y, text, self._font, 0, ismath=False)
            if len(self.extents) == MAX_SHOWN:
                break
