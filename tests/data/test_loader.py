"""Batches: padding, the order of images for any number of processes and at any step, and workers that die."""

import hashlib
import logging
import multiprocessing
import os
import signal
import time
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import SIDE, tiny_experiment, write_tiny_dataset

from solq_lab.data.coco import CocoDataset, DataError
from solq_lab.data.loader import BatchLoader, LoaderError, collate
from solq_lab.data.order import BatchStream, batch_by_aspect
from solq_lab.data.transforms import ReleasedAugmentation, size_after
from solq_lab.runs import create_run
from solq_lab.structures import Target
from solq_lab.training.trainer import Trainer

AUGMENTATION = ReleasedAugmentation(train_scales=[40, 48], max_size=64, crop_scales=[44], crop_size=(24, 40))


def sample(height: int, width: int, image_id: int = 0) -> tuple[torch.Tensor, Target]:
    target = Target(
        image_id, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), None, (height, width), (height, width)
    )
    return torch.full((3, height, width), 7, dtype=torch.uint8), target


class Numbers(torch.utils.data.Dataset):
    """Images that show their key: the epoch as height, the index as image id; and the thread count as width."""

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, Target]:
        epoch, index = key
        return sample(epoch + 1, torch.get_num_threads(), index)


def test_collate_pads_bottom_and_right_to_the_largest_sides():
    images, targets = collate([sample(4, 9), sample(6, 5)])
    assert images.pixels.shape == (2, 3, 6, 9)
    assert images.pixels.dtype == torch.uint8
    assert (images.pixels[0, :, :4, :9] == 7).all()
    assert (images.pixels[1, :, :6, :5] == 7).all()
    assert images.pixels.sum() == 7 * 3 * (4 * 9 + 6 * 5)
    assert torch.equal(images.padding, images.pixels[:, 0] == 0)
    assert [target.image_size for target in targets] == [(4, 9), (6, 5)]


def test_every_epoch_shows_every_image_at_most_once_and_drops_the_incomplete_batch():
    stream = BatchStream(10, 3, seed=1, total_steps=7)
    batches = list(stream)
    assert len(batches) == len(stream) == 7
    assert stream.steps_per_epoch == 3
    for epoch in range(2):
        keys = list(chain(*batches[epoch * 3 : epoch * 3 + 3]))
        assert {key[0] for key in keys} == {epoch}
        assert len({index for _, index in keys}) == 9
    assert [index for _, index in batches[0]] != [index for _, index in batches[3]]  # another order each epoch


@pytest.mark.parametrize(("world_size", "accumulate"), [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_the_global_batches_are_the_same_for_any_number_of_processes(world_size, accumulate):
    whole = list(BatchStream(21, 8, seed=3, total_steps=5))
    ranks = [
        list(BatchStream(21, 8, seed=3, total_steps=5, rank=rank, world_size=world_size, accumulate=accumulate))
        for rank in range(world_size)
    ]
    for step, batch in enumerate(whole):
        passes = [rank[step * accumulate : (step + 1) * accumulate] for rank in ranks]
        assert list(chain(*chain(*passes))) == batch


@pytest.mark.parametrize("bucketed", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_stream_goes_on_at_any_step_as_if_never_interrupted(accumulate, bucketed):
    aspects = np.random.default_rng(0).uniform(0.5, 2, 23)
    arguments = {"seed": 5, "total_steps": 9, "accumulate": accumulate}
    arguments["aspects"] = (lambda epoch: aspects) if bucketed else None
    whole = list(BatchStream(23, 4, **arguments))
    assert len(whole) == 9 * accumulate
    assert len(set(chain(*whole[: 5 * accumulate]))) == 20  # the first epoch
    for start in range(10):
        rest = BatchStream(23, 4, start_step=start, **arguments)
        assert list(rest) == whole[start * accumulate :]
        assert len(rest) == len(whole[start * accumulate :])


def test_the_seed_decides_the_order():
    first, again, other = (list(BatchStream(20, 4, seed=seed, total_steps=5)) for seed in (1, 1, 2))
    assert first == again != other


def test_a_data_set_smaller_than_a_batch_is_refused():
    with pytest.raises(DataError, match=r"3 images, fewer than train\.batch_size 4; lower it"):
        BatchStream(3, 4, seed=0, total_steps=1)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="batch_size 6 does not divide by processes x accumulate = 2 x 2"):
        BatchStream(30, 6, seed=0, total_steps=1, world_size=2, accumulate=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_gives_the_streams_batches_in_order(workers):
    stream = BatchStream(9, 2, seed=0, total_steps=6)
    loader = BatchLoader(Numbers(), stream, workers)
    for keys, (images, targets) in zip(stream, loader, strict=True):
        assert [target.image_id for target in targets] == [index for _, index in keys]
        assert images.pixels.shape[2] == keys[0][0] + 1
        assert workers == 0 or images.pixels.shape[3] == 1  # one thread in each worker


# The same samples, whoever loads them


def dataset_of(root: Path) -> CocoDataset:
    return CocoDataset(root / "train", root / "train.json", mask_size=16, transform=AUGMENTATION, seed=4)


def fingerprints(loader: BatchLoader) -> list[list[str]]:
    """A hash of every sample's pixels, boxes, labels and masks, batch by batch."""
    batches = []
    for images, targets in loader:
        batches.append([])
        for pixels, padding, target in zip(*images, targets, strict=True):
            height, width = target.image_size
            assert not padding[:height, :width].any()
            parts = (pixels[:, :height, :width].contiguous(), target.boxes, target.labels, target.masks)
            digest = hashlib.sha256(str((target.image_id, target.image_size)).encode())
            for part in parts:
                digest.update(part.numpy().tobytes())
            batches[-1].append(digest.hexdigest())
    return batches


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize("bucketed", [False, True])
def test_samples_are_the_same_to_the_bit_for_any_workers_ranks_and_accumulation(data_root, bucketed):
    dataset = dataset_of(data_root)
    stream = {"seed": 9, "total_steps": 4, "aspects": dataset.aspects if bucketed else None}
    whole = fingerprints(BatchLoader(dataset, BatchStream(12, 4, **stream), 0))
    assert len(set(chain(*whole))) == 16  # another augmentation in each of the epochs
    for workers, world_size, accumulate in ((1, 1, 1), (3, 1, 2), (0, 2, 1), (3, 2, 2), (1, 4, 1)):
        shares = [
            BatchStream(12, 4, rank=rank, world_size=world_size, accumulate=accumulate, **stream)
            for rank in range(world_size)
        ]
        ranks = [fingerprints(BatchLoader(dataset, share, workers)) for share in shares]
        for step, batch in enumerate(whole):
            passes = [rank[step * accumulate : (step + 1) * accumulate] for rank in ranks]
            assert list(chain(*chain(*passes))) == batch, (workers, world_size, accumulate)


# Batches of one shape


@settings(deadline=None)
@given(length=st.integers(1, 60), batch_size=st.integers(1, 9), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_batches_of_one_shape_lose_and_repeat_nothing(length, batch_size, share, seed):
    random = np.random.default_rng(seed)
    aspects = np.where(random.random(length) < share, 0.7, 1.5) + 0.01 * random.random(length)
    batches = batch_by_aspect(random.permutation(length), aspects, batch_size, random)
    assert batches.shape == (length // batch_size, batch_size)
    assert len(set(batches.ravel().tolist())) == batches.size
    wide = aspects[batches] >= 1
    assert (wide.any(axis=1) & ~wide.all(axis=1)).sum() <= 1  # one batch of what was left of both
    assert (np.diff(aspects[batches], axis=1) >= 0).all()


def test_buckets_save_padding_on_coco(coco_tiny):
    """Half of the released augmentation's images are crops of any shape, the rest 4 : 3 or 3 : 4."""
    released = ReleasedAugmentation(
        train_scales=range(480, 801, 32), max_size=1333, crop_scales=(400, 500, 600), crop_size=(384, 600)
    )
    files = coco_tiny / "train2017", coco_tiny / "annotations" / "instances_train2017.json"
    dataset = CocoDataset(*files, transform=released)
    wasted = []
    for aspects in (None, dataset.aspects):
        padded = filled = 0
        for keys in BatchStream(len(dataset), 8, seed=0, total_steps=36, aspects=aspects, accumulate=2):
            sizes = np.array([size_after(dataset._plan(*key), dataset.truth.size(key[1])) for key in keys])
            padded += len(keys) * sizes.max(axis=0).prod()
            filled += sizes.prod(axis=1).sum()
        wasted.append(1 - filled / padded)
    assert 0.3 < wasted[0] < 0.45
    assert wasted[1] < 0.8 * wasted[0]


# Images that cannot be read


@pytest.fixture
def damaged(tmp_path) -> CocoDataset:
    """Image 3 breaks off, image 4 has vanished, both after the start."""
    dataset = dataset_of(write_tiny_dataset(tmp_path / "data", train=8))
    third = tmp_path / "data" / "train" / "3.png"
    third.write_bytes(third.read_bytes()[:100])
    (tmp_path / "data" / "train" / "4.png").unlink()
    return dataset


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_stops_with_its_file_id_annotations_and_cure(damaged, workers):
    loader = BatchLoader(damaged, [[(0, 0), (0, 1)], [(0, 4), (0, 2)], [(0, 5)]], workers)
    next(loader)
    with pytest.raises(
        DataError, match=r"train\.json: image id 3: .*3\.png: not a whole image.*fetch the file again"
    ) as caught:
        next(loader)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_images_are_replaced_by_the_next_ones_counted_and_logged(damaged, workers, caplog):
    loader = BatchLoader(damaged, [[(1, 2), (1, 0)], [(1, 3)], [(1, 5)]], workers, substitutes=2)
    with caplog.at_level(logging.ERROR):
        found = [[target.image_id for target in targets] for _, targets in loader]
    assert found == [[5, 1], [5], [6]]
    assert loader.replaced == 3
    assert "image id 3" in caplog.messages[0]
    assert "4.png: cannot be read: No such file" in caplog.messages[2]
    assert caplog.messages[2].endswith("the next image takes its place (3 replaced so far)")


def test_the_last_image_is_replaced_by_the_first(damaged):
    (damaged.images / "8.png").unlink()
    ((_, (target,)),) = BatchLoader(damaged, [[(0, 7)]], 0, substitutes=1)
    assert target.image_id == 1


def test_a_lost_disk_is_no_damaged_image(damaged):
    for file in damaged.images.iterdir():
        file.unlink()
    with pytest.raises(DataError, match=r"image id 2: .* \(2 more could not be read\)"):
        next(BatchLoader(damaged, [[(0, 1)]], 0, substitutes=2))


# Workers that die


class Deadly(torch.utils.data.Dataset):
    """Keys are images, or what befalls the process that loads them."""

    def __getitem__(self, key: int | str) -> tuple[torch.Tensor, Target]:
        match key:
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "exit":
                os._exit(3)
            case "bug":
                raise RuntimeError("a fault of the program")
            case "asked":
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                    os.kill(os.getpid(), number)
        return sample(4, 4, 0)


def last_words(key: str, **arguments: float) -> str:
    """The message with which a loader ends that is dealt `key` in its second worker, after one good batch."""
    loader = BatchLoader(Deadly(), [[0], [key], [0], [0]], 2, **arguments)
    next(loader)
    with pytest.raises(RuntimeError if key == "bug" else LoaderError) as caught:
        list(loader)
    assert not multiprocessing.active_children()
    return str(caught.value)


def test_a_killed_worker_is_named_at_the_next_batch_and_nothing_hangs():
    started = time.monotonic()
    message = last_words("killed", patience=20.0)
    assert "loader process 2 of 2 (pid " in message
    assert "was killed by SIGKILL, for lack of memory as a rule; lower data.workers" in message
    assert time.monotonic() - started < 20


def test_a_worker_that_ends_is_named_with_its_exit_status():
    assert "loader process 2 of 2 (pid " in (message := last_words("exit"))
    assert "ended with exit status 3" in message


def test_a_worker_that_does_not_answer_is_given_up():
    message = last_words("stopped", patience=2.0)
    assert "no images for 2 s from 2 loader processes (pids " in message
    assert "look at the image folder" in message


def test_a_fault_of_the_program_keeps_its_traceback():
    assert "RuntimeError: a fault of the program" in last_words("bug")


def test_workers_hear_no_stop_signal_and_this_process_does(capfd):
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        loader = BatchLoader(Deadly(), [["asked"], ["asked"], [0]], 1)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert len(list(loader)) == 3
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert heard == [signal.SIGUSR1]
    assert capfd.readouterr().err == ""


def test_a_dying_worker_interrupts_nothing_else():
    """PyTorch's own handler would raise in the middle of whatever the training does, such as saving."""
    before = signal.getsignal(signal.SIGCHLD)
    loader = BatchLoader(Deadly(), [[0], ["killed"], [0]], 1)
    assert signal.getsignal(signal.SIGCHLD) == before
    (worker,) = multiprocessing.active_children()
    worker.join(timeout=20)
    assert worker.exitcode == -signal.SIGKILL
    with pytest.raises(LoaderError, match=r"loader process 1 of 1 .* was killed by SIGKILL"):
        list(loader)


def test_a_loader_that_is_left_leaves_no_process():
    loader = BatchLoader(Deadly(), [[0]] * 20, 2)
    next(loader)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    del loader
    for process in workers:
        process.join(timeout=10)
        assert not process.is_alive()


def test_an_experiment_asks_for_buckets_and_replacements(tmp_path):
    root = write_tiny_dataset(tmp_path / "data", train=8)
    asked = {"bucket_by_aspect": True, "unreadable": "replace"}
    for name, options in (("plain", {}), ("asked", asked)):
        run = create_run(tiny_experiment(root, name=name, data=options, train={"steps": 2}), tmp_path / "runs")
        trainer = Trainer(run)
        assert (trainer.stream.aspects is not None) == bool(options)
        (root / "train" / "3.png").unlink(missing_ok=True)
        loader = trainer._load_batches()
        if options:
            assert sum(len(targets) for _, targets in loader) == 8
            assert loader.replaced == 1
        else:
            with pytest.raises(DataError, match=r"image id 3: .*cannot be read: No such file"):
                list(loader)
            Image.new("RGB", (SIDE, SIDE)).save(root / "train" / "3.png")
