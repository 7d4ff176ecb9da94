"""What a mask code is: a map from N x N binary masks to short vectors and back. Paper: section 3.2."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

from torch import Tensor, nn


class MaskCodec(nn.Module, ABC):
    """A code for binary masks in the box frame.

    It is a module so that its tables move with `.to(device)` and travel in a state dict; it has no trained parameters.

    Attributes:
        mask_size: side N of the masks, cells.
        vector_dim: length D (n_k in the paper) of the vectors.
        loss: the loss its vectors are trained with: "l1" (eq. 5) or "l2_dice" (table 3a, flatten; the released PCA).
    """

    loss: str = "l1"

    def __init__(self, mask_size: int, vector_dim: int) -> None:
        super().__init__()
        if mask_size < 1 or not 1 <= vector_dim <= mask_size**2:
            raise ValueError(
                f"vector_dim {vector_dim} does not fit mask_size {mask_size}: "
                f"allowed are 1..{max(mask_size, 1) ** 2} (mask_size squared); lower vector_dim or raise mask_size"
            )
        self.mask_size = mask_size
        self.vector_dim = vector_dim

    def fit(self, masks: Iterable[Tensor]) -> None:
        """Learn the code's tables from batches of masks (K, N, N) bool. Analytic codes ignore it."""

    @abstractmethod
    def encode(self, masks: Tensor) -> Tensor:
        """Vectors (K, D) float of masks (K, N, N), bool or 0/1 floats. K may be 0."""

    @abstractmethod
    def decode(self, vectors: Tensor) -> Tensor:
        """Real-valued reconstructions (K, N, N) of vectors (K, D), in the vectors' dtype. K may be 0."""

    def binarize(self, decoded: Tensor) -> Tensor:
        """Masks (K, N, N) bool of reconstructions (K, N, N): cells strictly above the middle of each one's range.

        The released implementation thresholds at (max + min) / 2, not at 0.5; a constant reconstruction is empty.
        """
        flat = decoded.flatten(1)  # (K, N, N) -> (K, N*N)
        if flat.shape[0] == 0:
            return decoded > 0
        middle = (flat.amax(dim=1) + flat.amin(dim=1)) / 2
        return decoded > middle[:, None, None]
