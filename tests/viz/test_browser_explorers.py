"""The detection and the attention explorer in JupyterLab, driven by Chromium on the shipped weights."""

import re

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
        panels = page.locator("img.widget-image").first
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
        for view in ("layer by layer", "all queries", "encoder, a pixel", "points"):
            page.get_by_role("button", name=view).click()
            before = notebook.wait_for_change(panels, before)
            if view == "encoder, a pixel":
                page.locator(".solq-clickable").click(position={"x": clickable["width"] / 4, "y": 40})
                before = notebook.wait_for_change(panels, before)
            notebook.screenshot(f"attention_explorer_{view.replace(' ', '_')}")
        if objects.count() > 1:  # the last one in the page is the smallest, and lies on top
            chosen = notebook.control("object").locator("select").input_value()
            page.locator(".solq-clickable .solq-object:not(.solq-chosen)").last.click()
            notebook.wait_for_change(panels, before)
            assert notebook.control("object").locator("select").input_value() != chosen
        assert notebook.errors == []


def test_detections_follow_chooser_score_chips_and_clicks(tmp_path):
    with open_notebook("detection_explorer.ipynb", tmp_path) as notebook:
        notebook.run_all(seconds=400)
        page = notebook.page
        panels = page.locator(".solq-panel")
        panels.nth(1).locator(".solq-object").first.wait_for(timeout=ANSWERED)
        assert panels.count() == 3
        row, window = panels.nth(2).bounding_box(), page.locator(".jp-OutputArea-output").last.bounding_box()
        assert row["x"] + row["width"] > 0.9 * (window["x"] + window["width"])  # as wide as the window
        image, objects = panels.nth(1).locator("img"), panels.nth(1).locator(".solq-object")
        chips = panels.nth(1).locator(".widget-toggle-button")
        image.scroll_into_view_if_needed()
        notebook.choose("first", "most AP lost")
        truth = panels.nth(0)
        truth.locator(".solq-chosen").wait_for(timeout=ANSWERED)

        expect(objects).to_have_count(count := chips.count(), timeout=ANSWERED)
        assert count > 0
        before = image.screenshot()
        chips.first.hover()
        shadow = panels.nth(1).locator(".solq-object-0")
        assert shadow.evaluate("one => getComputedStyle(one).boxShadow") != "none"  # the chip marks its object
        chips.first.click()
        expect(objects).to_have_count(count - 1, timeout=ANSWERED)
        page.mouse.move(0, 0)
        before = notebook.wait_for_change(image, before)
        chips.first.click()
        expect(objects).to_have_count(count, timeout=ANSWERED)
        objects.last.click()
        expect(objects).to_have_count(count - 1, timeout=ANSWERED)
        notebook.screenshot("detection_explorer")
        notebook.choose("size", "small")
        page.locator(".solq-chosen").wait_for(timeout=ANSWERED)

        page.get_by_role("button", name="wipe", exact=True).click()
        wipe, dividers = page.locator(".solq-wipe"), page.locator(".solq-divider")
        dividers.nth(1).wait_for(timeout=ANSWERED)
        wipe.scroll_into_view_if_needed()
        assert wipe.locator("img").count() == 3
        frame, seen = wipe.bounding_box(), []
        for number, to in ((0, 0.5), (0, 0.8), (1, 0.3)):  # the second and third push the other divider along
            place = dividers.nth(number).bounding_box()
            page.mouse.move(place["x"] + place["width"] / 2, place["y"] + 60)
            page.mouse.down()
            page.mouse.move(frame["x"] + to * frame["width"], place["y"] + 70, steps=5)
            page.mouse.up()
            cuts = [one.bounding_box()["x"] + place["width"] / 2 for one in dividers.all()]
            assert cuts[number] == pytest.approx(frame["x"] + to * frame["width"], abs=2)
            assert cuts == sorted(cuts)
            labels = [one.bounding_box() for one in wipe.locator("span").filter(visible=True).all()]
            seen.append(len(labels))
            for one in labels:
                assert not any(one["x"] < cut < one["x"] + one["width"] for cut in cuts)  # no label is cut
            clips = [image.evaluate("one => one.style.clipPath") for image in wipe.locator("img").all()]
            assert len(set(clips)) == 3
            notebook.screenshot(f"detection_explorer_wipe_{to}")
        assert min(seen) > 1
        chips = page.locator(".widget-toggle-button.mod-active[class*=solq-chip]")
        count = chips.count()
        label = wipe.locator("span", has_text=re.compile(r" 0\.\d\d$")).filter(visible=True).first.bounding_box()
        page.mouse.click(label["x"] + label["width"] / 2, label["y"] + label["height"] + 4)  # the object below it
        expect(chips).to_have_count(count - 1, timeout=ANSWERED)
        assert notebook.errors == []


def test_a_click_in_a_gallery_of_failures_opens_that_object(tmp_path):
    with open_notebook("fig6_failure_cases.ipynb", tmp_path) as notebook:
        notebook.run_all(seconds=500)
        page = notebook.page
        assert page.locator("img[src^=data]").count() == 1  # the bars of lost AP; the gallery is seen once
        tile = page.locator(".solq-clickable").first.locator(".solq-object").nth(8)  # the first six are background
        tile.scroll_into_view_if_needed()
        wanted = int(re.search(r"image (\d+)", tile.get_attribute("title")).group(1))
        tile.click()
        page.locator(".solq-panel .solq-chosen").wait_for(timeout=ANSWERED)
        assert int(notebook.control("image").locator("input").input_value()) == wanted - 1  # ids count from 1
        assert notebook.errors == []
