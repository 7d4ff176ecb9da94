"""Losses of single scores and of pixels: focal, matchability-aware, dice. Paper: eq. 2, L_cls; table 3a."""

import torch
import torch.nn.functional as F
from torch import Tensor

DICE_FLOOR = 1e-5  # as released: keeps the dice of an empty mask finite


def sigmoid_focal_loss(logits: Tensor, truth: Tensor, *, alpha: float, gamma: float) -> Tensor:
    """Focal loss of every logit on its own, same shape as `logits`.

    Args:
        logits: any shape.
        truth: same shape, 1.0 where the class is present, else 0.0.
        alpha: weight of present classes; absent ones have 1 - alpha.
        gamma: focusing power.
    """
    probability = logits.sigmoid()
    miss = truth + probability - 2 * truth * probability  # 1 - p of the true class
    balance = alpha * truth + (1 - alpha) * (1 - truth)
    return balance * miss**gamma * F.binary_cross_entropy_with_logits(logits, truth, reduction="none")


def quality_focal_loss(logits: Tensor, truth: Tensor, quality: Tensor, *, gamma: float) -> Tensor:
    """Matchability-aware loss of every logit: a present class is to score quality**gamma. Source: DEIM, CVPR 2025.

    Args:
        logits: any shape.
        truth: same shape, 1.0 where the class is present, else 0.0.
        quality: same shape, 0..1; 0 where the class is absent.
        gamma: focusing power of absent classes, too.
    """
    balance = torch.where(truth > 0, truth, logits.detach().sigmoid() ** gamma)
    return balance * F.binary_cross_entropy_with_logits(logits, quality**gamma, reduction="none")


def soft_dice_loss(probabilities: Tensor, masks: Tensor) -> Tensor:
    """The mask branch's dice (K,): as `dice_loss`, but with plain sums below, and one pixel added to all of them."""
    shared = (probabilities * masks).sum(1)
    return 1 - (2 * shared + 1) / (probabilities.sum(1) + masks.sum(1) + 1)


def dice_loss(decoded: Tensor, masks: Tensor) -> Tensor:
    """One minus the dice overlap of reconstructions (K, cells) and masks (K, cells) of 0 and 1: (K,)."""
    shared = (decoded * masks).sum(1)
    return 1 - 2 * shared / (decoded.square().sum(1) + masks.square().sum(1) + DICE_FLOOR)
