"""The detection and the attention explorer in JupyterLab, driven by Chromium on the shipped weights."""

from __future__ import annotations

import pytest
from browser import find_chromium, open_notebook
from playwright.sync_api import expect

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(find_chromium() is None, reason="no chromium or google-chrome on the PATH"),
]

ANSWERED = 20_000  # milliseconds that the kernel may take


def test_objects_can_be_clicked_and_their_attention_chosen(tmp_path):
    with open_notebook("attention_explorer.ipynb", tmp_path) as notebook:
        notebook.run_all(seconds=180)
        page = notebook.page
        objects = page.locator(".solq-clickable .solq-object")
        panels = page.locator("img.widget-image").nth(1)
        objects.first.wait_for(timeout=20_000)
        clickable, box = page.locator(".solq-clickable").bounding_box(), objects.first.bounding_box()
        assert clickable["x"] - 1 <= box["x"] <= box["x"] + box["width"] <= clickable["x"] + clickable["width"] + 1
        assert clickable["y"] - 1 <= box["y"] <= box["y"] + box["height"] <= clickable["y"] + clickable["height"] + 1
        panels.scroll_into_view_if_needed()
        shown, ratio = panels.bounding_box(), panels.evaluate("image => image.naturalWidth / image.naturalHeight")
        assert shown["width"] / shown["height"] == pytest.approx(ratio, rel=0.02)  # not stretched
        before = panels.screenshot()
        notebook.choose("layer", "1")
        before = notebook.wait_for_change(panels, before)
        notebook.choose("head", "2")
        before = notebook.wait_for_change(panels, before)
        notebook.screenshot("attention_explorer")
        if objects.count() > 1:  # the last one in the page is the smallest, and lies on top
            chosen = notebook.control("object").locator("select").input_value()
            page.locator(".solq-clickable .solq-object:not(.solq-chosen)").last.click()
            notebook.wait_for_change(panels, before)
            assert notebook.control("object").locator("select").input_value() != chosen
        assert notebook.errors == []


def test_detections_follow_score_switches_and_clicks(tmp_path):
    with open_notebook("detection_explorer.ipynb", tmp_path) as notebook:
        notebook.run_all(seconds=180)
        page = notebook.page
        image = page.locator(".solq-clickable img")
        objects, switches = page.locator(".solq-clickable .solq-object"), page.locator(".widget-toggle-button")
        objects.first.wait_for(timeout=20_000)
        image.scroll_into_view_if_needed()
        untouched = image.screenshot()
        handle = page.locator(".solq-clickable + .widget-hslider .noUi-handle")
        handle.focus()
        handle.press("End")  # the wipe: now the first model has the whole image, and its switches show
        before = notebook.wait_for_change(image, untouched)
        count = objects.count()
        assert switches.count() >= count > 0
        switches.first.click()
        expect(objects).to_have_count(count - 1, timeout=ANSWERED)
        before = notebook.wait_for_change(image, before)
        switches.first.click()
        before = notebook.wait_for_change(image, before)
        objects.first.click()
        expect(objects).to_have_count(count - 1, timeout=ANSWERED)  # the frame under the mouse changes the image too
        before = image.screenshot()
        notebook.move_slider("score", "ArrowRight", times=12)
        notebook.wait_for_change(image, before)
        notebook.screenshot("detection_explorer")
        assert notebook.errors == []
