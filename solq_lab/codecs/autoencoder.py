"""A learned code: the bottleneck of a small convolutional autoencoder of masks."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from solq_lab.bars import progress_bar
from solq_lab.codecs.base import CodecFit, FittedCodec
from solq_lab.codecs.flatten import cell_overlap, hat_weights, resample

GRID = 32  # side of the mask that the network sees and draws
CHANNELS = (16, 32, 32)  # after each halving of the grid; mirrored in the decoder
SAMPLE = 16384  # masks that are kept for the training
STEPS = 800  # of the optimizer
MASKS_PER_STEP = 64
LEARNING_RATE = 3e-3


class AutoencoderCodec(FittedCodec):
    """D numbers between three strided convolutions and three upsampling ones, fitted to masks by their dice and BCE.

    The network works on a 32 x 32 grid: encoding averages the mask over its cells, decoding interpolates the logits
    between their centres and ends in a sigmoid. Vectors are scaled to unit variance over the masks it was fitted to.
    """

    method = "autoencoder"
    loss = "l2_dice"
    threshold = "half"
    averaging: Tensor
    interpolation: Tensor

    def __init__(self, mask_size: int, vector_dim: int) -> None:
        super().__init__(mask_size, vector_dim)
        for name, shape in _shapes(vector_dim).items():
            self.register_buffer(name, torch.zeros(shape))
        self.register_buffer("averaging", cell_overlap(mask_size, GRID), persistent=False)  # (GRID, N)
        self.register_buffer("interpolation", hat_weights(GRID, mask_size), persistent=False)  # (N, GRID)

    def start_fit(self, seed: int = 0) -> AutoencoderFit:
        """A new fit from random weights of the seed."""
        return AutoencoderFit(self, seed)

    def encode(self, masks: Tensor) -> Tensor:
        self._check_fitted()
        self.check_masks(masks)
        dtype = torch.promote_types(masks.dtype, torch.float32)
        tables = {name: table.to(dtype) for name, table in self.named_buffers()}
        with torch.autocast(masks.device.type, enabled=False):
            return _encode(tables, resample(masks.to(dtype), self.averaging))

    def decode(self, vectors: Tensor) -> Tensor:
        """Reconstructions in 0..1."""
        self._check_fitted()
        self.check_vectors(vectors)
        exact = torch.promote_types(vectors.dtype, torch.float32)
        tables = {name: table.to(exact) for name, table in self.named_buffers()}
        with torch.autocast(vectors.device.type, enabled=False):
            logits = _decode(tables, vectors.to(exact))  # (K, GRID, GRID)
            return resample(logits, self.interpolation).sigmoid().to(vectors.dtype)


class AutoencoderFit(CodecFit):
    """A random sample of a stream of masks, on which `tables` trains the network with Adam.

    The sample is small enough to keep (1 KiB a mask), and a data set of a hundred masks is learnt in as many steps as
    one of a million. Everything random has the seed's generators.
    """

    batch_size = 1024

    def __init__(self, codec: AutoencoderCodec, seed: int) -> None:
        self._codec, self._seed, self._seen = codec, seed, 0
        self._sample = torch.zeros(0, GRID, GRID, dtype=torch.uint8)  # shares of cells, of 255

    def update(self, masks: Tensor) -> None:
        """Learn from masks (K, N, N) bool, K at least 1."""
        coarse = resample(masks.to("cpu", torch.float32), self._codec.averaging.cpu())  # (K, GRID, GRID)
        coarse = coarse.mul(255).round().to(torch.uint8)
        room = max(0, SAMPLE - len(self._sample))
        self._sample = torch.cat([self._sample, coarse[:room]])

        # Each later mask takes a random place among all masks so far, if that is one of the sample's.
        random = np.random.default_rng((self._seed, self._seen))
        for offset, mask in enumerate(coarse[room:], start=room):
            place = int(random.integers(self._seen + offset + 1))
            if place < SAMPLE:
                self._sample[place] = mask
        self._seen += len(masks)

    def state(self) -> dict[str, Tensor]:
        return {"sample": self._sample.clone(), "seen": torch.tensor(self._seen)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._sample, self._seen = state["sample"].clone(), int(state["seen"])

    @torch.enable_grad()
    def tables(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self._seed)
        shapes = _shapes(self._codec.vector_dim)
        weights = {name: _first_weights(shape, generator) for name, shape in shapes.items()}
        optimizer = torch.optim.Adam(weights.values(), lr=LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)

        for _ in progress_bar(range(STEPS), desc="autoencoder", unit="step"):
            loss = _reconstruction_loss(weights, self._draw(generator))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return self._standardised({name: weight.detach() for name, weight in weights.items()})

    def _draw(self, generator: torch.Generator) -> Tensor:
        """Masks (K, GRID, GRID) of one step, all flipped and turned in the same random way."""
        chosen = torch.randperm(len(self._sample), generator=generator)[:MASKS_PER_STEP]
        turns, flip = torch.randint(4, (2,), generator=generator).tolist()
        masks = self._sample[chosen].float().div(255).rot90(turns, (1, 2))
        return masks.flip(2) if flip % 2 else masks

    def _standardised(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights with vectors of mean 0 and variance 1 over the sample; both linear maps absorb the scale."""
        vectors = torch.cat([_encode(weights, part.float().div(255)) for part in self._sample.split(1024)])
        mean, std = vectors.mean(dim=0), vectors.std(dim=0, correction=0)
        std = torch.where(std > 1e-6, std, 1.0)
        return weights | {
            "to_vector": weights["to_vector"] / std[:, None],
            "to_vector_bias": (weights["to_vector_bias"] - mean) / std,
            "from_vector": weights["from_vector"] * std,
            "from_vector_bias": weights["from_vector_bias"] + weights["from_vector"] @ mean,
        }


def _shapes(vector_dim: int) -> dict[str, tuple[int, ...]]:
    """Shapes of all weights and biases by name."""
    inner = CHANNELS[-1] * (GRID >> len(CHANNELS)) ** 2
    widths = (1, *CHANNELS)
    shapes: dict[str, tuple[int, ...]] = {}
    for index, (coarse, fine) in enumerate(zip(widths[1:], widths[:-1], strict=True)):
        shapes |= {f"down{index}": (coarse, fine, 3, 3), f"down{index}_bias": (coarse,)}
        shapes |= {f"up{index}": (fine, coarse, 3, 3), f"up{index}_bias": (fine,)}
    shapes |= {"to_vector": (vector_dim, inner), "to_vector_bias": (vector_dim,)}
    return shapes | {"from_vector": (inner, vector_dim), "from_vector_bias": (inner,)}


def _first_weights(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Normal weights of He's spread; biases are zero."""
    if len(shape) == 1:
        return torch.zeros(shape, requires_grad=True)
    weight = torch.randn(shape, generator=generator) * math.sqrt(2 / math.prod(shape[1:]))
    return weight.requires_grad_()


def _reconstruction_loss(weights: Mapping[str, Tensor], coarse: Tensor) -> Tensor:
    """Binary cross-entropy and dice of grids (K, GRID, GRID) after the bottleneck."""
    logits = _decode(weights, _encode(weights, coarse))
    decoded = logits.sigmoid()
    overlap, squares = (decoded * coarse).sum((1, 2)), (decoded.square() + coarse.square()).sum((1, 2))
    dice = 1 - (2 * overlap + 1) / (squares + 1)
    return F.binary_cross_entropy_with_logits(logits, coarse) + dice.mean()


def _encode(weights: Mapping[str, Tensor], coarse: Tensor) -> Tensor:
    """Vectors (K, D) of grids (K, GRID, GRID)."""
    features = 2 * coarse.unsqueeze(1) - 1
    for index in range(len(CHANNELS)):
        features = F.conv2d(features, weights[f"down{index}"], weights[f"down{index}_bias"], stride=2, padding=1)
        features = F.silu(features)
    return F.linear(features.flatten(1), weights["to_vector"], weights["to_vector_bias"])


def _decode(weights: Mapping[str, Tensor], vectors: Tensor) -> Tensor:
    """Logits (K, GRID, GRID) of vectors (K, D)."""
    side = GRID >> len(CHANNELS)
    features = F.linear(vectors, weights["from_vector"], weights["from_vector_bias"])
    features = features.unflatten(1, (CHANNELS[-1], side, side))
    for index in reversed(range(len(CHANNELS))):
        features = F.interpolate(F.silu(features), scale_factor=2, mode="bilinear")
        features = F.conv2d(features, weights[f"up{index}"], weights[f"up{index}_bias"], padding=1)
    return features.squeeze(1)
