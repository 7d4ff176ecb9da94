"""The weights of others that a training can start from: their names here, files, links and published sums.

Loads without torch. The library only looks for the files; `solq-lab download-weights` fetches them.
"""

import os
from pathlib import Path
from typing import NamedTuple


class ReleasedWeights(NamedTuple):
    """One file of weights."""

    file: str  # its name in the cache folder, and on a mirror
    url: str  # what is fetched
    about: str  # what it is, with COCO AP (box, box / mask) on the split that its owner reports
    megabytes: int | None = None  # its size as its owner publishes it, 10^6 bytes; None where no size is published
    sha256: str = ""  # the published sum or its first digits; empty where none is published
    page: str = ""  # the address for a browser, where it is not `url`

    @property
    def link(self) -> str:
        """The address as its owner publishes it."""
        return self.page or self.url


def _torchvision(name: str, megabytes: int) -> ReleasedWeights:
    digits = name.partition("-")[2]  # torchvision's file names end with the first digits of the sum
    about = f"{name.partition('-')[0]}, ImageNet-1k"
    return ReleasedWeights(
        f"{name}.pth", f"https://download.pytorch.org/models/{name}.pth", about, megabytes, sha256=digits
    )


def _hugging_face(repository: str, about: str, megabytes: int, sha256: str = "") -> ReleasedWeights:
    name = repository.partition("/")[2]
    url = f"https://huggingface.co/{repository}/resolve/main/model.safetensors"
    return ReleasedWeights(f"{name}.safetensors", url, about, megabytes, sha256)


def _google_drive(name: str, file_id: str, about: str) -> ReleasedWeights:
    url = f"https://drive.usercontent.google.com/download?id={file_id}&export=download&confirm=t"
    return ReleasedWeights(f"{name}.pth", url, about, page=f"https://drive.google.com/file/d/{file_id}/view")


IMAGENET = {  # by the name of the backbone; those of Swin are timm's defaults
    "resnet50": _torchvision("resnet50-0676ba61", 103),
    "resnet101": _torchvision("resnet101-63fe2227", 179),
    "swin_t": _hugging_face("timm/swin_tiny_patch4_window7_224.ms_in1k", "Swin-T, ImageNet-1k", 114),
    "swin_s": _hugging_face("timm/swin_small_patch4_window7_224.ms_in22k_ft_in1k", "Swin-S, ImageNet-22k and 1k", 200),
    "swin_b": _hugging_face("timm/swin_base_patch4_window7_224.ms_in22k_ft_in1k", "Swin-B, ImageNet-22k and 1k", 353),
    "swin_l": _hugging_face("timm/swin_large_patch4_window7_224.ms_in22k_ft_in1k", "Swin-L, ImageNet-22k and 1k", 788),
}
DETECTORS = {
    "solq_r50": _google_drive("solq_r50", "1D43QroYz2CH3rHDVE54tlByq6dSbmXJK", "SOLQ R50, 47.8 / 39.7"),
    "solq_r101": _google_drive("solq_r101", "1hdHnNDeLP932ZueKEvm5o8T1MwwhP_wm", "SOLQ R101, 48.7 / 40.9"),
    "solq_swinl": _google_drive("solq_swinl", "13Tjf2a81rPTRdtGIQr6y4t-HocoU_bM1", "SOLQ Swin-L, 55.4 / 45.9"),
    "solq_swinl_1536": _google_drive(
        "solq_swinl_1536", "17g8NzFUwdbic9e24tS6I1bb4klas_g8c", "SOLQ Swin-L, long side 1536, 56.5 / 46.7"
    ),
    "ddetr_r50": _google_drive("ddetr_r50", "1nDWZWHuRwtwGden77NLM9JoWe-YisJnA", "Deformable DETR R50, 44.5"),
    "ddetr_r50_refine": _google_drive(
        "ddetr_r50_refine", "1JYKyRYzUH7uo9eVfDaVCiaIGZb5YTCuI", "the same with box refinement, 46.2"
    ),
    "ddetr_r50_two_stage": _google_drive(
        "ddetr_r50_two_stage", "15I03A7hNTpwuLNdfuEmW9_taZMNVssEp", "the same, two-stage, 46.9"
    ),
    "ddetr_r50_c5": _google_drive(
        "ddetr_r50_c5", "1WEjQ9_FgfI5sw5OZZ4ix-OKk-IJ_-SDU", "Deformable DETR R50, single scale, 39.4"
    ),
    "ddetr_r50_dc5": _google_drive(
        "ddetr_r50_dc5", "1m_TgMjzH7D44fbA-c_jiBZ-xf-odxGdk", "Deformable DETR R50, single scale DC5, 41.5"
    ),
    "hf_ddetr_r50": _hugging_face(
        "SenseTime/deformable-detr",
        "ddetr_r50 as Hugging Face has it, 44.5",
        161,
        "caf1e3e61283c6ce35cd2d9adaa7033cf40997d4dfe434003bcdb9085cc8cf9b",
    ),
    "hf_ddetr_r50_refine": _hugging_face(
        "SenseTime/deformable-detr-with-box-refine",
        "ddetr_r50_refine as Hugging Face has it, 46.2",
        164,
        "4113700fe8aade398808424b7c5c1304cfbf886adc6450a6ca5d50a702be3373",
    ),
    "hf_ddetr_r50_two_stage": _hugging_face(
        "SenseTime/deformable-detr-with-box-refine-two-stage", "ddetr_r50_two_stage as Hugging Face has it, 46.9", 165
    ),
}
RELEASED = IMAGENET | DETECTORS


def weights_folder() -> Path:
    """The cache folder of fetched weights: torch's own, which other programs may have filled already."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("TORCH_HOME") or cache / "torch") / "hub" / "checkpoints"


def cached_file(name: str) -> Path:
    """Where the weights of a name in `RELEASED` are, or will be."""
    return weights_folder() / RELEASED[name].file
