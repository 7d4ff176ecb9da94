"""The explorers in JupyterLab, as a user meets them: run all cells, move, look."""

from __future__ import annotations

import re

import pytest
from browser import find_chromium, open_notebook

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(find_chromium() is None, reason="no chromium or google-chrome on the PATH"),
]


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
        tile = explorer.locator(".widget-gridbox .widget-gridbox").filter(visible=True).first
        tile.locator(".widget-label", has_text="0.").wait_for()
        tile.get_by_role("button").click()
        notebook.wait_for_text(numbers, by_components)
        notebook.screenshot("codec_explorer_worst")
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
        assert 0.5 < float(re.search(r"IoU\s+(0\.\d+)", drawn).group(1)) < 1
        notebook.screenshot("codec_explorer_drawn")
        explorer.get_by_role("button", name="compare").click()
        explorer.locator(".widget-label", has_text="100: IoU 0.").wait_for()
        canvas.scroll_into_view_if_needed()
        explorer.get_by_role("button", name="clear").last.click()
        explorer.get_by_text("the mask is empty").wait_for()
        assert notebook.errors == []
