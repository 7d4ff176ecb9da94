"""The backbones by the names that experiments give them. A new backbone is one class or function and one entry here.

The module loads without torch: `config` reads names and properties, and `BackboneSpec.build` imports the class.
"""

from __future__ import annotations

import pkgutil
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from solq_lab.models.backbone import Backbone


class BackboneSpec(NamedTuple):
    """A backbone."""

    # "module:name" of a class or function; it takes `arguments`, and `c5_only` by name, and `c2` if it is to serve
    # `model.mask_look`; it returns a `models.backbone.Backbone`, or a module with its attributes
    path: str
    arguments: tuple[str, ...] = ()  # its positional arguments
    dilates: bool = False  # whether it takes `dilation` by name
    any_size: bool = True  # whether it can be traced for images of any size

    def build(self, *, dilation: bool = False, c5_only: bool = False, c2: bool = False) -> Backbone:
        """The backbone, freshly initialised.

        Args:
            dilation: keep stride 16 in the last stage, where the backbone can; ignored elsewhere.
            c5_only: return C5 alone.
            c2: return C2 too, first.

        Raises:
            ImportError: a package is not installed.
        """
        options = ({"dilation": dilation} if self.dilates else {}) | ({"c2": True} if c2 else {})
        return pkgutil.resolve_name(self.path)(*self.arguments, c5_only=c5_only, **options)


def backbone_spec(name: str) -> BackboneSpec:
    """The backbone of a name in `BACKBONES`, or of "timm:NAME"; whether timm has it shows when it is built."""
    if name.startswith(TIMM):
        return BackboneSpec("solq_lab.models.timm_backbone:TimmBackbone", (name.removeprefix(TIMM),), any_size=False)
    return BACKBONES[name]


TIMM = "timm:"
_RESNET, _SWIN = "solq_lab.models.backbone:ResNetBackbone", "solq_lab.models.backbone:SwinBackbone"

BACKBONES: dict[str, BackboneSpec] = {
    **{name: BackboneSpec(_RESNET, (name,), dilates=True) for name in ("resnet50", "resnet101")},
    **{name: BackboneSpec(_SWIN, (name,), any_size=False) for name in ("swin_t", "swin_s", "swin_b", "swin_l")},
    "small": BackboneSpec("solq_lab.models.backbone:SmallBackbone"),
}
