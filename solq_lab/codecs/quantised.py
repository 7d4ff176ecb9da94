"""Tokens: DCT coefficients by residual vector quantisation, the nearest of 256 code words after the other."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from solq_lab.codecs.base import CodecFit, FittedCodec
from solq_lab.codecs.dct import DCTCodec

WORDS = 256  # of every stage: a token is one byte
STAGES = 8
FORGETTING = 0.995  # of the running sums, per update


class QuantisedCodec(FittedCodec):
    """The DCT vector of `dct`, rounded to a sum of `STAGES` code words of dimension D, one from each stage's 256.

    Each stage holds the nearest word to what the earlier ones have left, so a mask is 8 bytes (`tokens`) and a vector
    is the sum of their words. Decoding takes any vector; encoding has no gradient.
    """

    method = "rvq"
    token_bits = STAGES * (WORDS - 1).bit_length()
    words: Tensor

    def __init__(self, mask_size: int, vector_dim: int) -> None:
        super().__init__(mask_size, vector_dim)
        self._dct = DCTCodec(mask_size, vector_dim)
        self.register_buffer("words", torch.zeros(STAGES, WORDS, vector_dim))

    def start_fit(self, seed: int = 0) -> QuantiserFit:
        """A new fit, whose first words are masks drawn by the seed."""
        return QuantiserFit(self, seed)

    def encode(self, masks: Tensor) -> Tensor:
        """Sums of code words."""
        tokens = self.tokens(masks)
        words = self.words.to(torch.promote_types(masks.dtype, torch.float32))
        return sum((words[stage, tokens[:, stage]] for stage in range(STAGES)), words.new_zeros(1, self.vector_dim))

    def tokens(self, masks: Tensor) -> Tensor:
        """(K, STAGES) int64 words of masks (K, N, N): the code that would be stored.

        Raises:
            ValueError: the masks are not N x N, or the codec has no tables yet.
        """
        self._check_fitted()
        rest = self._dct.encode(masks).double()  # float64: the nearest word does not depend on the batch
        chosen = []
        with torch.autocast(masks.device.type, enabled=False):
            for words in self.words.double():
                chosen.append(_nearest(rest, words))
                rest = rest - words[chosen[-1]]
        return torch.stack(chosen, dim=1)

    def decode(self, vectors: Tensor) -> Tensor:
        self._check_fitted()
        return self._dct.decode(vectors)


class QuantiserFit(CodecFit):
    """Mini-batch k-means, stage after stage on what the earlier stages leave.

    A word is the mean of the masks that chose it, the older ones counting less; a word that nobody chooses is drawn
    anew from the batch.
    """

    batch_size = 2048

    def __init__(self, codec: QuantisedCodec, seed: int) -> None:
        self._codec, self._seed, self._step = codec, seed, 0
        self._sums = torch.zeros(STAGES, WORDS, codec.vector_dim, dtype=torch.float64)
        self._counts = torch.zeros(STAGES, WORDS, dtype=torch.float64)

    def update(self, masks: Tensor) -> None:
        """Learn from masks (K, N, N) bool, K at least 1."""
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + self._step) % 2**63)
        rest = self._codec._dct.encode(masks.cpu()).double()  # (K, D)
        for sums, counts in zip(self._sums, self._counts, strict=True):
            unused = counts < 0.5
            drawn = torch.randint(len(rest), (int(unused.sum()),), generator=generator)
            sums[unused], counts[unused] = rest[drawn], 1.0
            chosen = _nearest(rest, sums / counts[:, None])
            sums.mul_(FORGETTING).index_add_(0, chosen, rest)
            counts.mul_(FORGETTING).index_add_(0, chosen, torch.ones(len(rest), dtype=torch.float64))
            rest = rest - (sums / counts[:, None])[chosen]
        self._step += 1

    def state(self) -> dict[str, Tensor]:
        return {"sums": self._sums.clone(), "counts": self._counts.clone(), "step": torch.tensor(self._step)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._sums, self._counts = state["sums"].clone(), state["counts"].clone()
        self._step = int(state["step"])

    def tables(self) -> dict[str, Tensor]:
        return {"words": (self._sums / self._counts[..., None].clamp(min=1e-9)).float()}


def _nearest(vectors: Tensor, words: Tensor) -> Tensor:
    """(K,) index of the word (W, D) nearest to each vector (K, D)."""
    return (words.square().sum(1) - 2 * vectors @ words.T).argmin(dim=1)
