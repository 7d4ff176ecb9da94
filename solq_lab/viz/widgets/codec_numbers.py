"""A reconstruction in numbers: IoU, boundary IoU, and the size of the vector beside other forms of the mask."""

from solq_lab.viz.style import CODEC_COLOURS, GREY, KIND_COLOURS
from solq_lab.viz.widgets.codec_panels import View

NUMBER = (
    '<div style="flex:1;padding:4px 12px;border-left:3px solid {colour};min-width:0">'
    '<div style="font-size:11px;line-height:1.3;opacity:.7">{name}</div>'
    '<div style="font-size:19px;line-height:1.3;font-variant-numeric:tabular-nums">{value}</div>'
    '<div style="font-size:11px;line-height:1.3;opacity:.7">{note}</div></div>'
)


def numbers(view: View) -> list[tuple[str, str, str, str]]:
    """What is said in numbers about a view: name, value, note and colour of each."""
    setting, reconstruction = view.setting, view.reconstruction
    bitmap, rle = (setting.mask_size**2 + 7) // 8, len(view.item.rle["counts"])
    length, form = 4 * setting.vector_dim, "float32"
    if setting.step:
        length, form = round(view.bits / 8), "rounded, coded ideally"
    return [
        ("IoU", f"{reconstruction.iou:.3f}", "with the true mask", KIND_COLOURS["segm"]),
        ("boundary IoU", f"{reconstruction.boundary_iou:.3f}", "along the outline", KIND_COLOURS["boundary"]),
        ("vector", f"{length:,} bytes", f"n_k = {setting.vector_dim}, {form}", CODEC_COLOURS[setting.method]),
        ("bitmap", f"{bitmap:,} bytes", f"{setting.mask_size} x {setting.mask_size} pixels", GREY),
        ("run lengths", f"{rle:,} bytes", "COCO's own form", GREY),
    ]


def numbers_html(view: View) -> str:
    """The numbers side by side, for a widget."""
    parts = (
        NUMBER.format(colour=colour, name=name, value=value, note=note) for name, value, note, colour in numbers(view)
    )
    return f'<div style="display:flex;width:100%">{"".join(parts)}</div>'
