"""Peak memory, measured in processes of their own: scoring a validation split of COCO's size, and a training step."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from solq_lab import distributed
from solq_lab.allocation import keep_freed_memory
from solq_lab.bench import network
from solq_lab.bench.evaluation import (
    DETECTIONS,
    draw_images,
    draw_results,
    evaluate_plainly,
    keep_shape,
    same_numbers,
)
from solq_lab.bench.scenes import coco_document
from solq_lab.config import Experiment
from solq_lab.evaluation.coco import KINDS, evaluate_results
from solq_lab.evaluation.gathering import share_from_main, stream_to_main
from solq_lab.evaluation.results import write_results
from solq_lab.models.checkpointing import checkpoint_activations
from solq_lab.models.onednn import use_onednn
from solq_lab.training.optim import build_optimizer, clip_gradients, gradient_norm

NUM_IMAGES = 5000  # of COCO's validation split
OBJECTS = 7  # per image, COCO's mean
PROCESSES = 2  # that share an evaluation
TRAINING_SIZE = (800, 1333)  # COCO's usual training image
EXPERIMENT = Experiment.model_validate({"name": "bench", "model": {"width": 384, "pretrained": "none"}})


class MemoryRow(NamedTuple):
    """One comparison.

    part: name of the benchmark part.
    what: what was done, with its sizes.
    baseline_gib, ours_gib: peak resident memory, GiB.
    equal: whether both gave the same numbers.
    """

    part: str
    what: str
    baseline_gib: float
    ours_gib: float
    equal: bool

    @property
    def ratio(self) -> float:
        """How many times less ours is."""
        return self.baseline_gib / self.ours_gib

    def cells(self) -> tuple[str, str]:
        """Both peaks as text."""
        return f"{self.baseline_gib:.2f} GiB", f"{self.ours_gib:.2f} GiB"

    def to_dict(self) -> dict:
        """The row as JSON types, its ratio included."""
        return self._asdict() | {"ratio": self.ratio}


def rows(num_images: int = NUM_IMAGES, size: tuple[int, int] = TRAINING_SIZE) -> Iterator[MemoryRow]:
    """The evaluation's main process against pycocotools in one; a training step with and without recomputing.

    Args:
        images: that are scored.
        size: (height, width) of the training image, pixels.
    """
    plain, ours = _in_processes("score_plainly", num_images), _in_processes("score", num_images, processes=PROCESSES)
    yield MemoryRow(
        "memory",
        f"main of {PROCESSES} processes, {num_images} images x {DETECTIONS} masks, {', '.join(KINDS)} AP and the "
        "results file; baseline segm AP alone in pycocotools",
        plain["peak"],
        ours["peak"],
        same_numbers(np.array(plain["numbers"]), ours["numbers"], "segm"),
    )
    plain, ours = _in_processes("train", "keep", *size), _in_processes("train", "recompute", *size)
    yield MemoryRow(
        "memory",
        f"one training step, ResNet-50, width {EXPERIMENT.model.width}, {size[0]}x{size[1]}, batch 1, with gradient "
        "checkpointing; baseline without",
        plain["peak"],
        ours["peak"],
        bool(np.allclose(plain["numbers"], ours["numbers"], rtol=1e-5)),  # sums in float32, by several threads
    )


def peak_memory() -> float:
    """GiB that this process has held at most, the pages of shared libraries included."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # not Linux; there the number below may be that of the parent before the start
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


def score_plainly(images: int) -> dict:
    """All results in one list, their masks scored by pycocotools."""
    document = coco_document(0, num_images=images, objects=OBJECTS)
    results = keep_shape(draw_results(document), "segm")
    return {"numbers": evaluate_plainly(document, results, "segm").tolist(), "peak": peak_memory()}


def score(images: int, rank: int, folder: Path) -> dict:
    """One of `PROCESSES` that draw results, stream them to the first, and wait for its numbers."""
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=PROCESSES)
    document = coco_document(0, num_images=images, objects=OBJECTS)
    share = [image["id"] for image in document["images"]][rank::PROCESSES]
    results = [result for found in stream_to_main(draw_images(document, share)) for result in found]
    results.sort(key=lambda result: result["image_id"])
    evaluation = share_from_main(lambda: evaluate_results(document, results))
    if distributed.is_main():
        write_results(folder / "detections.json.gz", results)
    distributed.wait_for_all()
    dist.destroy_process_group()
    return {"numbers": evaluation.metrics, "peak": peak_memory()}


def train(activations: str, height: int, width: int) -> dict:
    """One optimiser step that keeps its activations or recomputes them: loss and gradient norm."""
    keep_freed_memory(keep=activations == "keep")  # as the training process does, and the layers below
    model = network.build_network(EXPERIMENT).train()
    use_onednn(model, training=True)
    if activations == "recompute":
        checkpoint_activations(model)
    criterion = network.build_criterion(EXPERIMENT)
    optimizer = build_optimizer(model, EXPERIMENT.optim)
    images, target = network.draw_images((height, width)), network.draw_target(criterion.codec.mask_size)
    torch.manual_seed(1)  # of the dropout
    loss = criterion.total(criterion(model(images.normalised()), [target]))
    loss.backward()
    norm = gradient_norm(model)
    clip_gradients(model, EXPERIMENT.optim.clip_norm, norm)
    optimizer.step()
    return {"numbers": [loss.item(), norm.item()], "peak": peak_memory()}


def _in_processes(what: str, *arguments: int | str, processes: int = 1) -> dict:
    """Call one of this module's functions in new processes; what the first of them returns."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", __name__, folder, what, *map(str, arguments)]
        children = [
            subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(processes)
        ]
        outputs = [child.communicate()[0] for child in children]
    failed = [child.returncode for child in children if child.returncode]
    if failed:
        raise RuntimeError(f"{what}: a measuring process ended with status {failed[0]}; its error is above")
    return json.loads(outputs[0])


def _main(folder: str, what: str, *arguments: str) -> None:
    *values, rank = arguments
    match what:
        case "score_plainly":
            found = score_plainly(int(values[0]))
        case "score":
            found = score(int(values[0]), int(rank), Path(folder))
        case "train":
            found = train(values[0], int(values[1]), int(values[2]))
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    _main(*sys.argv[1:])
