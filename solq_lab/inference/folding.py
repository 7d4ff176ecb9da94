"""Preparing a network for inference: batch norms folded into convolutions, linear layers in oneDNN on the CPU."""

import copy
from itertools import pairwise

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from solq_lab.models.backbone import FrozenBatchNorm2d
from solq_lab.models.heads import UnifiedQueryHead
from solq_lab.models.onednn import use_onednn
from solq_lab.models.solq import SOLQ
from solq_lab.models.timm_backbone import TimmBackbone


def prepare_for_inference(model: SOLQ) -> SOLQ:
    """A copy of the model that predicts the same, faster, and can no longer be trained.

    Beyond `fold`, the convolutions run with channels last. On a CPU linear layers keep a second copy of their weights,
    in the order that oneDNN reads.

    Args:
        model: on the device where it will predict; not changed. Its copy's `state_dict` has other names and values.
    """
    prepared = fold(model).to(memory_format=torch.channels_last)
    use_onednn(prepared, training=False)
    return prepared


def fold(model: SOLQ) -> SOLQ:
    """A copy of the model in evaluation mode, reduced to what inference needs; plain torch, to be traced or packed.

    In evaluation mode a batch norm multiplies and shifts every channel by constants, at no cost once folded into the
    convolution before it. Swin has no batch norm. Mask vectors come from the last decoder layer alone; the earlier ones
    only refine boxes.
    """
    folded = copy.deepcopy(model).eval().requires_grad_(False)
    if not isinstance(folded.backbone, TimmBackbone):  # whose norms may stand before their convolution, or activate
        _fold_batch_norms(folded.backbone)
    for head in folded.heads:
        assert isinstance(head, UnifiedQueryHead)
        if head is not folded.heads[-1]:  # without box refinement all layers share one head
            head.vector = None
    return folded


def _fold_batch_norms(backbone: nn.Module) -> None:
    """In our backbones and in torchvision's blocks a batch norm is declared right after the convolution it follows."""
    for module in list(backbone.modules()):
        for (name, convolution), (norm_name, norm) in pairwise(list(module.named_children())):
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, FrozenBatchNorm2d | nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(convolution, norm))
                setattr(module, norm_name, nn.Identity())
