"""Order of the images in a training: the same for any number of processes, and resumable at any step."""

from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass

import numpy as np
from torch.utils.data import Sampler

from solq_lab.data.annotations import DataError


@dataclass(eq=False)
class BatchStream(Sampler[list[tuple[int, int]]]):
    """The keys (epoch, index) of every batch of a training, one list per backward pass of one process.

    Each epoch is a permutation drawn from (seed, epoch), cut into global batches; an incomplete last one is dropped. A
    global batch is the same whatever the number of processes: each rank takes a contiguous slice of it, and gradient
    accumulation divides that slice further. A stream with a `start_step` resumes exactly there.

    Raises:
        DataError: the data set is smaller than one batch.
        ValueError: the batch does not divide by world_size x accumulate.
    """

    length: int  # images in the data set
    batch_size: int  # images per optimiser step, over all ranks and accumulated passes
    _: KW_ONLY
    seed: int  # of the permutations
    total_steps: int  # optimiser steps of the whole training
    start_step: int = 0  # optimiser steps already done
    rank: int = 0  # of this process
    world_size: int = 1  # how many processes there are
    accumulate: int = 1  # backward passes per optimiser step; each gets its own list of keys
    # Width over height of all images in an epoch, (length,): batches are then made of alike shapes (`batch_by_aspect`),
    # which need less padding. None: shapes come as they fall.
    aspects: Callable[[int], np.ndarray] | None = None

    def __post_init__(self) -> None:
        passes = self.world_size * self.accumulate
        if self.batch_size % passes:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide by processes x accumulate = {self.world_size} x "
                f"{self.accumulate}"
            )
        if self.length < self.batch_size:
            raise DataError(
                f"the data set has {self.length} images, fewer than train.batch_size {self.batch_size}; lower it"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of one epoch."""
        return self.length // self.batch_size

    def __len__(self) -> int:
        return (self.total_steps - self.start_step) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        drawn, order = -1, np.empty((0, self.batch_size), dtype=np.int64)  # (steps_per_epoch, batch_size) of an epoch
        passes = self.world_size * self.accumulate
        for step in range(self.start_step, self.total_steps):
            epoch, batch = divmod(step, self.steps_per_epoch)
            if epoch != drawn:
                drawn, random = epoch, np.random.default_rng((self.seed, epoch))
                images = random.permutation(self.length)
                order, _ = _cut(images, self.batch_size)
                if self.aspects is not None:
                    order = batch_by_aspect(images, self.aspects(epoch), self.batch_size, random)
            indices = order[batch].reshape(passes, -1)
            for row in indices[self.rank * self.accumulate : (self.rank + 1) * self.accumulate]:
                yield [(epoch, index) for index in row.tolist()]


def batch_by_aspect(order: np.ndarray, aspects: np.ndarray, batch_size: int, random: np.random.Generator) -> np.ndarray:
    """Batches of wide images and batches of tall ones, shuffled; what is left of both makes one mixed batch.

    There are as many batches as without buckets, and no image comes twice. Within a batch images are sorted by aspect:
    the slices of ranks and backward passes are padded by themselves, and are of similar shape too.

    Args:
        order: the images (I,) in random order.
        aspects: (I,) width over height of image i.
        batch_size: of the global batches.
        random: shuffles the batches.

    Returns:
        (I // batch_size, batch_size) indices.
    """
    wide = aspects[order] >= 1
    (wide_batches, wide_rest), (tall_batches, tall_rest) = _cut(order[wide], batch_size), _cut(order[~wide], batch_size)
    mixed, _ = _cut(random.permutation(np.concatenate([wide_rest, tall_rest])), batch_size)
    batches = random.permutation(np.concatenate([wide_batches, tall_batches, mixed]))  # shuffles rows
    return np.take_along_axis(batches, np.argsort(aspects[batches], axis=1, kind="stable"), axis=1)


def _cut(order: np.ndarray, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Whole batches (n, batch_size) of a sequence (I,), and the rest (< batch_size,)."""
    end = len(order) // batch_size * batch_size
    return order[:end].reshape(-1, batch_size), order[end:]
