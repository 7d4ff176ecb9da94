"""Files of fitted codecs: the tables in safetensors, their description in the same file's header.

Tables and description share one file so that neither can be replaced without the other; a copy of the description
beside it, as JSON, is for people and never read. Nothing in a file is ever executed.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from solq_lab.codecs.base import FittedCodec, Threshold
from solq_lab.codecs.kinds import CODECS, kinds_that_are
from solq_lab.errors import UserError
from solq_lab.files import replacing, write_json

log = logging.getLogger(__name__)

FORMAT = 1  # rises when older readers could misread a file
_HEADER = "description"  # the header's key


class ArtifactError(UserError):
    """A codec file that cannot be used: the message names the file, what was found, what is allowed, and the cure."""


class Description(NamedTuple):
    """The header of a codec file."""

    format: int  # version of the file's layout
    method: str  # kind of the codec (`codecs.kinds.CODECS`)
    # mask_size, vector_dim: N and D
    mask_size: int
    vector_dim: int
    settings: dict[str, Any]  # further arguments of the codec that the tables depend on
    # loss, threshold: as in `MaskCodec`
    loss: Literal["l1", "l2_dice"]
    threshold: Threshold
    # what it was fitted to: "annotations" (a file name), its "sha256", number of "objects" in it and "used"
    dataset: dict[str, Any]
    quality: dict[str, Any]  # "explained_variance" and "mean_iou" over a sample of "masks" of them


def save_codec(path: Path, codec: FittedCodec, *, dataset: Mapping[str, Any], quality: Mapping[str, Any]) -> None:
    """Write a fitted codec, all or nothing, and a readable copy of its description beside it (.json)."""
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
    write_tensors(path, codec.state_dict(), {_HEADER: description})
    write_json(path.with_suffix(".json"), description)


def load_codec(path: str | Path) -> FittedCodec:
    """The codec in a file, as it was fitted, in evaluation mode on the CPU.

    Raises:
        ArtifactError: no such file, not a codec file, cut short, or of a newer version.
    """
    about, tensors = _read(Path(path))
    try:
        spec = CODECS.get(about.method)
        if spec is None or not spec.fitted:
            raise ArtifactError(f"{path}: method {about.method!r}: allowed are {kinds_that_are('fitted')}")
        codec = cast(FittedCodec, spec.load()(about.mask_size, about.vector_dim, **about.settings))
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{path}: {error}; fit the codec anew with `solq-lab fit-codec`") from None
    codec.loss, codec.threshold = about.loss, about.threshold
    _fill(codec, tensors, Path(path))
    return codec.eval()


def load_tables(codec: FittedCodec, path: str | Path) -> None:
    """Load the tables of a file that was fitted with the same sizes and settings into a codec.

    Raises:
        ArtifactError: as `load_codec`, or the file holds another codec.
    """
    about, tensors = _read(Path(path))
    found, wanted = identity(about), identity(codec)
    differing = [key for key in wanted | found if wanted.get(key) != found.get(key)]
    if differing:
        differences = ", ".join(f"{key} (there {found.get(key)}, wanted {wanted.get(key)})" for key in differing)
        raise ArtifactError(
            f"{path}: holds another codec: {differences}; name the file of the wanted one, or fit it with "
            "`solq-lab fit-codec`"
        )
    _fill(codec, tensors, Path(path))


def identity(codec: FittedCodec | Description) -> dict[str, Any]:
    """The method, sizes and settings that the tables of a codec depend on, besides the masks."""
    return {name: getattr(codec, name) for name in ("method", "mask_size", "vector_dim")} | codec.settings


def stored_path(folder: Path, name: str, **facts: object) -> Path:
    """The file of a fitted codec in a folder of many.

    Args:
        folder: the folder.
        name: for people; method and sizes.
        facts: everything else that the tables depend on, as JSON types; the file's name contains their hash.
    """
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    return folder / f"{name}-{key}.safetensors"


def load_or_fit(codec: FittedCodec, path: Path, fit: Callable[[], None]) -> FittedCodec:
    """The codec in evaluation mode with the tables in `path`; without a usable file, `fit` it and save them there."""
    if path.exists():
        try:
            load_tables(codec, path)
            return codec.eval()
        except ArtifactError as error:
            log.warning("fitting again: %s", error)
    fit()
    save_codec(path, codec, dataset={}, quality={})
    return codec.eval()


def read_description(path: str | Path) -> Description:
    """The header of a codec file.

    Raises:
        ArtifactError: as `load_codec`.
    """
    return _read(Path(path))[0]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Replace a safetensors file with a header of JSON values, atomically."""
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
            "none yet fit the codec anew with `solq-lab fit-codec`"
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
            "fit the codec anew with `solq-lab fit-codec`"
        )
    if set(about) != set(Description._fields) or not isinstance(about["settings"], dict):
        raise ArtifactError(f"{path}: its description lacks parts; fit the codec anew with `solq-lab fit-codec`")
    return Description(**about), tensors


def _fill(codec: FittedCodec, tensors: dict[str, Tensor], path: Path) -> None:
    expected = {name: tuple(table.shape) for name, table in codec.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        raise ArtifactError(f"{path}: holds tables {found}, its description {expected}; fit the codec anew")
    codec.load_state_dict(tensors)
