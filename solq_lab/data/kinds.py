"""The augmentations by the names that experiments give them. A new one is one class and one entry here.

An augmentation is a dataclass with the method of `transforms.Transform`; its fields are keys of the section `data`. The
module loads without torch.
"""

from __future__ import annotations

_MODULE = "solq_lab.data.transforms"

AUGMENTATIONS: dict[str, str] = {  # "module:class"
    "released": f"{_MODULE}:ReleasedAugmentation",
    "flip": f"{_MODULE}:FlipOnly",
    "none": f"{_MODULE}:TestResize",
}
