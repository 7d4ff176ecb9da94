"""The explorers in JupyterLab, as a user meets them: run all cells, move, look."""

import re

import numpy as np
import pytest
from browser import find_chromium, open_notebook
from PIL import Image
from playwright.sync_api import expect

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(find_chromium() is None, reason="no chromium or google-chrome on the PATH"),
]
expect.set_options(timeout=20_000)  # milliseconds that the kernel may take


def iou_of(text: str) -> float:
    return float(re.search(r"IoU\s+([01]\.\d+)", text).group(1))


def vector_bytes(text: str) -> int:
    return int(re.search(r"vector\s+([\d,]+) bytes", text).group(1).replace(",", ""))


def test_the_codec_explorer_answers_to_its_controls(tmp_path):
    with open_notebook("codec_explorer.ipynb", tmp_path) as notebook:
        notebook.run_all(seconds=300)
        explorer = notebook.page.locator(".jp-OutputArea .widget-vbox").first
        explorer.scroll_into_view_if_needed()
        numbers, panels = explorer.locator(".widget-html").first, explorer.locator(".widget-gridbox").first
        decoded, error = panels.locator("img").nth(2), panels.locator("img").nth(4)

        before = numbers.inner_text()
        assert "boundary IoU" in before
        seen, wrong = decoded.screenshot(), error.screenshot()
        notebook.move_slider("n_k", "ArrowLeft", times=4)
        seen, wrong = notebook.wait_for_change(decoded, seen), notebook.wait_for_change(error, wrong)
        fewer = notebook.wait_for_text(numbers, before)
        notebook.screenshot("codec_explorer_fewer_coefficients")

        notebook.choose("object", notebook.options("object")[1])
        seen = notebook.wait_for_change(decoded, seen)
        other = notebook.wait_for_text(numbers, fewer)

        notebook.choose("method", "pca")
        notebook.wait_for_change(decoded, seen)
        by_components = notebook.wait_for_text(numbers, other)
        notebook.screenshot("codec_explorer_other_method")

        explorer.get_by_role("button", name="find the worst").click()
        tile = explorer.locator(".widget-gridbox .widget-vbox").filter(visible=True).first
        tile.locator(".widget-html", has_text="0.").wait_for()
        tile.get_by_role("button").click()
        notebook.wait_for_text(numbers, by_components)
        notebook.screenshot("codec_explorer_worst")
        assert notebook.errors == []


def test_vectors_suffer_codecs_stand_side_by_side_and_views_are_saved(tmp_path):
    with open_notebook("codec_explorer.ipynb", tmp_path) as notebook:
        notebook.run_all(seconds=400)
        page, explorer = notebook.page, notebook.page.locator(".jp-OutputArea .widget-vbox").first
        numbers = explorer.locator(".widget-html", has_text="boundary IoU").first
        clean = numbers.inner_text()
        notebook.move_slider("rounding", "ArrowRight", times=3)
        numbers.get_by_text("coded ideally").wait_for()
        assert vector_bytes(numbers.inner_text()) < vector_bytes(clean) / 2
        notebook.move_slider("rounding", "Home")
        expect(numbers).to_have_text(clean, use_inner_text=True)
        notebook.move_slider("noise", "End")
        assert iou_of(notebook.wait_for_text(numbers, clean)) < iou_of(clean) - 0.02

        for method in ("dct", "fourier"):
            notebook.choose("method", method)
            explorer.get_by_role("button", name="compare").click()
        captions = explorer.locator(".widget-gridbox .widget-html", has_text=": IoU 0.").filter(visible=True)
        expect(captions).to_have_count(2)
        dct, fourier = captions.all_inner_texts()
        assert dct.startswith("DCT,")
        assert fourier.startswith("Fourier contour,")
        assert iou_of(dct) == iou_of(clean)  # without noise
        notebook.screenshot("codec_explorer_side_by_side")
        captions.first.locator("xpath=..").get_by_role("button").click()
        expect(notebook.control("method").locator("select")).to_have_value("dct")

        for ending in ("png", "svg", "gif"):
            explorer.get_by_role("button", name=ending.upper()).click()
            said = explorer.get_by_text(re.compile(rf"saved as .*\.{ending}"))
            said.wait_for()
            path = tmp_path / said.inner_text().removeprefix("saved as ")
            assert "</svg>" in path.read_text() if ending == "svg" else Image.open(path).size > (300, 150)
        assert Image.open(path).n_frames > 10

        Image.fromarray(np.pad(np.full((20, 20), 240, np.uint8), 15)).save(tmp_path / "square.png")
        with page.expect_file_chooser() as chooser:
            explorer.get_by_role("button", name="own image").click()
        chooser.value.set_files(tmp_path / "square.png")
        expect(notebook.control("data set").locator("select")).to_have_value("own mask")
        notebook.move_slider("noise", "Home")
        expect(numbers).to_contain_text(
            re.compile(r"^\s*IoU\s*0\.9[78]")
        )  # the square, without noise; its corners are lost
        assert notebook.errors == []


def test_a_mask_drawn_with_the_mouse_has_an_iou(tmp_path):
    with open_notebook("codec_explorer.ipynb", tmp_path) as notebook:
        notebook.run_all(seconds=400)
        page, explorer = notebook.page, notebook.page.locator(".jp-OutputArea .widget-vbox").first
        explorer.scroll_into_view_if_needed()
        numbers = explorer.locator(".widget-html", has_text="boundary IoU").first
        before = numbers.inner_text()
        explorer.get_by_text("draw your own mask").click()
        canvas = explorer.locator(".solq-canvas canvas")
        canvas.scroll_into_view_if_needed()
        frame = canvas.bounding_box()
        page.mouse.move(frame["x"] + 60, frame["y"] + 60)
        page.mouse.down()
        for x, y in ((180, 60), (180, 180), (60, 180), (100, 110)):
            page.mouse.move(frame["x"] + x, frame["y"] + y, steps=8)
        page.mouse.up()
        drawn = notebook.wait_for_text(numbers, before)
        assert notebook.control("data set").locator("select").input_value() == "own mask"
        assert 0.5 < iou_of(drawn) < 1
        notebook.screenshot("codec_explorer_drawn")
        explorer.get_by_role("button", name="compare").click()
        explorer.locator(".widget-html", has_text="100: IoU 0.").wait_for()
        canvas.scroll_into_view_if_needed()
        explorer.get_by_role("button", name="clear").last.click()
        explorer.get_by_text("the mask is empty").wait_for()
        assert notebook.errors == []
