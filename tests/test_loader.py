"""Batches: padding, the global order of pictures for any number of processes, and going on at any step."""

from __future__ import annotations

from itertools import chain

import pytest
import torch

from solq_lab.data.coco import DataError
from solq_lab.data.loader import BatchLoader, collate
from solq_lab.data.order import BatchStream
from solq_lab.structures import Target


def sample(height: int, width: int, image_id: int = 0) -> tuple[torch.Tensor, Target]:
    target = Target(
        image_id, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), None, (height, width), (height, width)
    )
    return torch.full((3, height, width), 7, dtype=torch.uint8), target


class Numbers(torch.utils.data.Dataset):
    """Pictures that show their key: the epoch as height, the index as image id; and the thread count as width."""

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


def test_every_epoch_shows_every_picture_at_most_once_and_drops_the_incomplete_batch():
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


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_stream_goes_on_at_any_step_as_if_never_interrupted(accumulate):
    whole = list(BatchStream(11, 4, seed=5, total_steps=9, accumulate=accumulate))
    for start in range(10):
        rest = BatchStream(11, 4, seed=5, total_steps=9, start_step=start, accumulate=accumulate)
        assert list(rest) == whole[start * accumulate :]
        assert len(rest) == len(whole[start * accumulate :])


def test_the_seed_decides_the_order():
    first, again, other = (list(BatchStream(20, 4, seed=seed, total_steps=5)) for seed in (1, 1, 2))
    assert first == again != other


def test_a_data_set_smaller_than_a_batch_is_refused():
    with pytest.raises(DataError, match=r"3 pictures, fewer than train\.batch_size 4; lower it"):
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
