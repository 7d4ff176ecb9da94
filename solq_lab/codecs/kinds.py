"""The kinds of mask codec by the names that experiments give them. A new codec is one class and one entry here.

The module loads without torch: `config` reads names and properties, and `CodecSpec.build` imports the class.
"""

from __future__ import annotations

import math
import pkgutil
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from solq_lab.codecs.base import MaskCodec


class CodecSpec(NamedTuple):
    """A kind of mask codec.

    path: "module:class" of a `MaskCodec`.
    label: its name in figures and tables; the kind itself where there is none.
    options: keys of the experiment's section `codec`, besides the sizes, that `from_options` takes.
    fitted: whether it is a `FittedCodec`, whose tables lie in a file (`codec.artifact`).
    square: whether `vector_dim` has to be a square number.
    ordered: whether the first coefficients of a vector, the others zero, are the vector of a coarser mask.
    cosine: whether it is a `DCTCodec`, whose coefficients have frequencies.
    """

    path: str
    label: str = ""
    options: tuple[str, ...] = ()
    fitted: bool = False
    square: bool = False
    ordered: bool = False
    cosine: bool = False

    def load(self) -> type[MaskCodec]:
        """The class."""
        return pkgutil.resolve_name(self.path)

    def build(self, mask_size: int, vector_dim: int, **options: object) -> MaskCodec:
        """A codec of these sizes, without tables where it has to be fitted; options that it does not take are ignored.

        Raises:
            ValueError: the sizes or an option do not fit.
        """
        taken = {name: value for name, value in options.items() if name in self.options}
        return self.load().from_options(mask_size, vector_dim, **taken)

    def allowed_length(self, vector_dim: int) -> int:
        """The largest length of a vector up to `vector_dim`."""
        return math.isqrt(vector_dim) ** 2 if self.square else vector_dim


CODECS: dict[str, CodecSpec] = {
    "dct": CodecSpec("solq_lab.codecs.dct:DCTCodec", "DCT", options=("learn_decoder",), ordered=True, cosine=True),
    "pca": CodecSpec("solq_lab.codecs.pca:PCACodec", "PCA", options=("pca",), fitted=True, ordered=True),
    "sparse": CodecSpec("solq_lab.codecs.sparse:SparseCodingCodec", "sparse coding", options=("beta",), fitted=True),
    "flatten": CodecSpec("solq_lab.codecs.flatten:FlattenCodec", "flatten", square=True),
    "dct_blur": CodecSpec("solq_lab.codecs.soft:BlurredDCTCodec", "DCT of the blurred mask", ordered=True, cosine=True),
    "dct_distance": CodecSpec(
        "solq_lab.codecs.soft:DistanceDCTCodec", "DCT of the signed distance", ordered=True, cosine=True
    ),
    "haar": CodecSpec("solq_lab.codecs.wavelet:HaarCodec", "Haar wavelets", ordered=True),
    "polar": CodecSpec("solq_lab.codecs.contour:PolarCodec", "polar contour"),
    "fourier": CodecSpec("solq_lab.codecs.contour:FourierContourCodec", "Fourier contour"),
    "autoencoder": CodecSpec("solq_lab.codecs.autoencoder:AutoencoderCodec", "autoencoder", fitted=True),
    "rvq": CodecSpec("solq_lab.codecs.quantised:QuantisedCodec", "residual VQ", fitted=True),
}


def kinds_that_are(trait: str) -> str:
    """The kinds with a trait, "fitted", "ordered" or "cosine", for messages."""
    return ", ".join(repr(kind) for kind, spec in CODECS.items() if getattr(spec, trait))
