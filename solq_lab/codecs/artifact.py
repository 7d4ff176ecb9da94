"""Fitted codes as files: the tables in safetensors, their description in the same file's header.

Tables and description share one file so that neither can be replaced without the other; a copy of the description lies
beside it as JSON for people, and is never read. Nothing in a file is ever executed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from solq_lab.codecs.base import FittedCodec
from solq_lab.codecs.kinds import CODECS, fitted_kinds
from solq_lab.errors import UserError
from solq_lab.files import replacing, write_json

FORMAT = 1  # rises when older readers could misread a file
_HEADER = "description"  # the header's key


class ArtifactError(UserError):
    """A codec file that cannot be used: the message names the file, what was found, what is allowed, the cure."""


class Description(NamedTuple):
    """What a codec file says of itself.

    format: version of the file's layout.
    method: kind of the codec (`codecs.kinds.CODECS`).
    mask_size, vector_dim: N and D.
    settings: further arguments that the tables depend on.
    loss, threshold: as in `MaskCodec`.
    dataset: what it was fitted on: "annotations" (a file name), its "sha256", number of "objects" in it and "used".
    quality: "explained_variance" and "mean_iou" over a sample of "masks" of them.
    """

    format: int
    method: str
    mask_size: int
    vector_dim: int
    settings: dict[str, Any]
    loss: str
    threshold: str
    dataset: dict[str, Any]
    quality: dict[str, Any]


def save_codec(path: Path, codec: FittedCodec, *, dataset: Mapping[str, Any], quality: Mapping[str, Any]) -> None:
    """Write a fitted code, all or nothing, and a readable copy of its description beside it (.json).

    Args:
        path: the file; missing folders are made.
        codec: the code.
        dataset, quality: as in `Description`.
    """
    description = Description(
        format=FORMAT,
        method=codec.method,
        mask_size=codec.mask_size,
        vector_dim=codec.vector_dim,
        settings=codec.settings,
        loss=codec.loss,
        threshold=codec.threshold,
        dataset=dict(dataset),
        quality=dict(quality),
    )._asdict()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, codec.state_dict(), {_HEADER: description})
    write_json(path.with_suffix(".json"), description)


def load_codec(path: str | Path) -> FittedCodec:
    """The code in a file, as it was fitted, in evaluation mode on the CPU.

    Raises:
        ArtifactError: no such file, not a codec file, cut short, or of a newer version.
    """
    about, tensors = _read(Path(path))
    try:
        spec = CODECS.get(about.method)
        if spec is None or not spec.fitted:
            raise ArtifactError(f"{path}: method {about.method!r}: allowed are {fitted_kinds()}")
        codec = spec.load()(about.mask_size, about.vector_dim, **about.settings)
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{path}: {error}; fit the code anew with `solq-lab fit-codec`") from None
    codec.loss, codec.threshold = about.loss, about.threshold
    _fill(codec, tensors, Path(path))
    return codec.eval()


def load_tables(codec: FittedCodec, path: str | Path) -> None:
    """Give a code the tables of a file that was fitted with the very same sizes and settings.

    Raises:
        ArtifactError: as `load_codec`, or the file holds another code.
    """
    about, tensors = _read(Path(path))
    found = {"method": about.method, "mask_size": about.mask_size, "vector_dim": about.vector_dim, **about.settings}
    wanted = {"method": codec.method, "mask_size": codec.mask_size, "vector_dim": codec.vector_dim, **codec.settings}
    differing = [key for key in wanted | found if wanted.get(key) != found.get(key)]
    if differing:
        differences = ", ".join(f"{key} (there {found.get(key)}, wanted {wanted.get(key)})" for key in differing)
        raise ArtifactError(
            f"{path}: holds another code: {differences}; name the file of the wanted one, or fit it with "
            "`solq-lab fit-codec`"
        )
    _fill(codec, tensors, Path(path))


def read_description(path: str | Path) -> Description:
    """What a codec file says of itself.

    Raises:
        ArtifactError: as `load_codec`.
    """
    return _read(Path(path))[0]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write a safetensors file with a header of JSON values; a reader, whenever it looks, finds the old or the new."""
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as unfinished:
        save_file(stored, unfinished, {key: json.dumps(value) for key, value in header.items()})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a file of `write_tensors`.

    Raises:
        ArtifactError: no such file, not such a file, or one that was cut short.
    """
    try:
        with safe_open(path, framework="pt") as opened:
            header = {key: json.loads(value) for key, value in (opened.metadata() or {}).items()}
            return {name: opened.get_tensor(name) for name in opened.keys()}, header  # noqa: SIM118 - no dictionary
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such codec file; `solq-lab fit-codec EXPERIMENT` writes it") from None
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{path}: not a codec file, or cut short ({error}); name another file, and where there is "
            "none yet fit the code anew with `solq-lab fit-codec`"
        ) from None


def _read(path: Path) -> tuple[Description, dict[str, Tensor]]:
    tensors, header = read_tensors(path)
    about = header.get(_HEADER)
    if not isinstance(about, dict) or not isinstance(about.get("format"), int):
        raise ArtifactError(
            f"{path}: a safetensors file without a codec's description; codec.artifact names files that "
            "`solq-lab fit-codec` wrote"
        )
    if about["format"] > FORMAT:
        raise ArtifactError(
            f"{path}: codec file of version {about['format']}, this program reads up to {FORMAT}; update solq-lab, or "
            "fit the code anew with `solq-lab fit-codec`"
        )
    if set(about) != set(Description._fields) or not isinstance(about["settings"], dict):
        raise ArtifactError(f"{path}: its description lacks parts; fit the code anew with `solq-lab fit-codec`")
    return Description(**about), tensors


def _fill(codec: FittedCodec, tensors: dict[str, Tensor], path: Path) -> None:
    expected = {name: tuple(table.shape) for name, table in codec.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        raise ArtifactError(f"{path}: holds tables {found}, its description promises {expected}; fit the code anew")
    codec.load_state_dict(tensors)
