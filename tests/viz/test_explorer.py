"""The codec explorer shows what the codes compute, redraws what changed, and says what it cannot show."""

import io
import json
import logging
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from PIL import Image
from rectangles import HEIGHT, WIDTH, rectangle, rle_of, truth_of
from scipy.fft import dctn, idctn
from scipy.ndimage import binary_erosion

from solq_lab.codecs.dct import DCTCodec
from solq_lab.codecs.kinds import CODECS
from solq_lab.data.annotations import DataError
from solq_lab.data.folders import Split, find_splits
from solq_lab.data.shapes.writer import write_shapes
from solq_lab.masks import decode_rle
from solq_lab.studies.ceiling import Noise, reconstruct_objects
from solq_lab.viz.style import ADDED, MISSED
from solq_lab.viz.widgets.codec_explorer import CodecExplorer
from solq_lab.viz.widgets.codec_lab import VECTOR_DIMS
from solq_lab.viz.widgets.codec_panels import TABLE, Curves, Errors, HeatMap, Original, Target, Vector
from solq_lab.viz.widgets.mask_canvas import SIDE
from solq_lab.viz.widgets.reconstruction import RULES, best_thresholds
from solq_lab.workbench.notebooks import run_notebook

NOTEBOOK = REPOSITORY / "notebooks" / "codec_explorer.ipynb"
logger = logging.getLogger(__name__)

OBJECTS = [(1, 1, (8, 6, 30, 20)), (1, 2, (40, 30, 12, 12)), (3, 1, (0, 0, 64, 48)), (3, 2, (5, 5, 1, 1))]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("shapes") / "easy"
    write_shapes(root, train=1, val=12, processes=1)
    return root


def write_rectangles(root: Path, document: dict) -> dict[str, Split]:
    """A COCO folder of grey images."""
    (root / "annotations").mkdir(parents=True)
    (root / "boxes").mkdir()
    (root / "annotations" / "instances_boxes.json").write_text(json.dumps(document))
    for image in document["images"]:
        Image.new("RGB", (WIDTH, HEIGHT), (90, 120, 150)).save(root / "boxes" / image["file_name"])
    return {"boxes": Split("boxes", root / "boxes", root / "annotations" / "instances_boxes.json")}


@pytest.fixture
def rectangles(tmp_path) -> dict[str, Split]:
    """Two objects in image 0, none in image 1; in image 2 one that fills it, and one of a single pixel."""
    return write_rectangles(tmp_path / "rectangles", truth_of(OBJECTS, images=3))


@pytest.fixture
def explorer(shapes, tmp_path) -> CodecExplorer:
    return CodecExplorer({"shapes": find_splits(shapes)[1]}, tmp_path / "codecs", mask_size=28, vector_dim=64)


def shown(explorer: CodecExplorer, panel: type) -> bytes:
    return explorer._live_panels[panel].image.value


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def said(explorer: CodecExplorer) -> dict[str, str]:
    """The numbers on show, by name."""
    texts = re.findall(r">([^<>]+)</div>", explorer._numbers.value)
    return dict(zip(texts[::3], texts[1::3], strict=True))


# ---- what is shown is what the codes compute


def test_the_decoded_mask_is_a_truncated_cosine_transform(explorer):
    view = explorer.view()
    spectrum = dctn(view.reconstruction.target.numpy().astype(float), norm="ortho")
    kept = np.zeros_like(spectrum)
    places = sorted(np.ndindex(28, 28), key=lambda at: (sum(at), at[0] if sum(at) % 2 else at[1]))[:64]
    for place in places:
        kept[place] = spectrum[place]
    np.testing.assert_allclose(view.reconstruction.decoded, idctn(kept, norm="ortho"), atol=1e-5)
    np.testing.assert_allclose(view.reconstruction.vector, [spectrum[place] for place in places], atol=1e-4)


def test_the_ious_are_those_of_the_masks_in_the_image(explorer):
    view = explorer.view()
    truth, found = decode_rle([view.item.rle, view.reconstruction.rle]).numpy()
    assert view.reconstruction.iou == pytest.approx((truth & found).sum() / (truth | found).sum())
    width = max(1, round(0.02 * np.hypot(*view.item.size)))
    bands = [mask & ~binary_erosion(mask, np.ones((3, 3)), iterations=width) for mask in (truth, found)]
    assert view.reconstruction.boundary_iou == pytest.approx((bands[0] & bands[1]).sum() / (bands[0] | bands[1]).sum())


def test_every_object_comes_back_as_the_ceiling_says(explorer, shapes):
    ceiling = reconstruct_objects(find_splits(shapes)[1].annotations, DCTCodec(28, 64))
    setting = explorer.setting
    ours = [explorer.lab.reconstruction(setting._replace(row=row)).iou for row in range(len(ceiling.ious))]
    np.testing.assert_allclose(ours, ceiling.ious, rtol=1e-6)
    worst = explorer.lab.worst(setting)[:5]
    np.testing.assert_allclose([one.iou for one in worst], np.sort(ceiling.ious)[:5], rtol=1e-6)


def test_the_present_setting_lies_on_its_line(explorer):
    explorer.compare_methods()
    for method, count in (("dct", 100), ("pca", 16), ("flatten", 25), *((other, 16) for other in CODECS)):
        explorer.method.value, explorer.vector_dim.value = method, count
        view = explorer.view()
        curve = view.curves[method]
        assert curve.ious[curve.vector_dims.index(count)] == pytest.approx(view.reconstruction.iou, abs=1e-6), method


def test_the_best_threshold_is_the_best_of_all():
    torch.manual_seed(0)
    values, target = torch.rand(5, 30).round(decimals=1), torch.rand(5, 30) > 0.6
    cuts = best_thresholds(values, target)

    def iou(row: int, threshold: float) -> float:
        mask = values[row] > threshold
        return float((mask & target[row]).sum() / (mask | target[row]).sum())

    for row in range(5):
        assert iou(row, cuts[row]) == max(iou(row, tenth / 10 - 0.05) for tenth in range(11))


def test_partial_sums_grow_to_the_whole(explorer):
    whole = explorer.view().reconstruction
    explorer.terms.value = 10
    part = explorer.view().reconstruction
    assert (part.received[10:] == 0).all()
    torch.testing.assert_close(part.received[:10], whole.vector[:10])
    explorer.terms.value = 64
    torch.testing.assert_close(explorer.view().reconstruction.decoded, whole.decoded)


def test_the_largest_entries_of_a_sparse_code_come_first(explorer):
    explorer.method.value, explorer.vector_dim.value = "sparse", 16
    explorer.terms.value = 3
    reconstruction = explorer.view().reconstruction
    left_out = reconstruction.vector[reconstruction.received == 0].abs()
    assert reconstruction.received.abs().sort().values[-3] >= left_out.max()


def test_noise_grows_in_proportion_and_costs_overlap(explorer):
    clean = explorer.view().reconstruction
    explorer.error.value = 0.1
    little = explorer.view().reconstruction
    explorer.error.value = 1.0
    much = explorer.view().reconstruction
    error = 10 * (little.received - clean.received)
    torch.testing.assert_close(much.received - clean.received, error, rtol=1e-3, atol=1e-3)
    assert much.iou < clean.iou


def test_rounding_is_the_rate_distortion_studys(explorer, shapes):
    explorer.step.value = 1.0
    study = reconstruct_objects(find_splits(shapes)[1].annotations, DCTCodec(28, 64), noise=Noise(step=1.0))
    assert said(explorer)["vector"] == f"{study.bits / 8:,.0f} bytes"
    for row in range(len(study.ious)):
        assert explorer.lab.reconstruction(explorer.setting._replace(row=row)).iou == pytest.approx(study.ious[row])


# ---- what is redrawn


@pytest.mark.parametrize(
    ("control", "value"),
    [("vector_dim", 16), ("terms", 9), ("method", "flatten"), ("rule", "best"), ("error", 0.4), ("step", 2.0)],
)
def test_a_control_redraws_the_reconstruction_and_leaves_the_image_alone(explorer, control, value):
    before = {panel: shown(explorer, panel) for panel in TABLE}
    getattr(explorer, control).value = value
    after = {panel: shown(explorer, panel) for panel in TABLE}
    assert all(after[panel] is before[panel] for panel in (Original, Target))
    moved = {panel for panel in TABLE if after[panel] != before[panel]}
    assert Errors in moved
    assert control == "rule" or {Vector, HeatMap} <= moved


def test_another_object_and_another_size_redraw_what_depends_on_them(explorer):
    explorer.image.value = next(p for p in range(12) if len(explorer.lab.folder("shapes").rows_of(p)) > 1)
    before, numbers = {panel: shown(explorer, panel) for panel in TABLE}, said(explorer)
    explorer.object.index = 1
    assert all(shown(explorer, panel) != before[panel] for panel in TABLE)
    assert said(explorer)["IoU"] != numbers["IoU"]
    image, target = shown(explorer, Original), shown(explorer, Target)
    explorer.mask_size.value = 64
    assert shown(explorer, Original) is image
    assert shown(explorer, Target) != target


def test_one_change_is_one_drawing(explorer):
    drawn = {panel: live.drawn for panel, live in explorer._live_panels.items()}
    explorer.image.value = 3
    explorer.vector_dim.value = 16
    extra = {panel: live.drawn - drawn[panel] for panel, live in explorer._live_panels.items()}
    assert extra == {panel: 1 if panel in (Original, Target) else 2 for panel in TABLE}


def test_a_change_while_another_thread_draws_is_drawn_after_it(explorer, monkeypatch):
    """Each widget has a thread of the kernel; the image of a setting that is gone must not stay."""
    view, steps, drawing = explorer.lab.view, list[str](), threading.Event()

    def slow_view(setting):
        steps.append(f"begin {setting.rule}")
        drawing.set()
        time.sleep(0.2)  # the other thread would overtake
        steps.append(f"end {explorer.rule.value}")
        return view(setting)

    monkeypatch.setattr(explorer.lab, "view", slow_view)
    noisy = threading.Thread(target=lambda: setattr(explorer.error, "value", 1.0))
    noisy.start()
    assert drawing.wait(60)
    explorer.rule.set_state({"index": list(RULES.values()).index("best")})  # as the browser does
    noisy.join()
    assert steps == ["begin codec", "end codec", "begin best", "end best"]


def test_the_animation_ends_with_the_whole_vector_whatever_its_length(explorer):
    for length in (784, 4, 1, *VECTOR_DIMS):
        explorer.vector_dim.value = length
        frames = range(explorer.play.min, explorer.play.max + 1, explorer.play.step)
        assert frames[-1] == explorer.terms.value == length
        assert 1 <= frames[0] <= explorer.play.step


@pytest.mark.parametrize("error", [0.0, 1.0])
def test_no_text_of_the_live_panels_is_cut_off(explorer, error):
    explorer.mask_size.value, explorer.vector_dim.value, explorer.error.value = 64, 784, error
    explorer.terms.value = 783
    for live in explorer._live_panels.values():
        axes, renderer = live.panel.axes, live._agg.get_renderer()
        left, right = axes.get_xlim()
        ticks = [label for label in axes.get_xticklabels() if axes.axison and left <= label.get_position()[0] <= right]
        for text in (axes.title, *ticks):
            extent = text.get_window_extent(renderer)
            assert extent.xmin >= 0, text.get_text()
            assert extent.xmax <= axes.figure.bbox.xmax, text.get_text()


def test_a_second_look_computes_nothing_anew(explorer, monkeypatch):
    seen = [(3, 64), (4, 25), (3, 25)]
    for image, count in seen:
        explorer.image.value, explorer.vector_dim.value = image, count
    monkeypatch.setattr(DCTCodec, "encode", None)  # whoever encodes now fails
    for image, count in seen:
        explorer.image.value, explorer.vector_dim.value = image, count
        assert explorer.message == ""


def test_changes_of_every_kind_are_timed(explorer, record_property):
    """Timings decide nothing: they are logged (pytest --log-cli-level=INFO); the work behind them is checked above."""
    explorer.compare_methods()
    seconds = {}
    changes = {"vector_dim": [49, 36, 25, 16], "terms": [12, 9, 6, 3], "image": [4, 5, 6, 7], "error": [0.1, 0.2]}
    for control, values in (changes | {"method": ["pca", "flatten", "dct"], "rule": ["best", "half"]}).items():
        taken = []
        for value in values:
            start = time.perf_counter()
            getattr(explorer, control).value = value
            taken.append(time.perf_counter() - start)
            assert explorer.message == ""
        seconds[control] = float(np.median(taken))
    for control, taken in seconds.items():
        record_property(f"redraw after {control}, ms", round(1000 * taken))
        logger.info("redraw after %s: %.0f ms", control, 1000 * taken)


def test_the_colours_of_the_errors_are_those_of_the_legend(explorer):
    explorer.vector_dim.value = 4
    found = {tuple(colour) for colour in pixels(shown(explorer, Errors)).reshape(-1, 3).tolist()}
    for colour in (MISSED, ADDED):
        assert tuple(bytes.fromhex(colour[1:])) in found


# ---- gallery, fits, figures


def test_a_click_in_the_gallery_goes_to_that_object(explorer):
    explorer.find_worst()
    assert "worst reconstructions of shapes: DCT, N = 28, n_k = 64" in explorer._gallery_note.value
    drawn = explorer._live_panels[Original].drawn
    explorer.gallery_tiles.images[2].on_click(0, 0.5, 0.5)
    one = explorer._worst[2]
    assert explorer.setting.row == one.row
    assert said(explorer)["IoU"] == f"{one.iou:.3f}"
    assert explorer.gallery_tiles.images[2].objects[0]["name"].endswith(f"{one.iou:.2f}")
    assert explorer._live_panels[Original].drawn <= drawn + 1
    explorer.chooser.sort.value = "lowest IoU"
    assert explorer.setting.row == explorer._worst[0].row
    explorer.chooser.next.click()
    assert explorer.image.value != explorer.lab.folder("shapes")[explorer._worst[0].row].image


def test_the_source_of_the_codec_is_at_hand(explorer):
    assert "class DCTCodec" in explorer._source.value
    explorer.method.value = "haar"
    assert explorer._more.titles[1] == f"source: {CODECS['haar'].path.partition(':')[0].replace('.', '/')}.py"


def test_a_click_in_the_gallery_restores_what_the_gallery_was_made_with(shapes, rectangles, tmp_path):
    splits = {"shapes": find_splits(shapes)[1], "rectangles": rectangles["boxes"]}
    explorer = CodecExplorer(splits, tmp_path / "codecs", mask_size=28, vector_dim=36)
    explorer.find_worst()
    one = explorer._worst[0]
    explorer.data_set.value, explorer.method.value, explorer.vector_dim.value = "rectangles", "flatten", 16
    explorer.gallery_tiles.images[0].on_click(0, 0.5, 0.5)
    assert explorer.setting[:5] == ("shapes", one.row, "dct", 28, 36)
    assert said(explorer)["IoU"] == f"{one.iou:.3f}"


def test_what_goes_wrong_in_a_control_is_shown(explorer, monkeypatch, caplog):
    monkeypatch.setattr(explorer.lab, "view", lambda setting: 1 / 0)
    explorer.vector_dim.value = 36
    assert explorer.message == "ZeroDivisionError: division by zero"
    assert "Traceback" in caplog.text


# ---- settings side by side, own masks, files


def test_pinned_settings_stay_beside_each_other_for_every_object(explorer):
    explorer.pin.click()
    explorer.method.value, explorer.vector_dim.value = "pca", 9
    explorer.pin.click()
    explorer.image.value = 3
    captions = [image.objects[0]["name"] for image in explorer.compared_tiles.images[:2]]
    for caption, (method, count) in zip(captions, (("dct", 64), ("pca", 9)), strict=True):
        setting = explorer.setting._replace(method=method, vector_dim=count, terms=count)
        assert f"n_k = {count}: IoU {explorer.lab.reconstruction(setting).iou:.3f}" in caption
    explorer.compared_tiles.images[0].on_click(0, 0.5, 0.5)
    assert (explorer.method.value, explorer.vector_dim.value) == ("dct", 64)
    for _ in range(3):
        explorer.pin.click()
    assert "4 settings are beside each other already" in explorer.message
    explorer.unpin.click()
    assert explorer.compared_tiles.widget.children[0].layout.display == "none"


def test_a_drawn_mask_is_encoded_like_any_object(explorer):
    drawn = np.zeros((SIDE, SIDE), dtype=bool)
    drawn[30:90, 40:130] = True
    explorer.canvas.bits = drawn.astype(np.uint8).tobytes()
    assert explorer.data_set.value == "own mask"
    view = explorer.view()
    assert view.item.box.tolist() == [40, 30, 130, 90]
    assert view.reconstruction.target.all()
    np.testing.assert_array_equal(decode_rle([view.item.rle])[0], drawn)
    drawn[50:90, 40:100] = False
    explorer.canvas.bits = drawn.astype(np.uint8).tobytes()
    found, truth = decode_rle([explorer.view().reconstruction.rle])[0].numpy(), drawn
    assert said(explorer)["IoU"] == f"{(found & truth).sum() / (found | truth).sum():.3f}"
    explorer.find_worst()
    assert "choose a data set to search" in explorer._gallery_note.value
    explorer.canvas.bits = bytes(SIDE**2)
    assert "the mask is empty" in explorer.message
    explorer.data_set.value = "shapes"
    assert explorer.message == ""


def test_an_own_mask_needs_to_be_drawn_first(explorer):
    explorer.data_set.value = "own mask"
    assert "draw one with the mouse" in explorer.message


def test_the_light_part_of_an_uploaded_image_is_the_mask(explorer):
    pixels = np.full((40, 60, 3), 20, dtype=np.uint8)
    pixels[10:30, 5:25] = 240
    explorer.add_image("mine.png", pixels)
    assert explorer.view().item.box.tolist() == [5, 10, 25, 30]


@pytest.mark.parametrize("ending", ["png", "svg", "gif"])
def test_the_view_is_saved(explorer, tmp_path, ending):
    explorer.savers[ending].click()
    (path,) = (tmp_path / "figures").iterdir()
    assert path.name == f"shapes_0_dct_28_64.{ending}"
    assert str(path) in explorer.message
    if ending == "gif":
        frames = Image.open(path)
        assert frames.n_frames == len(range(explorer.play.min, explorer.play.max + 1, explorer.play.step))
    elif ending == "svg":
        assert "</svg>" in path.read_text()


def test_the_curves_are_errors_and_the_legend_names_what_is_drawn(explorer):
    panel = explorer._live_panels[Curves].panel
    names = [text.get_text() for text in panel.axes.get_legend().get_texts()]
    assert names == ["DCT", "flatten"]
    errors = panel._lines["dct"].get_ydata()
    curve = explorer.view().curves["dct"]
    np.testing.assert_allclose(errors, np.maximum(1 - np.array(curve.ious), 1e-3))
    explorer.compare_methods()
    assert len(panel.axes.get_legend().get_texts()) == 4


def test_a_small_object_is_cut_out_of_its_image(rectangles, tmp_path):
    explorer = CodecExplorer(rectangles, tmp_path, mask_size=28, vector_dim=64)
    panel = explorer._live_panels[Original].panel
    assert "cut out" not in panel.title.get_text()
    explorer.object.index = 1  # 12 of 64 pixels
    assert panel.title.get_text() == "dog, 12 x 12 pixels, cut out"


def test_fitting_says_how_far_it_is(explorer, monkeypatch):
    sentences = []
    monkeypatch.setattr(explorer.lab._cache_of("shapes"), "_report", sentences.append)
    explorer.method.value, explorer.vector_dim.value = "pca", 9
    assert any("% of the masks read" in sentence for sentence in sentences)


def test_fitted_tables_are_kept_for_the_next_time(explorer, tmp_path, shapes, monkeypatch):
    explorer.method.value = "pca"
    explorer.vector_dim.value = 9
    vector = explorer.view().reconstruction.vector
    files = list((tmp_path / "codecs").glob("*.safetensors"))
    assert len(files) == 1
    monkeypatch.setattr("solq_lab.codecs.pca.PCACodec.start_fit", None)  # whoever fits now fails
    again = CodecExplorer(
        {split.name: split for split in find_splits(shapes)},
        tmp_path / "codecs",
        method="pca",
        mask_size=28,
        vector_dim=9,
    )
    again.data_set.value = "val"
    torch.testing.assert_close(again.view().reconstruction.vector, vector, rtol=0, atol=0)


def test_a_truncated_table_is_fitted_again(explorer, tmp_path, shapes, caplog):
    explorer.method.value, explorer.vector_dim.value = "sparse", 4
    (file,) = (tmp_path / "codecs").glob("sparse_28_4-*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    split = {"shapes": find_splits(shapes)[1]}
    CodecExplorer(split, tmp_path / "codecs", method="sparse", mask_size=28, vector_dim=4)
    assert "fitting again: " in caplog.text
    assert file.read_bytes() == whole


def test_plain_figures_show_the_same(explorer):
    explorer.image.value = 2
    figure = explorer.figure()
    assert f"IoU {said(explorer)['IoU']}" in figure.texts[0].get_text()
    assert sum(len(part.axes) for part in figure.subfigs) == len(TABLE)
    sums = explorer.partial_sums((1, 16))
    assert [axes.get_title() for axes in sums.axes[:3]] == ["1", "16", "64"]
    gallery = explorer.gallery()
    explorer.find_worst()
    captions = [image.objects[0]["name"] for image in explorer.gallery_tiles.images]
    assert [axes.get_title() for axes in gallery.axes] == captions


@pytest.mark.slow
def test_papermill_leaves_every_view_as_a_plain_figure(tmp_path, monkeypatch, shapes):
    monkeypatch.chdir(tmp_path)
    parameters = {"folder": str(shapes), "image": "3", "method": "flatten"}
    executed = run_notebook(NOTEBOOK, REPOSITORY / "experiments" / "shapes.yaml", parameters=parameters)
    outputs = [output for cell in json.loads(executed.read_text())["cells"] for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3  # none is just named
    (figures,) = tmp_path.glob("runs/codec_explorer/*/figures")
    shown = {path.name: np.asarray(Image.open(path).convert("L")) for path in figures.iterdir()}
    assert shown.keys() == {"object.png", "partial_sums.png", "worst.png"}
    assert all(image.std() > 10 for image in shown.values())


# ---- what cannot be shown


def test_an_image_without_objects_says_so_and_the_next_one_is_shown(rectangles, tmp_path):
    explorer = CodecExplorer(rectangles, tmp_path, mask_size=28, vector_dim=64)
    explorer.image.value = 1
    assert explorer.message == "2.png has no object; choose another image."
    assert explorer.setting is None
    assert all(live.image.layout.visibility == "hidden" for live in explorer._live_panels.values())
    explorer.find_worst()
    assert "has no object" in explorer._gallery_note.value
    explorer.image.value = 2
    assert explorer.message == ""
    assert explorer._live_panels[Original].image.layout.visibility == "visible"


@pytest.mark.parametrize("rule", ["middle", "half"])
def test_an_object_that_fills_its_box_is_kept_by_both_rules(rule, rectangles, tmp_path):
    explorer = CodecExplorer(rectangles, tmp_path, mask_size=28, vector_dim=64)
    explorer.image.value, explorer.rule.value = 2, rule
    assert said(explorer)["IoU"] == "1.000"


def test_an_object_with_an_empty_mask_is_shown_and_named(tmp_path):
    document = truth_of([(1, 1, (8, 6, 30, 20)), (1, 1, (2, 2, 5, 5))], images=1)
    document["annotations"][1]["segmentation"] = rle_of(rectangle(40, 30, 8, 8))  # outside its box
    explorer = CodecExplorer(write_rectangles(tmp_path / "a", document), tmp_path, mask_size=28, vector_dim=16)
    explorer.object.index = 1
    assert "its mask is empty" in explorer.message
    assert said(explorer)["IoU"] == "0.000"
    for rule in ("best", "half", "middle"):
        explorer.rule.value = rule
        assert said(explorer)["IoU"] == "0.000"
    explorer.figure()


def test_a_data_set_without_objects_is_refused(tmp_path):
    splits = write_rectangles(tmp_path / "none", truth_of([], images=2))
    with pytest.raises(DataError, match="none of the 2 images has an object"):
        CodecExplorer(splits, tmp_path)


def test_a_data_set_without_objects_among_others_is_named_when_it_is_chosen(explorer, tmp_path):
    splits = write_rectangles(tmp_path / "none", truth_of([], images=2))
    explorer.lab._splits["none"] = splits["boxes"]
    explorer.data_set.options = ("shapes", "none")
    explorer.data_set.value = "none"
    assert "none of the 2 images has an object" in explorer.message
    explorer.data_set.value = "shapes"
    assert explorer.message == ""


def test_more_components_than_masks_are_a_sentence(rectangles, tmp_path):
    explorer = CodecExplorer(rectangles, tmp_path, method="pca", mask_size=28, vector_dim=64)
    assert "n_k = 64 asks for more components than there are: 4 masks" in explorer.message
    explorer.vector_dim.value = 4
    assert explorer.message == ""


def test_a_flattened_mask_of_no_square_number_is_a_sentence(explorer):
    explorer.method.value, explorer.vector_dim.value = "flatten", 300
    assert "no square number" in explorer.message
    explorer.mask_size.value = 64
    explorer.vector_dim.value = 400
    assert explorer.message == ""


def test_a_longer_vector_than_the_mask_has_cells_is_a_sentence(tmp_path, rectangles):
    explorer = CodecExplorer(rectangles, tmp_path, mask_size=5, vector_dim=25)
    explorer.vector_dim.value = 36
    assert "does not fit mask_size 5: allowed are 1..25" in explorer.message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "jpeg"}, "method 'jpeg': allowed are dct, pca, sparse, flatten"),
        ({"mask_size": 4, "vector_dim": 17}, "vector_dim 17 does not fit mask_size 4"),
    ],
)
def test_impossible_settings_are_refused_at_once(rectangles, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        CodecExplorer(rectangles, tmp_path, **change)


def test_no_data_set_at_all_is_refused(tmp_path):
    with pytest.raises(DataError, match="no data set to explore"):
        CodecExplorer({}, tmp_path)


def test_a_missing_image_is_named(rectangles, tmp_path):
    explorer = CodecExplorer(rectangles, tmp_path, mask_size=28, vector_dim=16)
    (rectangles["boxes"].images / "3.png").unlink()
    explorer.image.value = 2
    assert "3.png" in explorer.message
