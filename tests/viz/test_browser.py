"""The explorers in JupyterLab, as a user meets them: run all cells, move, look."""

from __future__ import annotations

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
        tile = explorer.locator(".widget-gridbox .widget-gridbox").first
        tile.locator(".widget-label", has_text="0.").wait_for()
        tile.get_by_role("button").click()
        notebook.wait_for_text(numbers, by_components)
        notebook.screenshot("codec_explorer_worst")
        assert notebook.errors == []
