"""From a data set to batches: padding, the order of pictures over a whole training, and the worker processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from solq_lab.data.annotations import DataError
from solq_lab.structures import ImageBatch, Target


def collate(samples: list[tuple[Tensor, Target]]) -> tuple[ImageBatch, list[Target]]:
    """One batch of samples (picture (3, H, W) uint8, target), padded bottom and right to the largest sides."""
    height = max(picture.shape[1] for picture, _ in samples)
    width = max(picture.shape[2] for picture, _ in samples)
    pixels = torch.zeros(len(samples), 3, height, width, dtype=torch.uint8)
    padding = torch.ones(len(samples), height, width, dtype=torch.bool)
    for row, (picture, _) in enumerate(samples):
        _, picture_height, picture_width = picture.shape
        pixels[row, :, :picture_height, :picture_width] = picture
        padding[row, :picture_height, :picture_width] = False
    return ImageBatch(pixels, padding), [target for _, target in samples]


class BatchStream(Sampler[list[tuple[int, int]]]):
    """The keys (epoch, index) of every batch of a training, one list per backward pass of one process.

    Each epoch is a permutation drawn from (seed, epoch), cut into global batches; an incomplete last one is dropped. A
    global batch is the same whatever the number of processes: each rank takes a contiguous slice of it, and gradient
    accumulation cuts that slice on. A stream that starts at a later step goes on exactly where a broken-off one stood.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        seed: int,
        total_steps: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
    ) -> None:
        """Lay out the stream.

        Args:
            length: pictures in the data set.
            batch_size: pictures per optimiser step, over all ranks and accumulated passes.
            seed: of the permutations.
            total_steps: optimiser steps of the whole training.
            start_step: optimiser steps already done.
            rank, world_size: which of how many processes asks.
            accumulate: backward passes per optimiser step; each gets its own list of keys.

        Raises:
            DataError: the data set is smaller than one batch.
            ValueError: the batch does not divide by world_size x accumulate.
        """
        if batch_size % (world_size * accumulate):
            raise ValueError(
                f"batch_size {batch_size} does not divide by processes x accumulate = {world_size} x {accumulate}"
            )
        if length < batch_size:
            raise DataError(f"the data set has {length} pictures, fewer than train.batch_size {batch_size}; lower it")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.total_steps, self.start_step = total_steps, start_step
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of one epoch."""
        return self.length // self.batch_size

    def __len__(self) -> int:
        return (self.total_steps - self.start_step) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order_of, order = -1, np.empty(0, dtype=np.int64)
        passes = self.world_size * self.accumulate
        for step in range(self.start_step, self.total_steps):
            epoch, batch = divmod(step, self.steps_per_epoch)
            if epoch != order_of:
                order_of, order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.length)
            indices = order[batch * self.batch_size : (batch + 1) * self.batch_size].reshape(passes, -1)
            for row in indices[self.rank * self.accumulate : (self.rank + 1) * self.accumulate]:
                yield [(epoch, index) for index in row.tolist()]


def make_loader(dataset: Dataset, batches: Iterable[list], workers: int) -> DataLoader:
    """A loader of (ImageBatch, list of Target), its pictures in page-locked memory where there is a CUDA device.

    Worker processes outlive an iteration and compute with one thread each, as PyTorch sets them up.

    Args:
        dataset: gives the sample of a key.
        batches: lists of keys, for example a `BatchStream`.
        workers: loader processes; 0 loads in this process.
    """
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
    )
