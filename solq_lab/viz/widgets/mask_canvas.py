"""A canvas to draw a mask with the mouse. Strokes appear in the browser at once; the kernel gets each as a bitmap."""

import anywidget
import numpy as np
import traitlets
from ipywidgets.widgets.trait_types import CByteMemoryView

SIDE = 160  # pixels of the mask


class MaskCanvas(anywidget.AnyWidget):
    """Draw with the mouse, erase with the shift key held.

    Attributes:
        bits: SIDE * SIDE bytes, 1 inside the mask; empty before the first stroke.
    """

    side = traitlets.Int(SIDE).tag(sync=True)
    bits = CByteMemoryView(b"").tag(sync=True)  # a browser sends a memoryview, which `traitlets.Bytes` rejects

    _css = """
    .solq-canvas canvas {width: 240px; height: 240px; border: 1px solid #888; cursor: crosshair; touch-action: none}
    """
    _esm = """
    function render({ model, el }) {
      const side = model.get("side"), canvas = document.createElement("canvas");
      const clear = document.createElement("button");
      canvas.width = canvas.height = side;
      clear.textContent = "clear";
      el.classList.add("solq-canvas");
      el.append(canvas, document.createElement("br"), clear);
      const pen = canvas.getContext("2d", { willReadFrequently: true });
      let last = null, waiting = false;
      const empty = () => { pen.fillStyle = "black"; pen.fillRect(0, 0, side, side); };
      const send = () => {
        waiting = false;
        const pixels = pen.getImageData(0, 0, side, side).data;
        const bits = Uint8Array.from({ length: side * side }, (_, at) => pixels[4 * at] > 127 ? 1 : 0);
        model.set("bits", new DataView(bits.buffer));
        model.save_changes();
      };
      const stroke = (event) => {
        const frame = canvas.getBoundingClientRect(), scale = side / frame.width;
        const here = [(event.clientX - frame.left) * scale, (event.clientY - frame.top) * scale];
        const from = last ?? here;
        pen.strokeStyle = event.shiftKey ? "black" : "white";
        pen.lineWidth = side / 12;
        pen.lineCap = "round";
        pen.beginPath();
        pen.moveTo(...from);
        pen.lineTo(...here);
        pen.stroke();
        last = here;
        if (!waiting) { waiting = true; setTimeout(send, 150); }  // the kernel needs about as long for a view
      };
      empty();
      clear.onclick = () => { empty(); send(); };
      canvas.onpointerdown = (event) => { canvas.setPointerCapture(event.pointerId); stroke(event); };
      canvas.onpointermove = (event) => { if (event.buttons & 1) stroke(event); };
      canvas.onpointerup = () => { last = null; };
    }
    export default { render };
    """

    @property
    def mask(self) -> np.ndarray:
        """(SIDE, SIDE) bool, what is drawn."""
        drawn = np.frombuffer(self.bits or bytes(self.side**2), dtype=np.uint8)
        return drawn.reshape(self.side, self.side).astype(bool)
