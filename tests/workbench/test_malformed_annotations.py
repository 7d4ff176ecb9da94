"""Malformed annotation files are trained and evaluated, or rejected with their name, an id and a reason."""

import json
import math
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from malformed_annotations import HEIGHT, NUM_IMAGES, WIDTH, annotation_files, valid_document
from PIL import Image
from tiny import tiny_experiment

from solq_lab.build import build_codec, build_model
from solq_lab.data.annotations import DataError
from solq_lab.data.coco import CocoDataset
from solq_lab.data.loader import collate
from solq_lab.data.transforms import ReleasedAugmentation
from solq_lab.evaluation.coco import evaluate_results
from solq_lab.evaluation.results import detections_to_results
from solq_lab.models.solq import SOLQ
from solq_lab.training.losses import build_criterion

EXPERIMENT = tiny_experiment(Path())
SECONDS = 60  # for one case, on a busy machine
SMALL = ReleasedAugmentation(train_scales=[32, 48], max_size=64, crop_scales=[40], crop_size=(20, 30))


class Hang(BaseException):
    """A case took longer than `SECONDS`; no `Exception`, so that nothing swallows it."""


@contextmanager
def time_limit() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two images that the annotation files are about; a case writes its file beside them."""
    root = tmp_path_factory.mktemp("malformed")
    (root / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    for name in NUM_IMAGES:
        Image.fromarray(pixels).save(root / "images" / name)
    return root


@cache
def model_of(channels: int) -> SOLQ:
    torch.manual_seed(0)
    return build_model(EXPERIMENT, channels)


def losses_of_a_step(dataset: CocoDataset) -> list[float]:
    """Every loss of one step on the images of a data set, and the gradient norm."""
    criterion = build_criterion(EXPERIMENT, build_codec(EXPERIMENT))
    images, targets = collate([dataset[0, index] for index in range(len(dataset))])
    model = model_of(len(dataset.classes)).train()
    model.zero_grad()
    losses = criterion(model(images.normalised()), targets, num_boxes=sum(len(target.labels) for target in targets))
    criterion.total(losses).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return [value.item() for value in (*losses.values(), norm)]


def perfect_results(dataset: CocoDataset) -> list[dict]:
    return [
        result
        for index, image_id in enumerate(dataset.image_ids)
        for result in detections_to_results(dataset.objects(index), image_id, dataset.classes)
    ]


def read(folder: Path, route: str) -> CocoDataset:
    """The data set, after every sample of two epochs has been made."""
    dataset = CocoDataset(
        folder / "images",
        folder / "instances.json",
        mask_size=EXPERIMENT.codec.mask_size,
        transform=SMALL,
        mask_route=route,
    )
    for epoch in range(2):
        for index in range(len(dataset)):
            _, target = dataset[epoch, index]
            assert target.boxes.isfinite().all()
            assert len(target.masks) == len(target.labels) == len(target.boxes)
    return dataset


def check_message(error: DataError, file: Path) -> None:
    """One line that can be printed, with the file or its folder, the place in it, and no inside of ours."""
    message = str(error)
    message.encode()
    assert str(file.parent) in message
    assert "\n" not in message
    assert len(message) < 600
    assert re.search(
        r"annotation id|annotations\[\d|image id|images\[\d|categor(y id|ies\[\d)|not JSON|not a COCO annotation",
        message,
    ), message


def outcome(folder: Path, content: bytes) -> str:
    """What happens to an annotation file: "rejected", or "trained" and as a rule evaluated; anything else raises."""
    file = folder / "instances.json"
    file.write_bytes(content)
    try:
        dataset = read(folder, "window")
        read(folder, "bitmap")
    except DataError as error:
        check_message(error, file)
        return "rejected"
    if len(dataset):
        assert all(map(math.isfinite, losses_of_a_step(dataset)))
    try:
        evaluation = evaluate_results(file, perfect_results(dataset), kinds=("box", "segm", "boundary"))
    except DataError as error:  # of what is no target: a crowd, or an object without area
        check_message(error, file)
        return "trained, rejected by the evaluation"
    assert all(math.isnan(value) or -1 <= value <= 1 for value in evaluation.metrics.values())
    return "trained"


QUICK = settings(
    max_examples=200,
    derandomize=True,
    database=None,
    report_multiple_bugs=False,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)


@QUICK
@given(content=annotation_files())
def test_a_malformed_file_is_trained_and_evaluated_or_rejected_with_a_reason(folder, content):
    with time_limit():
        event(outcome(folder, content))


@pytest.mark.slow
@settings(QUICK, max_examples=2500)
@given(content=annotation_files())
def test_thousands_of_malformed_files_are_trained_and_evaluated_or_rejected_with_a_reason(folder, content):
    with time_limit():
        event(outcome(folder, content))


def test_the_document_without_faults_is_trained(folder):
    assert outcome(folder, json.dumps(valid_document()).encode()) == "trained"
