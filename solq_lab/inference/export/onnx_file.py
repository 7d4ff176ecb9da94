"""A trained model as an ONNX file, which is kept only where its detections in onnxruntime are those of the model.

The inputs and outputs are those of `DetectionGraph`; docs/export.md shows the file's use with nothing but onnxruntime.
Deformable attention becomes ONNX GridSample, in its plain torch form.
"""

import importlib.util
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from solq_lab.build import build_model
from solq_lab.codecs.base import describe_codec
from solq_lab.config import ConfigError
from solq_lab.data.shapes.scene import LEVELS, draw_scene
from solq_lab.errors import ExplainedError
from solq_lab.files import replacing, write_json
from solq_lab.inference.compare import Difference
from solq_lab.inference.export.graph import INPUTS, DetectionGraph
from solq_lab.inference.export.packaging import without_paths
from solq_lab.inference.export.parity import TOLERANCE, measure_parity
from solq_lab.inference.folding import fold
from solq_lab.inference.postprocess import decoding_of
from solq_lab.inference.predictor import Predictor, find_weights, read_pixels, read_trained
from solq_lab.models.kinds import backbone_spec
from solq_lab.models.weights import load_state
from solq_lab.ops.ms_deform_attn import ms_deform_attn_reference
from solq_lab.runs import Run
from solq_lab.structures import PIXEL_MEAN, PIXEL_STD

OPSET, IR_VERSION = 20, 9  # the first with today's GridSample; onnxruntime 1.17 and later read both
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
TRACED = (200, 296)  # of images of any size: no side and no number of cells may be 1 on any level, or equal
DRAWN = 3  # drawn images to compare with where none are given


class ExportError(ExplainedError):
    """A model that cannot be exported, or whose ONNX file detects other objects; the message names the difference."""


class ExportReport(NamedTuple):
    """An exported file."""

    path: Path
    parity: Difference  # its difference from the model
    megabytes: float
    seconds: float  # duration of the export and the comparison
    inputs: dict[str, list[int | str]]  # shape of each input; names stand for sides that are free

    def __str__(self) -> str:
        shapes = ", ".join(f"{name} {shape}" for name, shape in self.inputs.items())
        return f"{self.path}: {self.megabytes:.1f} MB in {self.seconds:.0f} s; {shapes}\n{self.parity}"


def export_onnx(
    weights_or_run: str | Path | Run,
    destination: Path,
    *,
    size: tuple[int, int] | None = None,
    batch: int | None = None,
    top_k: int | None = None,
    images: Sequence[Path] = (),
) -> ExportReport:
    """Write a model as an ONNX file, and keep it only if its detections are the same.

    The comparison is written beside it (`<name>.parity.json`), also where the file is not kept.

    Args:
        weights_or_run: as for `Predictor`.
        destination: the file; it must not exist.
        size: (height, width) of every image, pixels; None: any.
        batch: images per call; None: any number, but one for Swin and for a model with a mask branch.
        top_k: detections per image; None: as many as the experiment evaluates.
        images: images to compare with; none: a few drawn ones.

    Raises:
        ConfigError: the destination exists, a size or number is not positive, a package is missing, or Swin is given no
            size.
        RunError, WeightMismatch: as for `Predictor`.
        DataError: an image cannot be read.
        ExportError: the model cannot be traced, or the file detects other objects.
    """
    started = time.perf_counter()
    _check(destination, size, batch)

    predictor = Predictor(weights_or_run, device="cpu", top_k=top_k)
    arrays = [read_pixels(path) for path in images]
    if not arrays:  # shapes; one image is wide and one tall, so that batches are padded
        scenes = [draw_scene(LEVELS["hard"], np.random.default_rng(seed)).image for seed in range(DRAWN)]
        arrays = [scenes[0], scenes[1][: len(scenes[1]) * 3 // 4], scenes[2][:, : len(scenes[2]) * 2 // 3]]
    fixed = not backbone_spec(predictor.experiment.model.backbone).any_size
    if fixed and size is None:
        raise ConfigError("Swin's windows cannot be traced for free sizes; give --height and --width")

    # In plain torch: the predictor's own network has its weights in oneDNN's order.
    path = find_weights(weights_or_run)
    weights, experiment, classes = read_trained(path)
    model = build_model(experiment, len(classes))
    load_state(model, weights.state, source=str(path))
    decoding = decoding_of(experiment.evaluation)
    graph = DetectionGraph(fold(model), predictor.codec, predictor.top_k, **decoding).eval()
    if fixed or "mask_logits" in graph.outputs:
        batch = batch or 1  # windows, or queries, share an axis with the images, whose number the tracer then pins

    with replacing(destination) as unfinished:
        inputs = _write(graph, unfinished, size, batch, predictor)
        megabytes = unfinished.stat().st_size / 1e6
        parity = measure_parity(predictor, unfinished, arrays)
        report = ExportReport(destination, parity, megabytes, time.perf_counter() - started, inputs)
        agrees = parity.agrees(TOLERANCE)
        facts = {"agrees": agrees, "tolerance": TOLERANCE._asdict(), "opset": OPSET, "inputs": inputs}
        compared = [str(path) for path in images] or f"{DRAWN} drawn images"
        write_json(destination.with_suffix(".parity.json"), parity._asdict() | facts | {"compared_with": compared})
        if not agrees:
            raise ExportError(f"{destination}: not written, the ONNX file detects other objects: {parity}")
    return report


def _check(destination: Path, size: tuple[int, int] | None, batch: int | None) -> None:
    if destination.exists():
        raise ConfigError(f"{destination}: exists already and is not written over; remove it or name another file")
    for name, value in (("height", size and size[0]), ("width", size and size[1]), ("batch", batch)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} {value}: allowed are positive numbers")
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise ConfigError(f"writing ONNX needs {' and '.join(missing)}; install with: pip install 'solq-lab[export]'")


def _write(
    graph: DetectionGraph, path: Path, size: tuple[int, int] | None, batch: int | None, predictor: Predictor
) -> dict[str, list[int | str]]:
    """Trace the graph, write it as ONNX with its metadata, and return the shapes of its inputs."""
    height, width = size or TRACED
    example = (
        torch.zeros(batch or 2, 3, height, width, dtype=torch.uint8),
        torch.tensor([[height, width - 1]] * (batch or 2)),
    )
    free = torch.export.Dim.DYNAMIC
    sides = {0: free} if batch is None else {}
    shapes = {"pixels": sides | ({2: free, 3: free} if size is None else {}), "sizes": sides}
    try:
        written = _translate(graph, example, shapes)
    except Exception as error:  # the tracer and the translator raise dozens of kinds
        cure = "; try a fixed size (--height, --width) and batch (--batch)" if size is None or batch is None else ""
        reason = " ".join(str(error).split())[:400]
        raise ExportError(f"this model cannot be traced{cure}: {type(error).__name__}: {reason}") from error

    model: Any = written.model  # in general its values may be without name or shape, these have both
    model.ir_version = IR_VERSION
    # The tracer calls the free sides s77 and the like.
    names = dict(zip(map(str, model.graph.inputs[0].shape), ("batch", "channels", "height", "width"), strict=True))
    for value in (*model.graph.inputs, *model.graph.outputs):
        for axis, side in enumerate(value.shape):
            if not isinstance(side, int) and str(side) in names:
                value.shape[axis] = names[str(side)]

    inputs = {
        value.name: [side if isinstance(side, int) else str(side) for side in value.shape]
        for value in model.graph.inputs
    }
    model.metadata_props.update(_metadata(predictor, inputs))
    written.save(path)
    return inputs


@torch.no_grad()
def _translate(graph: DetectionGraph, example: tuple[Tensor, ...], shapes: dict[str, dict]) -> torch.onnx.ONNXProgram:
    """The graph as ONNX, traced with example inputs; `shapes` names their free sides."""
    for chatty in ("onnxscript", "onnx_ir"):  # a line for every node that they simplify, a warning for others
        logging.getLogger(chatty).setLevel(logging.ERROR)

    program = torch.export.export(graph, example, dynamic_shapes=shapes, strict=False)
    program = program.run_decompositions({torch.ops.solq_lab.ms_deform_attn.default: _sample_plainly})
    written = torch.onnx.export(
        program,
        dynamo=True,
        input_names=INPUTS,
        output_names=graph.outputs,
        opset_version=OPSET,
        external_data=False,
        verbose=False,
    )
    assert written is not None  # with dynamo=True
    return written


def _sample_plainly(value: Tensor, flat_shapes: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    """Deformable attention by `grid_sample`, in place of our operator, which ONNX does not know."""
    shapes = list(zip(flat_shapes[::2], flat_shapes[1::2], strict=True))
    return ms_deform_attn_reference(value, shapes, locations, weights)


def _metadata(predictor: Predictor, inputs: dict[str, list[int | str]]) -> dict[str, str]:
    """Metadata for users of the file, text by name."""
    facts = {
        "classes": {"names": predictor.classes.names, "category_ids": predictor.classes.category_ids},
        "codec": describe_codec(predictor.codec),
        "inputs": inputs,
        "normalisation": {"inside the graph": True, "mean": PIXEL_MEAN, "std": PIXEL_STD},
        "test_size": {"short": predictor.experiment.data.test_scale, "longest": predictor.experiment.data.max_size},
    }
    texts = {name: json.dumps(fact, ensure_ascii=False) for name, fact in facts.items()}
    return texts | {"experiment": without_paths(predictor.experiment).to_yaml(), "producer": "solq_lab"}
