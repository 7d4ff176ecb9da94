"""State dicts in released naming, of random and mostly tiny tensors."""

import torch
from torch import Tensor

from solq_lab.models.official import Layout, name_table, swin_position_index

RELEASED = Layout(
    "resnet50", levels=4, encoder_layers=2, decoder_layers=3, refine_boxes=True, two_stage=False, vectors=True
)
# What is read off the tensors, as own names; every other tensor of a made-up model is a pair of numbers.
SHAPES = {
    "level_embedding": (4, 64),
    "decoder.0.cross_attention.attention_weights.bias": (8 * 4 * 3,),
    "encoder.0.attention.attention_weights.bias": (8 * 4 * 2,),
    "decoder.0.feedforward.linear1.bias": (96,),
    "heads.0.vector.layers.0.bias": (48,),
    "heads.0.vector.layers.2.bias": (40,),
    "heads.0.classify.bias": (91,),
    "query_embedding": (30, 128),
}


def made_up(layout: Layout) -> dict[str, Tensor]:
    """A state dict in released naming whose tensors are random and mostly tiny."""
    random = torch.Generator().manual_seed(0)
    own: dict[str, Tensor] = {}
    state = {}
    for official, name in name_table(layout):
        if name is None:
            state[official] = swin_position_index(7)
            continue
        shape = SHAPES.get(name, (2,))
        if official.endswith("patch_embed.proj.bias"):
            shape = ({"swin_b": 128, "swin_l": 192}.get(layout.backbone, 96),)
        if name not in own:
            own[name] = torch.randn((layout.levels, 64) if name == "level_embedding" else shape, generator=random)
        state[official] = own[name]
    return state
