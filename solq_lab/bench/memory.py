"""Peak memory, measured in processes of their own: scoring a split of COCO's size, training steps, and a prediction."""

import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from solq_lab import distributed
from solq_lab.allocation import keep_freed_memory
from solq_lab.bench import network
from solq_lab.bench.evaluation import DETECTIONS, draw_images, draw_results, evaluate_plainly, keep_shape, same_numbers
from solq_lab.bench.network import TABLE_5, Workload, released_model
from solq_lab.bench.scenes import coco_document
from solq_lab.bench.timing import Row
from solq_lab.config import Experiment, load_experiment
from solq_lab.evaluation.coco import KINDS, evaluate_results
from solq_lab.evaluation.gathering import share_from_main, stream_to_main
from solq_lab.evaluation.results import write_results
from solq_lab.models.checkpointing import checkpoint_activations
from solq_lab.models.onednn import use_onednn
from solq_lab.ops.ms_deform_attn import use_implementation
from solq_lab.studies.efficiency import build_random_network

NUM_IMAGES = 5000  # of COCO's validation split
OBJECTS = 7  # per image, COCO's mean
PROCESSES = 2  # that share an evaluation
TRAINING_SIZE = (800, 1333)  # COCO's usual training image
DEMO = Path(__file__).resolve().parents[2] / "experiments" / "shapes.yaml"


def rows(num_images: int = NUM_IMAGES, size: tuple[int, int] = TRAINING_SIZE) -> Iterator[Row]:
    """Scoring against pycocotools, activation checkpointing against none, demo and prediction against plain torch.

    `num_images` are scored; `size` is the (height, width) of the training image, pixels.
    """
    yield _row(
        f"main of {PROCESSES} processes, {num_images} images x {DETECTIONS} masks, {', '.join(KINDS)} AP and the "
        "results file; baseline segm AP alone in pycocotools",
        _in_processes("score_plainly", num_images),
        _in_processes("score", num_images, processes=PROCESSES),
        lambda expected, found: same_numbers(np.array(expected), found, "segm"),
    )

    trained = Workload(released_model(), image=size, shown=size, batch=1, repeats=1)
    yield _row(
        f"one training step, {trained.describe(size, 1)}, with activation checkpointing; baseline without",
        _in_processes("train", False, *size),
        _in_processes("train", True, *size),
        lambda expected, found: np.allclose(expected, found, rtol=1e-5),  # sums in float32, by several threads
    )

    demo = load_experiment(DEMO)
    side = demo.data.max_size
    yield _row(
        f"one training step of the demo, {side}x{side}, batch {demo.train.batch_size}; baseline with grid_sample",
        _in_processes("train_demo", "reference"),
        _in_processes("train_demo", "cpu"),
        lambda expected, found: np.allclose(expected, found, rtol=1e-2),
    )

    yield _row(
        f"prediction, {TABLE_5.describe(TABLE_5.shown, 1)}, with masks; baseline with grid_sample, mask by mask",
        _in_processes("predict", "plainly"),
        _in_processes("predict", "ours"),
        lambda expected, found: np.allclose(expected, found, rtol=1e-2, atol=1e-3),
    )


def _row(what: str, plain: dict[str, Any], ours: dict[str, Any], equal: Callable[[Any, Any], bool]) -> Row:
    return Row("memory", what, plain["peak"], ours["peak"], bool(equal(plain["numbers"], ours["numbers"])), "GiB")


def peak_memory() -> float:
    """GiB that this process has held at most, the pages of shared libraries included."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # not Linux; there the number below may be that of the parent before the start
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


# What the processes measure. Each function returns numbers to compare.


def score_plainly(images: int) -> list[float]:
    """All results in one list, their masks scored by pycocotools."""
    document = coco_document(0, num_images=images, objects=OBJECTS)
    results = keep_shape(draw_results(document), "segm")
    return evaluate_plainly(document, results, "segm").tolist()


def score(images: int, *, rank: int, folder: Path) -> dict[str, float]:
    """One of `PROCESSES` that draw results, stream them to the first, and wait for its numbers."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES)
    document = coco_document(0, num_images=images, objects=OBJECTS)
    share = [image["id"] for image in document["images"]][rank::PROCESSES]
    results = [result for found in stream_to_main(draw_images(document, share)) for result in found]
    results.sort(key=lambda result: result["image_id"])
    evaluation = share_from_main(lambda: evaluate_results(document, results))
    if distributed.is_main():
        write_results(folder / "detections.json.gz", results)
    distributed.wait_for_all()
    dist.destroy_process_group()
    return evaluation.metrics


def train(checkpointed: bool, height: int, width: int) -> Sequence[float]:
    """Loss and gradient norm of one optimiser step that keeps its activations or recomputes them."""
    keep_freed_memory(keep=not checkpointed)  # as the training process does, and the layers below
    work = Workload(released_model(), image=(height, width), shown=(height, width), batch=1, repeats=1)
    model = build_random_network(work.experiment).train()
    use_onednn(model, training=True)
    if checkpointed:
        checkpoint_activations(model)
    step = network.stepper(model, work.experiment, network.draw_batch(work))
    torch.manual_seed(1)  # of the dropout
    return step()


def train_demo(implementation: str) -> Sequence[float]:
    """Loss and gradient norm of one optimiser step of the demo."""
    experiment: Experiment = load_experiment(DEMO)
    size = (experiment.data.max_size, experiment.data.max_size)
    work = Workload(experiment, image=size, shown=size, batch=experiment.train.batch_size, repeats=1)
    step = network.stepper(build_random_network(experiment).train(), experiment, network.draw_batch(work))
    with use_implementation(implementation):
        return step()


def predict(way: str) -> list[float]:
    """Scores of one image's detections."""
    plainly, ours = network.inference_ways(TABLE_5)
    _, detections = {"plainly": plainly, "ours": ours}[way]()
    return detections.scores.tolist()


def _in_processes(what: str, *arguments: int | str, processes: int = 1) -> dict[str, Any]:
    """Call one of the functions above in new processes: "numbers" and "peak" of the first of them."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", __name__, folder, what, json.dumps(arguments)]
        ranks = [[str(rank)] for rank in range(processes)] if processes > 1 else [[]]
        children = [subprocess.Popen([*command, *rank], stdout=subprocess.PIPE, text=True) for rank in ranks]
        outputs = [child.communicate()[0] for child in children]
    failed = [child.returncode for child in children if child.returncode]
    if failed:
        raise RuntimeError(f"{what}: a measuring process ended with status {failed[0]}; its error is above")
    return json.loads(outputs[0])


if __name__ == "__main__":
    folder, what, arguments, *rank = sys.argv[1:]
    place = {"rank": int(rank[0]), "folder": Path(folder)} if rank else {}
    numbers = globals()[what](*json.loads(arguments), **place)
    sys.stdout.write(json.dumps({"numbers": numbers, "peak": peak_memory()}))
