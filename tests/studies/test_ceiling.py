"""Ceilings of mask codes: what must hold, what errors cost, a grid that goes on where it stopped, and bad input."""

import csv
import json
import math
import os
import re
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from matplotlib.colors import to_hex
from pycocotools import mask as coco_rle
from rectangles import HEIGHT, WIDTH, rle_of, truth_of
from scipy.stats import entropy
from tiny import write_tiny_dataset

from solq_lab import masks, workers
from solq_lab.codecs.base import MaskCodec
from solq_lab.codecs.dct import DCTCodec
from solq_lab.codecs.flatten import FlattenCodec
from solq_lab.codecs.quantised import QuantisedCodec
from solq_lab.config import ConfigError
from solq_lab.data.annotations import DataError
from solq_lab.data.ground_truth import GroundTruth
from solq_lab.evaluation.sizes import select_by_size
from solq_lab.evaluation.summary import Evaluation
from solq_lab.schema import EvaluationSection
from solq_lab.studies import codec_benchmark
from solq_lab.studies.ceiling import Noise, codec_ceiling, reconstruct_objects
from solq_lab.studies.codec_benchmark import (
    NUMBERS,
    CodecBenchmark,
    CodecSetting,
    UpperBound,
    ceiling_frame,
    ceiling_table,
    length_for,
    make_grid,
    size_gap_frame,
    write_csv,
)
from solq_lab.viz.ceilings import ceiling_curves, ceilings_by_size
from solq_lab.viz.style import CODEC_COLOURS
from solq_lab.workbench.notebooks import run_notebook
from solq_lab.workbench.workspace import WORKSPACE

CODE = DCTCodec(16, 30)
WRONG = (Noise(box=-0.1), Noise(vector=math.inf), Noise(seed=-1))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("images") / "tiny", train=16, val=80)


@pytest.fixture(scope="module")
def annotations(root) -> Path:
    """81 triangles and diamonds: more than one piece of work."""
    return root / "val.json"


@pytest.fixture(scope="module")
def document(annotations) -> dict:
    return json.loads(annotations.read_text())


# What must hold


def test_a_code_that_loses_nothing_leaves_what_the_raster_and_the_paste_lose(document):
    found = reconstruct_objects(document, FlattenCodec(16))
    entries = {entry["id"]: entry for entry in document["annotations"]}
    assert sorted(found.ids) == sorted(entries)
    for key, iou in zip(found.ids.tolist(), found.ious.tolist(), strict=True):
        x, y, w, h = entries[key]["bbox"]
        box = torch.tensor([[x, y, x + w, y + h]], dtype=torch.float64)
        bits = masks.rasterize_in_box([entries[key]["segmentation"]], box, (48, 48), 16)
        pasted = masks.paste_masks(bits, box, (48, 48))[0].numpy()
        truth = coco_rle.decode(coco_rle.frPyObjects(entries[key]["segmentation"], 48, 48)).any(axis=2)
        assert iou == (pasted & truth).sum() / (pasted | truth).sum()


def test_the_mean_iou_of_a_size_is_that_of_its_objects(document):
    sides = (11.0, 13.0)
    metrics = codec_ceiling(document, CODE, EvaluationSection(area_sides=sides)).metrics
    found = reconstruct_objects(document, CODE)
    areas = {entry["id"]: entry["area"] for entry in document["annotations"]}
    assert [areas[key] for key in found.ids.tolist()] == found.areas.tolist()
    for size, low, high in (("s", 0, 11**2), ("m", 11**2, 13**2), ("l", 13**2, 1e9)):
        inside = [iou for iou, area in zip(found.ious, found.areas, strict=True) if low <= area <= high]
        assert inside
        assert metrics[f"segm.IoU{size}"] == pytest.approx(np.mean(inside), abs=1e-12)
    assert metrics["segm.IoU"] == pytest.approx(found.ious.mean(), abs=1e-12)


def test_an_area_on_a_bound_is_of_both_sizes():
    small, medium, large = select_by_size(np.array([100.0, 101.0, 400.0]), (10.0, 20.0)).values()
    assert [small.tolist(), medium.tolist(), large.tolist()] == [
        [True, False, False],
        [True, True, True],
        [False, False, True],
    ]


def test_processes_change_no_bit(annotations):
    noise = Noise(box=0.05, vector=0.3, seed=4)
    serial, parallel = (reconstruct_objects(annotations, CODE, noise=noise, processes=n) for n in (1, 3))
    assert serial.results == parallel.results
    np.testing.assert_array_equal(serial.ious, parallel.ious)
    one, three = (codec_ceiling(annotations, CODE, noise=noise, processes=n) for n in (1, 3))
    assert one.to_dict() == three.to_dict()


def test_a_killed_worker_is_named(annotations):
    with pytest.raises(RuntimeError, match=r"one of 2 worker processes was killed.*fewer processes"):
        list(workers.in_processes(_killed, None, [1, 2], 2))


def _killed(_shared: None, _piece: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# What errors cost


@pytest.mark.parametrize("kind", ["box", "vector"])
def test_larger_errors_cost_more(document, kind):
    levels = (0.0, 0.05, 0.1, 0.2)
    ceilings = [codec_ceiling(document, CODE, noise=Noise(**{kind: level})).metrics for level in levels]
    for name in ("segm.IoU", "segm.AP", "boundary.AP"):
        values = [metrics[name] for metrics in ceilings]
        assert values == sorted(values, reverse=True)
        assert len(set(values)) == len(levels)


def test_the_same_seed_makes_the_same_errors_whatever_else_is_looked_at(document):
    noise = Noise(box=0.1, vector=0.0, seed=1)
    all_of_them, some = (reconstruct_objects(document, CODE, noise=noise, max_images=n) for n in (None, 20))
    assert 0 < len(some.ids) < len(all_of_them.ids)
    np.testing.assert_array_equal(some.ious, all_of_them.ious[: len(some.ious)])
    assert not np.array_equal(
        some.ious, reconstruct_objects(document, CODE, noise=Noise(0.1, 0, 2), max_images=20).ious
    )


class Recorder(DCTCodec):
    """Keeps what it sends and what it receives."""

    def encode(self, masks: torch.Tensor) -> torch.Tensor:
        self.sent = super().encode(masks)
        return self.sent.clone()

    def decode(self, vectors: torch.Tensor) -> torch.Tensor:
        self.received = vectors
        return super().decode(vectors)


def test_the_error_of_a_vector_is_in_units_of_each_entrys_spread(document):
    code = Recorder(16, 30)
    few = document | {"annotations": document["annotations"][:60]}  # one piece of work
    reconstruct_objects(few, code, noise=Noise(vector=0.5))
    error = (code.received - code.sent).double() / code.sent.double().std(dim=0, correction=0)
    assert error.std() == pytest.approx(0.5, rel=0.05)  # 1800 draws: standard error 1.7 %
    assert error.mean().abs() < 0.05


def test_bits_are_the_entropies_of_the_rounded_entries(document):
    vectors = CODE.encode(GroundTruth(document, keep="all").box_masks(range(len(document["annotations"])), 16)).numpy()
    spread = np.sqrt(vectors.var(axis=0).mean())
    found = []
    for step in (0.25, 1.0, 4.0):
        symbols = np.round(vectors / (step * spread))
        expected = sum(entropy(np.unique(entry, return_counts=True)[1], base=2) for entry in symbols.T)
        metrics = codec_ceiling(document, CODE, noise=Noise(step=step), processes=2).metrics
        assert metrics["segm.bits"] == pytest.approx(
            expected, rel=0.02
        )  # an entry half way between two steps may go either way
        found.append((metrics["segm.bits"], metrics["segm.IoU"]))
    assert found == sorted(found, reverse=True)
    assert codec_ceiling(document, CODE).metrics["segm.bits"] == 32 * CODE.vector_dim


def test_tokens_have_bits_of_their_own(document):
    codec = QuantisedCodec(16, 20)
    codec.fit([GroundTruth(document, keep="all").box_masks(range(9), 16)])
    assert codec_ceiling(document, codec).metrics["segm.bits"] == 64


def test_edges_that_pass_each_other_change_places(document):
    assert 0 < codec_ceiling(document, CODE, noise=Noise(box=2.0)).metrics["segm.IoU"] < 0.5


# Masks and boxes at the edge of what there is


def test_empty_full_and_one_pixel_masks_have_a_defined_result():
    truth = truth_of([(1, 1, (4, 4, 16, 16)), (1, 1, (30, 4, 16, 16)), (1, 1, (8, 30, 1, 1))])
    truth["annotations"][0]["segmentation"] = rle_of(np.zeros((HEIGHT, WIDTH), dtype=bool))
    code = DCTCodec(16, 64)
    for code.threshold in ("middle", "half"):
        assert reconstruct_objects(truth, code).ious.tolist() == [1.0, 1.0, 1.0]


def test_a_box_outside_the_image_is_left_out_and_named(caplog):
    truth = truth_of([(1, 1, (4, 4, 16, 16)), (1, 1, (4, 4, 16, 16))])
    truth["annotations"][1]["bbox"] = [WIDTH + 5, 4, 16, 16]
    assert reconstruct_objects(truth, CODE).ids.tolist() == [0]
    assert "1 of 2 objects cannot be learnt: 1 without area in box or mask, annotation ids 1" in caplog.text


def test_a_box_that_sticks_out_is_cut_at_the_edge():
    truth = truth_of([(1, 1, (4, 4, 16, 16))])
    truth["annotations"][0]["bbox"] = [-8, 4, 28, 16]
    code = FlattenCodec(16)
    assert reconstruct_objects(truth, code).ious.tolist() == [pytest.approx(1.0, abs=0.1)]


def test_an_rle_of_another_size_is_refused_by_its_id():
    truth = truth_of([(1, 1, (4, 4, 16, 16))])
    truth["annotations"][0]["segmentation"] = rle_of(np.ones((8, 8), dtype=bool))
    with pytest.raises(DataError, match=r"annotation id 0: .* here \[48, 64\]"):
        codec_ceiling(truth, CODE)


@pytest.mark.parametrize(
    ("codec", "arguments", "message"),
    [
        *[(CODE, {"noise": noise}, "finite standard deviations and steps from 0 on and seeds") for noise in WRONG],
        (
            DCTCodec(16, 30).to("meta"),
            {"processes": 2},
            "2 processes cannot share a codec on meta; use one, or a codec",
        ),
        (CODE, {"processes": 0}, "processes 0: allowed are 1 and more"),
    ],
)
def test_impossible_measurements_are_rejected(document, codec, arguments, message):
    with pytest.raises(ValueError, match=message):
        codec_ceiling(document, codec, **arguments)


# The grid


def test_the_grid_has_every_combination_once_and_flattens_to_squares():
    settings = make_grid(["dct", "flatten"], [16, 32], [64, 70], box_noises=[0.0, 0.1], beta=2.0, pca="released")
    assert len(settings) == 2 * 2 * 2 + 2 * 2  # 70 flattens to 64, too
    assert {(s.vector_dim, s.beta, s.pca) for s in settings if s.kind == "flatten"} == {(64, 1.0, "plain")}
    assert settings == list(dict.fromkeys(settings))
    grid = make_grid(["dct", "pca", "sparse"], [16], [64], beta=0.5, pca="released")
    assert [setting.method for setting in grid] == ["dct", "pca, released", "sparse, beta 0.5"]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ((["dct"], [8], [65]), r"vector_dim 65 does not fit mask_size 8: allowed are 1..64 \(mask_size squared\)"),
        ((["dct"], [0], [1]), "vector_dim 1 does not fit mask_size 0"),
        ((["legendre"], [8], [4]), "codec 'legendre': allowed are dct, pca, sparse, flatten"),
        ((["dct"], [8], [4], [-1.0]), "box noise -1.0: allowed are finite numbers from 0 on"),
    ],
)
def test_a_setting_that_cannot_be_is_rejected(grid, message):
    *sizes, noises = grid if len(grid) == 4 else (*grid, [0.0])
    with pytest.raises(ConfigError, match=message):
        make_grid(*sizes, box_noises=noises)


@pytest.fixture
def measured(monkeypatch) -> list[MaskCodec]:
    """The codes that were really sent through."""
    codes: list[MaskCodec] = []
    monkeypatch.setattr(
        codec_benchmark,
        "codec_ceiling",
        lambda truth, code, *more, **how: codes.append(code) or codec_ceiling(truth, code, *more, **how),
    )
    return codes


def numbers(ceilings: list[UpperBound]) -> list[dict]:
    return [ceiling.row() for ceiling in ceilings]


def test_an_interrupted_grid_goes_on_and_ends_like_an_uninterrupted_one(annotations, tmp_path, measured, monkeypatch):
    settings = make_grid(["dct"], [8, 16], [9, 16])
    whole = CodecBenchmark(annotations, tmp_path / "whole").measure(settings)
    real = codec_benchmark.codec_ceiling

    def interrupted(truth, code, settings, **how):
        if code.mask_size == 16:
            raise KeyboardInterrupt
        return real(truth, code, settings, **how)

    monkeypatch.setattr(codec_benchmark, "codec_ceiling", interrupted)
    with pytest.raises(KeyboardInterrupt):
        CodecBenchmark(annotations, tmp_path / "parts").measure(settings)
    monkeypatch.setattr(codec_benchmark, "codec_ceiling", real)
    measured.clear()
    assert numbers(CodecBenchmark(annotations, tmp_path / "parts").measure(settings)) == numbers(whole)
    assert [code.mask_size for code in measured] == [16, 16]
    measured.clear()
    assert numbers(CodecBenchmark(annotations, tmp_path / "parts").measure(settings)) == numbers(whole)
    assert measured == []


def test_other_data_or_another_scale_is_measured_anew(annotations, document, tmp_path, measured):
    settings = [CodecSetting("dct", 8, 9)]
    CodecBenchmark(annotations, tmp_path).measure(settings)
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(document | {"annotations": document["annotations"][:9]}))
    for benchmark in (CodecBenchmark(changed, tmp_path), CodecBenchmark(annotations, tmp_path, area_sides=(8, 16))):
        benchmark.measure(settings)
    assert len(measured) == 3


def test_pca_is_fitted_to_the_training_masks_once(annotations, root, tmp_path, measured):
    benchmark = CodecBenchmark(annotations, tmp_path, fit_annotations=root / "train.json")
    settings = [
        CodecSetting("pca", 8, 5),
        CodecSetting("pca", 8, 5, vector_noise=0.1),
        CodecSetting("pca", 8, 5, pca="released"),
    ]
    plain, noisy, released = benchmark.measure(settings)
    assert plain.evaluation.metrics["segm.IoU"] > noisy.evaluation.metrics["segm.IoU"] > 0.3
    assert released.evaluation.metrics["segm.IoU"] != plain.evaluation.metrics["segm.IoU"]
    tables = sorted((tmp_path / "codecs").glob("*.safetensors"))
    assert [path.name.split("-")[0] for path in tables] == ["pca", "pca_released"]
    assert not any(code.training for code in measured)


def test_a_code_without_masks_to_fit_it_to_is_refused_before_any_work(annotations, tmp_path, measured):
    with pytest.raises(ConfigError, match="codec 'pca' has to be fitted, and no training annotations are named"):
        CodecBenchmark(annotations, tmp_path).measure([CodecSetting("dct", 8, 9), CodecSetting("pca", 8, 9)])
    assert measured == []
    with pytest.raises(DataError, match=r"missing.json: no such annotation file to fit PCA"):
        CodecBenchmark(annotations, tmp_path, fit_annotations=tmp_path / "missing.json")


def test_a_data_set_without_objects_is_refused(tmp_path, document):
    path = tmp_path / "empty.json"
    path.write_text(json.dumps(document | {"annotations": []}))
    with pytest.raises(DataError, match=r"empty.json: no object in the 80 measured images \(crowds"):
        CodecBenchmark(path, tmp_path)
    assert math.isnan(codec_ceiling(path, CODE, processes=2, noise=Noise(vector=0.1)).metrics["segm.IoU"])


def test_the_size_of_objects_is_read_as_the_data_says(annotations, document, tmp_path):
    assert CodecBenchmark(annotations, tmp_path).settings.area_sides == (32.0, 96.0)
    path = tmp_path / "with_sides.json"
    path.write_text(json.dumps(document | {"info": {"area_sides": [13, 16]}}))
    benchmark = CodecBenchmark(path, tmp_path)
    assert benchmark.settings.area_sides == (13.0, 16.0)
    assert str(benchmark).startswith(f"{path}: 80 images, {len(document['annotations'])} objects, ")


# What is shown and written


def ceilings_with(small: list[float], large: list[float]) -> list[UpperBound]:
    lengths = (16, 64, 256)
    return [
        UpperBound(
            CodecSetting("dct", 16, n), Evaluation({"segm.IoUs": s, "segm.IoUl": big}, {}, (32, 96), 0.02, 1), 0.0
        )
        for n, s, big in zip(lengths, small, large, strict=True)
    ]


def test_the_reading_says_how_much_longer_vectors_large_objects_need():
    found = ceilings_with([0.90, 0.95, 0.97], [0.85, 0.90, 0.96])
    assert length_for(found, "segm.IoUl", 0.90) == 64
    assert length_for(found, "segm.IoUl", 0.93) == pytest.approx(128)  # half-way between 64 and 256, as a ratio
    assert length_for(found, "segm.IoUl", 0.80) == 16
    frame = size_gap_frame(found)
    assert frame["small"].tolist() == [90, 95, 97]
    assert frame["n_k for large"].tolist() == [64, pytest.approx(203, abs=0.5), pytest.approx(math.nan, nan_ok=True)]
    assert size_gap_frame(ceilings_with([math.nan] * 3, [0.9] * 3))["n_k for large"].isna().all()
    assert size_gap_frame([]).empty


def test_table_and_csv_hold_the_numbers(annotations, tmp_path):
    ceilings = CodecBenchmark(annotations, tmp_path).measure(make_grid(["dct"], [16], [30], box_noises=[0.0, 0.1]))
    frame = ceiling_frame(ceilings)
    assert frame.index.names == ["codec", "N", "n_k", "box noise"]
    assert list(frame)[:3] == ["IoU", "IoUs", "IoUm"]
    share = ceilings[1].evaluation.metrics["segm.IoU"]
    assert frame.loc[("dct", 16, 30, 0.1), "IoU"] == 100 * share
    assert list(frame.round(0).index) == list(frame.index)  # an error of 0.1 stays one
    _, *lines, legend = ceiling_table(ceilings).splitlines()
    assert lines[1].split()[:5] == ["dct", "16", "30", "0.1", f"{100 * share:.1f}"]
    assert legend.startswith("80 images, percent; s: below 32x32 pixels")
    write_csv(tmp_path / "table.csv", ceilings)
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [row["box_noise"] for row in rows] == ["0.0", "0.1"]
    assert float(rows[1]["segm.IoU"]) == share
    assert rows[0]["segm.APl"] == ""  # no large object
    assert ceiling_frame([]).empty


def test_each_code_has_a_line_of_its_colour():
    row = dict.fromkeys(NUMBERS, 0.9) | {
        "pca": "plain",
        "box_noise": 0.0,
        "vector_noise": 0.0,
        "step": 0.0,
        "segm.IoUl": None,
    }
    rows = [row | {"kind": kind, "mask_size": n, "vector_dim": 9} for kind in ("dct", "pca") for n in (8, 16)]
    for figure in (ceiling_curves(rows), ceilings_by_size(rows), ceiling_curves(rows, over="box_noise")):
        for axes in figure.axes:
            assert [to_hex(line.get_color()) for line in axes.lines] == [
                to_hex(CODEC_COLOURS[kind]) for kind in ("dct", "dct", "pca", "pca")
            ]
            assert [line.get_linestyle() for line in axes.lines] == ["-", "--", "-", "--"]
    assert ceiling_curves([]).axes


@pytest.fixture
def command(command_line):
    """Run `solq-lab codec-ceiling ARGUMENTS` in a fresh folder: exit status and output."""
    return partial(command_line, "codec-ceiling")


def test_the_command_prints_a_table_and_writes_csv_json_and_figure(command, annotations, tmp_path):
    arguments = (annotations, "--mask-size", "16", "--vector-dim", "9,30", "--json", "out.json", "--processes", "1")
    status, output = command(*arguments, "--area-sides", "11,13")
    assert status == 0, output
    assert re.search(r"dct +16 +9 ", output)
    written = json.loads((tmp_path / "out.json").read_text())
    assert [row["vector_dim"] for row in written["ceilings"]] == [9, 30]
    expected = codec_ceiling(annotations, DCTCodec(16, 30), EvaluationSection(area_sides=(11, 13))).metrics
    assert {name: written["ceilings"][1][name] for name in NUMBERS} == {name: expected[name] for name in NUMBERS}
    assert {path.name for path in (tmp_path / "runs/ceilings").iterdir()} == {
        "settings",
        "ceilings.csv",
        "ceilings.png",
    }


def test_the_command_refuses_in_one_message(command, annotations, tmp_path):
    for arguments, message in (
        ((annotations, "--mask-size", "8", "--vector-dim", "65"), "vector_dim 65 does not fit mask_size 8"),
        ((annotations, "--vector-dim", "a"), "found 'a', allowed are numbers with commas between them"),
        ((annotations, "--codec", "pca"), "codec 'pca' has to be fitted, and no training annotations are named"),
        ((annotations, "seed=1"), "seed=1: only an experiment file has values to change"),
        ((tmp_path / "nowhere",), "nowhere: no such folder or annotation file"),
    ):
        status, output = command(*arguments)
        assert status == 2
        assert message in output
        assert "Traceback" not in output


@pytest.mark.slow
def test_the_study_reads_its_numbers_from_drawn_shapes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(WORKSPACE, str(tmp_path))
    small = {"codecs": ["dct", "pca"], "mask_sizes": [16], "vector_dims": [9, 36], "max_images": 20, "fit_objects": 50}
    executed = run_notebook(
        REPOSITORY / "notebooks" / "codec_study.ipynb",
        REPOSITORY / "experiments" / "shapes.yaml",
        parameters=small | {"box_errors": [0.0, 0.1], "vector_errors": [0.2]},
    )
    cells = json.loads(executed.read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    text = "".join("".join(output.get("text", "")) for output in outputs)
    assert "mask AP at the largest N and n_k: " in text
    folder = tmp_path / "runs" / "codec_study"
    assert {"ceilings.csv", "ceilings.png", "ceilings_by_size.png"} <= {path.name for path in folder.iterdir()}
    assert len(list((folder / "settings").iterdir())) == 4 + 3
