"""A wipe: several drawings of one image in one place, parted by dividers that the mouse moves."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import anywidget
import traitlets

from solq_lab.structures import Detections
from solq_lab.viz.labels import label_of
from solq_lab.viz.style import text_colour
from solq_lab.viz.widgets.clickable_image import percent_boxes

Drawing = tuple[bytes, Detections, Sequence[str], int]  # PNG without labels, objects, colours, row marked or -1


class Wipe(anywidget.AnyWidget):
    """Drawings from left to right, each visible between its dividers.

    Labels are no part of the drawings: each stands within its own part, off the others, so that no divider cuts one.

    Attributes:
        layers: the name and the PNG of each drawing, and of its objects, best first, label, colours and box (percent).
        on_click: is given the name of the drawing and the row of its smallest object at the clicked place.
    """

    layers: Any = traitlets.List().tag(sync=True)

    _css = """
    .solq-wipe {position: relative; overflow: hidden; margin: 0 auto; max-width: 100%; touch-action: none;
                user-select: none; cursor: pointer}
    .solq-wipe img {position: absolute; inset: 0; width: 100%; height: 100%; margin: 0}
    .solq-wipe img:first-child {position: relative; display: block; height: auto}
    .solq-wipe span {position: absolute; padding: 0 4px; font: 12px/17px sans-serif; white-space: nowrap;
                     border-radius: 2px; pointer-events: none}
    .solq-wipe .solq-chosen {box-shadow: 0 0 0 2px white, 0 0 0 4px black}
    .solq-wipe .solq-divider {position: absolute; top: 0; bottom: 0; width: 17px; margin-left: -8px; cursor: ew-resize}
    .solq-wipe .solq-divider::before {content: ""; position: absolute; inset: 0 7px; background: white;
                                      outline: 1px solid black}
    """
    _esm = """
    const MOVES = 8, GAP = 3;  // of a label down, off others; pixels between a label and a divider
    function render({ model, el }) {
      let cuts = [], parts = [];
      el.classList.add("solq-wipe");
      const place = () => {
        const width = el.clientWidth, height = el.clientHeight, taken = [];
        const edges = [0, ...cuts, 1].map((cut) => cut * width);
        parts.forEach(({ image, labels }, part) => {
          const left = edges[part], right = edges[part + 1];
          image.style.clipPath = `inset(0 ${width - right}px 0 ${left}px)`;
          for (const { node, box: [x0, y0, wide] } of labels) {
            // Above what is visible of the object, as far down as others force it.
            const from = Math.max((x0 * width) / 100, left), to = Math.min(((x0 + wide) * width) / 100, right);
            const w = node.offsetWidth, h = node.offsetHeight;
            const x = Math.min(Math.max((from + to - w) / 2, left + GAP), right - w - GAP);
            let y = Math.max((y0 * height) / 100 - h, 0);
            const free = () => taken.every((one) =>
              x >= one.x + one.w || one.x >= x + w || y >= one.y + one.h || one.y >= y + h);
            for (let move = 0; move < MOVES && !free(); move++) y += h + 1;
            const fits = from < to && x >= left + GAP && y + h <= height && free();
            Object.assign(node.style, { left: `${x}px`, top: `${y}px`, visibility: fits ? "visible" : "hidden" });
            if (fits) taken.push({ x, y, w, h });
          }
        });
        el.querySelectorAll(".solq-divider").forEach((one, at) => { one.style.left = `${100 * cuts[at]}%`; });
      };
      const divider = (_, number) => {
        const one = document.createElement("div");
        one.className = "solq-divider";
        one.onpointerdown = (event) => { event.preventDefault(); one.setPointerCapture(event.pointerId); };
        one.onpointermove = (event) => {
          if (!(event.buttons & 1)) return;
          const frame = el.getBoundingClientRect(), x = (event.clientX - frame.left) / frame.width;
          const to = Math.min(Math.max(x, 0), 1);
          // The other divider is pushed along.
          cuts = cuts.map((cut, at) => at < number ? Math.min(cut, to) : at > number ? Math.max(cut, to) : to);
          place();
        };
        return one;
      };
      const paint = async () => {
        const layers = model.get("layers");
        const drawn = layers.map(({ name, png, objects }) => {
          const image = new Image(), title = { label: name, colours: ["#fff", "#000"], box: [0, 0, 100] };
          image.src = URL.createObjectURL(new Blob([png], { type: "image/png" }));
          const named = [title, ...objects].filter(({ label }) => label);
          const labels = named.map(({ label, colours: [background, color], box, chosen }) => {
            const node = Object.assign(document.createElement("span"), { textContent: label });
            Object.assign(node.style, { background, color });
            if (chosen) node.className = "solq-chosen";
            return { node, box };
          });
          return { image, labels };
        });
        await Promise.all(drawn.map(({ image }) => image.decode()));
        drawn.forEach(({ image }) => URL.revokeObjectURL(image.src));
        if (layers !== model.get("layers")) return;  // another was sent in the meantime
        if (cuts.length !== Math.max(layers.length - 1, 0))
          cuts = layers.slice(1).map((_, at) => (at + 1) / layers.length);
        parts = drawn;
        const nodes = parts.flatMap(({ labels }) => labels.map(({ node }) => node));
        el.replaceChildren(...parts.map(({ image }) => image), ...nodes, ...cuts.map(divider));
        el.style.width = `${parts[0]?.image.naturalWidth ?? 0}px`;
        place();
      };
      paint();
      model.on("change:layers", paint);
      el.onclick = ({ target, clientX, clientY }) => {
        if (target.className === "solq-divider") return;  // the end of a drag
        const frame = el.getBoundingClientRect();
        const x = (100 * (clientX - frame.left)) / frame.width, y = (100 * (clientY - frame.top)) / frame.height;
        const { name, objects } = model.get("layers")[cuts.filter((cut) => 100 * cut < x).length];
        const meets = ([left, top, wide, high]) => left <= x && x <= left + wide && top <= y && y <= top + high;
        const area = (row) => objects[row].box[2] * objects[row].box[3];
        const met = [...objects.keys()].filter((row) => meets(objects[row].box));
        if (met.length) model.send({ name, row: met.sort((one, other) => area(one) - area(other))[0] });
      };
      new ResizeObserver(place).observe(el);
    }
    export default { render };
    """

    def __init__(self, on_click: Callable[[str, int], None]) -> None:
        super().__init__()
        self.on_msg(lambda _, click, buffers: on_click(click["name"], click["row"]))

    def show(self, drawings: Mapping[str, Drawing], *, size: tuple[int, int], labelled: bool) -> None:
        """Show drawings from left to right; their names stand at the top.

        Args:
            drawings: by name.
            size: (H, W) of the image that the objects' boxes are in pixels of.
            labelled: whether objects have labels; the mark of an object is its label's.
        """
        layers = []
        for name, (png, objects, colours, chosen) in drawings.items():
            boxes = percent_boxes(objects.boxes.tolist(), size)
            labels = [label_of(objects, row) if labelled else "" for row in range(len(boxes))]
            inks = [[colour, text_colour(colour)] for colour in colours]
            parts = [
                {"label": label, "colours": ink, "box": box, "chosen": row == chosen}
                for row, (label, ink, box) in enumerate(zip(labels, inks, boxes, strict=True))
            ]
            layers.append({"name": name, "png": png, "objects": parts})
        self.layers = layers
