"""An exported model finds what the original finds, says what it needs, and is not kept when it does not."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import REPOSITORY
from PIL import Image
from pycocotools import mask as mask_api
from tiny import CLASSES, tiny_experiment, write_model

from solq_lab.build import build_model, new_codec
from solq_lab.codecs.artifact import save_codec
from solq_lab.codecs.base import FittedCodec
from solq_lab.codecs.dct import DCTCodec
from solq_lab.codecs.flatten import FlattenCodec
from solq_lab.codecs.pca import PCACodec
from solq_lab.codecs.sparse import SparseCodingCodec
from solq_lab.config import ConfigError, Experiment, load_experiment
from solq_lab.data.transforms import resized_size
from solq_lab.errors import UserError
from solq_lab.inference.compare import Difference, compare_detections
from solq_lab.inference.export import onnx_file, parity
from solq_lab.inference.export.graph import DetectionGraph
from solq_lab.inference.export.onnx_file import ExportError, export_onnx
from solq_lab.inference.export.packaging import share
from solq_lab.inference.predictor import Predictor
from solq_lab.models.weights import read_weights
from solq_lab.structures import Detections, ImageBatch

PLAIN = {"codec": {"kind": "none"}, "model": {"standardise_vectors": False}}
SQR = {"codec": {"kind": "none"}, "model": {"standardise_vectors": False, "mask_branch": "sqr"}}

PLUS = {"model": {"mixed_queries": True, "look_twice": True, "mask_look": 8, "denoising": 1}}
PLUS |= {"codec": {"learn_decoder": True}, "loss": {"decoded_dice_weight": 1.0}}
PLUS |= {"evaluation": {"rescore": "sharpness", "vector_dim": 9}}


def write_small(folder: Path, **sections) -> tuple[Path, Experiment]:
    """Weights of a small model that sees objects of all scores everywhere."""
    experiment = tiny_experiment(folder / "secret" / "data", **sections)
    return write_weights(folder, experiment), experiment


def write_weights(folder: Path, experiment: Experiment) -> Path:
    torch.manual_seed(0)
    model = build_model(experiment, len(CLASSES))
    for head in model.heads:
        torch.nn.init.normal_(head.classify.weight, std=0.5)
        for layer in (head.box.layers[2], *([head.vector.layers[2]] if head.vector else [])):
            torch.nn.init.normal_(layer.weight, std=0.1)
    if model.mask_decoder is not None:
        torch.nn.init.normal_(model.mask_decoder, std=0.1)
    return write_model(folder / "weights.safetensors", experiment, model)


def write_pca(folder: Path, experiment: Experiment) -> Path:
    codec = new_codec(experiment)
    codec.fit([torch.rand(64, 16, 16) > 0.5])
    save_codec(folder / "pca.safetensors", codec, dataset={"sha256": "none"}, quality={})
    return folder / "pca.safetensors"


@pytest.fixture(scope="module")
def solq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("solq"))[0]


@pytest.fixture(scope="module")
def exported(solq: Path) -> onnx_file.ExportReport:
    """For one image of one size: tracing free sizes takes twice the time."""
    return export_onnx(solq, solq.parent / "solq.onnx", size=(32, 48), batch=1)


def test_onnxruntime_finds_what_the_model_finds(exported):
    """Three padded images; 8 queries x 2 classes each."""
    found = exported.parity
    assert (found.images, found.detections, found.matched) == (3, 48, 48)
    assert found.score < 1e-4
    assert found.box < 1e-4
    assert found.mask_iou > 0.999
    assert exported.inputs == {"pixels": [1, 3, 32, 48], "sizes": [1, 2]}
    report = json.loads(exported.path.with_suffix(".parity.json").read_text())
    assert report["agrees"]
    assert report["matched"] == 48
    assert report["tolerance"] == parity.TOLERANCE._asdict()


@pytest.mark.slow
@pytest.mark.parametrize("sections", [{}, {"model": {"two_stage": True}}, PLUS], ids=["plain", "two stages", "plus"])
def test_one_file_serves_any_size_and_any_number_of_images(sections: dict[str, Any], tmp_path: Path):
    """Three images of three shapes: a padded batch of two, then one alone."""
    weights, _ = write_small(tmp_path, **sections)
    report = export_onnx(weights, tmp_path / "free.onnx")
    assert (report.parity.images, report.parity.detections, report.parity.matched) == (3, 48, 48)
    assert report.parity.mask_iou > 0.999
    assert report.inputs == {"pixels": ["batch", 3, "height", "width"], "sizes": ["batch", 2]}


@pytest.mark.slow
def test_a_full_resnet_50_exports_at_512_x_852(tmp_path: Path):
    experiment = load_experiment(REPOSITORY / "experiments" / "solq_r50.yaml", ["model.pretrained=none"])
    weights = write_weights(tmp_path, experiment)
    report = export_onnx(weights, tmp_path / "r50.onnx", size=(512, 852), batch=1)
    assert report.parity.matched == report.parity.detections == 300
    assert 150 < report.megabytes < 200  # 41 million parameters of four bytes


def test_the_file_is_valid_onnx_of_the_stated_opset_and_says_all_that_its_user_needs(exported, solq: Path):
    model = onnx.load(exported.path)
    onnx.checker.check_model(model)
    assert model.ir_version == 9  # onnxruntime 1.17 reads no newer one
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": onnx_file.OPSET}
    assert sum(node.op_type == "GridSample" for node in model.graph.node) == 3 * 3  # attention modules x levels
    told = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(told["classes"]) == {"names": ["triangle", "diamond"], "category_ids": [1, 2]}
    assert json.loads(told["codec"])["kind"] == "DCTCodec"
    assert json.loads(told["normalisation"])["inside the graph"]
    assert json.loads(told["inputs"]) == exported.inputs
    assert "name: tiny" in told["experiment"]
    assert "secret" not in told["experiment"]


def test_the_documented_example_runs_with_onnxruntime_alone(exported, tmp_path: Path):
    """The code block of docs/export.md, in a process that cannot import this project or torch."""
    [example] = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "export.md").read_text(), flags=re.DOTALL)
    assert len(example.splitlines()) <= 18
    shutil.copy(exported.path, tmp_path / "model.onnx")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)).save(tmp_path / "street.jpg")
    barred = "import sys; sys.modules['torch'] = sys.modules['solq_lab'] = None\n"
    (tmp_path / "example.py").write_text(barred + example.replace("0.4", "0.0"))
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"(triangle|diamond) 0\.\d\d .* \(\d+, \d+\)", done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sections", "output"),
    [(PLAIN, None), (SQR, "mask_logits"), ({"model": {"backbone": "swin_t"}}, "masks")],
    ids=["detector", "sqr", "swin"],
)
def test_a_detector_the_baseline_and_swin_export_at_a_fixed_size(sections: dict, output: str | None, tmp_path: Path):
    weights, _ = write_small(tmp_path, **sections)
    report = export_onnx(weights, tmp_path / "model.onnx", size=(64, 96), batch=1)
    assert report.inputs == {"pixels": [1, 3, 64, 96], "sizes": [1, 2]}
    assert report.parity.matched == report.parity.detections == 48
    assert (report.parity.mask_iou is not None) == (output is not None)
    names = [value.name for value in onnx.load(report.path).graph.output]
    assert names[4:] == ([] if output is None else [output])


@pytest.mark.parametrize("rescore", ["none", "sharpness"])
def test_the_graphs_masks_are_the_codes_own_and_what_lies_beyond_an_image_counts_for_nothing(rescore, tmp_path: Path):
    weights, experiment = write_small(tmp_path)
    codec, model = new_codec(experiment).eval(), build_model(experiment, len(CLASSES)).eval()
    model.load_state_dict(read_weights(weights).state)
    graph = DetectionGraph(model, codec, 5, rescore=rescore).eval()
    pixels, sizes = torch.randint(0, 256, (2, 3, 48, 64), dtype=torch.uint8), torch.tensor([[48, 64], [40, 50]])
    padding = torch.zeros(2, 48, 64, dtype=torch.bool)
    padding[1, 40:], padding[1, :, 50:] = True, True
    with torch.no_grad():
        scores, labels, boxes, queries, masks = graph(pixels, sizes)
        vectors = model(ImageBatch(pixels, padding).normalised()).layers[-1].vectors
        pixels[padding.unsqueeze(1).expand_as(pixels)] = 255
        again = graph(pixels, sizes)
    with pytest.raises(UserError, match="cannot follow this model"):
        torch.jit.trace(graph, (pixels, sizes))
    assert masks.shape == (2, 5, 16, 16)
    assert boxes.shape == (2, 5, 4)
    assert (scores.diff() <= 0).all()
    for image in range(2):
        assert torch.equal(masks[image], codec.binarize(codec.decode(vectors[image, queries[image]])))
    assert all(map(torch.equal, (scores, labels, boxes, queries, masks), again))


@pytest.mark.parametrize("kind", ["dct", "pca", "released pca", "sparse", "flatten"])
def test_every_codes_decoding_gives_the_same_bits_in_onnxruntime(kind: str, tmp_path: Path):
    masks = torch.rand(64, 16, 16) > 0.5
    codec = {
        "dct": lambda: DCTCodec(16, 20),
        "pca": lambda: PCACodec(16, 20),
        "released pca": lambda: PCACodec.released(16, 20),
        "sparse": lambda: SparseCodingCodec(16, 20),
        "flatten": lambda: FlattenCodec(16, 16),
    }[kind]()
    if isinstance(codec, FittedCodec):
        codec.fit([masks])

    class Decode(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.codec = codec.eval()

        def forward(self, vectors: torch.Tensor) -> torch.Tensor:
            return self.codec.decode_masks(vectors)

    vectors = torch.cat([codec.eval().encode(masks[:7]), torch.zeros(1, codec.vector_dim)])  # the last one is flat
    program = torch.onnx.export(Decode().eval(), (vectors,), dynamo=True, opset_version=onnx_file.OPSET, verbose=False)
    program.save(tmp_path / "code.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "code.onnx")
    [found] = session.run(None, {session.get_inputs()[0].name: vectors.numpy()})
    expected = codec.decode_masks(vectors)
    assert int(expected.sum()) > 0
    assert torch.equal(torch.from_numpy(found), expected)


def test_a_file_that_finds_something_else_is_not_kept_and_the_command_fails(
    solq: Path, exported, tmp_path: Path, monkeypatch, command_line
):
    """As if the tracer had written a graph whose boxes lie a hundredth of the image beside the model's."""

    def write(graph, path: Path, *_) -> dict:
        model = onnx.load(exported.path)
        boxes = next(value for value in model.graph.output if value.name == "boxes")
        producer = next(node for node in model.graph.node if "boxes" in node.output)
        producer.output[list(producer.output).index("boxes")] = "true_boxes"
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(0.01), "shift"))
        model.graph.node.append(onnx.helper.make_node("Add", ["true_boxes", "shift"], [boxes.name]))
        onnx.save(model, path)
        return exported.inputs

    monkeypatch.setattr(onnx_file, "_write", write)
    status, output = command_line("export", solq, tmp_path / "out.onnx")
    assert status == 1
    assert "out.onnx: not written, the ONNX file detects other objects: 0 of 48 detections" in output
    assert [path.name for path in tmp_path.iterdir()] == ["out.parity.json"]
    assert not json.loads((tmp_path / "out.parity.json").read_text())["agrees"]


def detections(scores: list[float], *, shift: float = 0.0, labels: list[int] | None = None) -> Detections:
    boxes = torch.tensor([[10.0 * n + shift, 0, 10.0 * n + 8, 8] for n in range(len(scores))]).view(-1, 4)
    labels = labels or [0] * len(scores)
    return Detections(torch.tensor(scores), torch.tensor(labels).long(), boxes, torch.arange(len(scores)), None, [])


def compare(expected: Detections, found: Detections) -> Difference:
    return compare_detections([expected], [found], [(100, 100)], parity.TOLERANCE)


def test_parity_counts_what_is_missing_and_excuses_only_the_cut_off():
    ours = detections([0.9, 0.5, 0.1])
    assert compare(ours, detections([0.9, 0.5, 0.1], shift=0.05)).agrees(parity.TOLERANCE)
    other_class = compare(ours, detections([0.9, 0.5, 0.1], labels=[1, 0, 0]))
    assert (other_class.matched, other_class.excused, other_class.agrees(parity.TOLERANCE)) == (2, 0, False)
    last = compare(ours, detections([0.9, 0.5, 0.1], labels=[0, 0, 1]))
    assert (last.matched, last.excused, last.agrees(parity.TOLERANCE)) == (2, 1, True)
    assert not compare(ours, detections([0.9, 0.5, float("nan")], shift=float("nan"))).agrees(parity.TOLERANCE)
    none = compare(detections([]), detections([]))
    assert (none.detections, none.agrees(parity.TOLERANCE)) == (0, True)


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (640, 427), (4032, 3024), (900, 100), (512, 512)])
def test_the_documented_example_resizes_as_predict_does(size: tuple[int, int]):
    example = (REPOSITORY / "docs" / "export.md").read_text()
    lines = re.search(r"small, large = .*?\nwidth, height = [^\n]*", example, flags=re.DOTALL)[0]
    known = {"image": Image.new("L", size), "limits": {"short": 800, "longest": 1333}}
    exec(lines, known)
    assert (known["height"], known["width"]) == resized_size((size[1], size[0]), 800, 1333)


def test_what_cannot_be_exported_is_rejected_before_any_work(solq: Path, tmp_path: Path, monkeypatch, command_line):
    (tmp_path / "there.onnx").write_text("mine")
    with pytest.raises(ConfigError, match=r"there\.onnx: exists already and is not written over"):
        export_onnx(solq, tmp_path / "there.onnx")
    with pytest.raises(ConfigError, match="batch 0: allowed are positive numbers"):
        export_onnx(solq, tmp_path / "out.onnx", batch=0)
    for arguments, said in (
        (("out.onnx", "--height", 48), "--height 48 with --width None: give both, or neither"),
        (("out.tflite",), "ending '.tflite': allowed are .onnx and .safetensors"),
    ):
        status, output = command_line("export", solq, *arguments)
        assert status == 2
        assert said in output
    monkeypatch.setattr(onnx_file, "PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(ConfigError, match=r"writing ONNX needs no_such_package; .*pip install 'solq-lab\[export\]'"):
        export_onnx(solq, tmp_path / "out.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["there.onnx"]


def test_swin_is_rejected_without_a_size(tmp_path: Path):
    weights, _ = write_small(tmp_path, model={"backbone": "swin_t"})
    with pytest.raises(ConfigError, match=r"Swin's windows cannot be traced for free sizes; give --height and --width"):
        export_onnx(weights, tmp_path / "out.onnx")


def test_a_model_that_cannot_be_traced_is_rejected_with_the_cure(solq: Path, tmp_path: Path, monkeypatch):
    def untraceable(self, pixels, sizes):
        return self.model(pixels[: int(pixels.sum())])

    monkeypatch.setattr(DetectionGraph, "forward", untraceable)
    with pytest.raises(ExportError, match=r"cannot be traced; try a fixed size \(--height, --width\) and batch"):
        export_onnx(solq, tmp_path / "out.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_shared_file_needs_nothing_else(tmp_path: Path, monkeypatch, command_line):
    """Written with the tables' file in reach; read by a fresh process in folders that hold one file each."""
    kinds = {"dct": {}, "sqr": SQR, "pca": {"codec": {"kind": "pca", "artifact": "pca.safetensors"}}}
    image = np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8)
    np.save(tmp_path / "image.npy", image)
    expected = {}
    for kind, sections in kinds.items():
        work = tmp_path / "work" / kind
        work.mkdir(parents=True)
        monkeypatch.chdir(work)
        weights, experiment = write_small(work, **sections)
        if kind == "pca":
            write_pca(work, experiment)
        expected[kind] = Predictor(weights, device="cpu").predict(image)
        status, output = command_line("export", weights, tmp_path / "away" / kind / "model.safetensors")
        assert status == 0
        assert "2 classes, codec and experiment inside" in output
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(tmp_path / "work")
    script = (
        "import json, os, numpy; from solq_lab import Predictor\n"
        "for kind in sorted(os.listdir()):\n"
        "    os.chdir(kind); assert os.listdir() == ['model.safetensors']\n"
        "    found = Predictor('model.safetensors', device='cpu').predict(numpy.load('../../image.npy'))\n"
        "    os.chdir('..')\n"
        "    print(json.dumps([kind, found.names, found.scores.tolist(), [m['counts'].decode() for m in found.masks]]))"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    run = [sys.executable, "-c", script]
    done = subprocess.run(run, cwd=tmp_path / "away", env=environment, capture_output=True, text=True, check=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [kind for kind, *_ in answers] == sorted(kinds)
    for kind, names, scores, masks in answers:
        assert names == expected[kind].names
        # Another process may place its buffers otherwise, and vector loops then sum in another order: float32 noise.
        assert scores == pytest.approx(expected[kind].scores.tolist(), abs=1e-5)
        sizes = [rle["size"] for rle in expected[kind].masks]
        theirs = [{"size": size, "counts": counts} for size, counts in zip(sizes, masks, strict=True)]
        crowd = [0] * len(theirs)
        assert np.diag(mask_api.iou(theirs, expected[kind].masks, crowd)) == pytest.approx(1, abs=0.01)


def test_a_shared_file_tells_no_path_of_the_machine_and_anyone_may_read_it(solq: Path, tmp_path: Path):
    share(solq, tmp_path / "model.safetensors")
    assert b"secret" in solq.read_bytes()
    assert b"secret" not in (tmp_path / "model.safetensors").read_bytes()
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o444 == 0o444
    with pytest.raises(ConfigError, match=r"model\.safetensors: exists already and is not written over"):
        share(solq, tmp_path / "model.safetensors")
