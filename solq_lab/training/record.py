"""Flight records on the disk: the steps of a training that were not finite, with all it takes to repeat them.

RUN/flight/step_XXXXXXX/
    record.json          what was not finite, every term of every process, learning rates, environment, file hashes
    weights.safetensors  the network as it was before the step, with experiment, classes and mask code inside
    rank_N.pt            of process N: its images, targets, matching costs, and states of the random generators
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from solq_lab import distributed
from solq_lab.files import flush_to_disk, hash_file, read_json
from solq_lab.models.weights import WeightFile, WeightMismatch, read_weights, save_weights
from solq_lab.runs import RunError
from solq_lab.structures import ImageBatch, Target
from solq_lab.training.step import Batch, MicroBatch

KEPT = 3  # records of a run; each is as large as the weights and the step's images


class Share(NamedTuple):
    """What one process brought to the step.

    batches: one for each backward pass.
    costs: of each pass, the matching costs by term, (K, Z*J) each.
    generators: states of torch's random generators before the first pass.
    """

    batches: list[Batch]
    costs: list[dict[str, Tensor]]
    generators: dict[str, Tensor]


class Record(NamedTuple):
    """A record as it was written.

    facts: what record.json holds.
    weights: the network before the step, with experiment, classes and mask code.
    shares: of every process, by rank.
    """

    facts: dict[str, Any]
    weights: WeightFile
    shares: list[Share]


def save_record(
    folder: Path,
    facts: Mapping[str, Any],
    share: Share,
    weights: Mapping[str, Tensor],
    *,
    experiment: str,
    classes: str,
    codec: Mapping[str, Tensor],
) -> str | None:
    """Write a record, every process its share of it, and forget all but the last `KEPT`.

    The files are complete and on the disk before their folder gets its name.

    Args:
        folder: RUN/flight/step_XXXXXXX; an older record of this name is replaced.
        facts: plain values; the hashes of the files are added.
        share: of this process.
        weights: the network's state dict.
        experiment: the experiment as YAML.
        classes: the class map as JSON.
        codec: state dict of the mask code.

    Returns:
        None, or why the record could not be written; nothing is left of it then. The same in every process.
    """
    partial = folder.with_name(f".{folder.name}.part")

    def begin() -> None:
        for abandoned in folder.parent.glob(".step_*.part"):
            shutil.rmtree(abandoned)
        partial.mkdir(parents=True)
        save_weights(partial / "weights.safetensors", weights, experiment=experiment, classes=classes, codec=codec)

    def add_share() -> None:
        torch.save(_to_plain(share), partial / f"rank_{distributed.rank()}.pt")

    def finish() -> None:
        hashes = {path.name: hash_file(path) for path in sorted(partial.iterdir())}
        text = json.dumps({**facts, "files": hashes}, indent=1) + "\n"
        (partial / "record.json").write_text(text, encoding="utf-8")
        for path in (*partial.iterdir(), partial):
            flush_to_disk(path)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        flush_to_disk(folder.parent)
        for old in list_records(folder.parent)[:-KEPT]:
            shutil.rmtree(old)

    problem = _try_together(begin, main_only=True)
    problem = problem or _try_together(add_share)
    problem = problem or _try_together(finish, main_only=True)
    if problem and distributed.is_main():
        shutil.rmtree(partial, ignore_errors=True)
    return problem


def list_records(folder: Path) -> list[Path]:
    """The records under RUN/flight, oldest first."""
    return sorted(path for path in folder.glob("step_*") if path.is_dir())


def load_record(folder: Path) -> Record:
    """Read a record back; nothing in it is executed.

    Raises:
        RunError: there is none, or it is not as it was written.
    """
    if not (folder / "record.json").is_file():
        found = ", ".join(str(path) for path in list_records(folder if folder.name == "flight" else folder / "flight"))
        raise RunError(f"{folder}: not a flight record (no record.json); records there: {found or 'none'}")
    facts = read_json(folder / "record.json")
    files = facts.get("files") if isinstance(facts, dict) else None
    if not isinstance(files, dict) or "weights.safetensors" not in files or "rank_0.pt" not in files:
        raise RunError(f"{folder / 'record.json'}: not the JSON of a flight record (no hashes of its files)")
    for name, expected in files.items():
        path = folder / name
        if Path(name).name != name:
            raise RunError(f"{path}: not a file of a flight record; record.json has been changed")
        if not path.is_file():
            raise RunError(f"{path}: missing; the record cannot be replayed without it")
        if hash_file(path) != expected:
            raise RunError(f"{path}: damaged, it is not what was written; copy the record anew from where it was made")
    try:
        weights = read_weights(folder / "weights.safetensors")
        ranks = range(sum(name.startswith("rank_") for name in files))
        plain = [torch.load(folder / f"rank_{rank}.pt", map_location="cpu", weights_only=True) for rank in ranks]
        return Record(facts, weights, [_from_plain(share) for share in plain])
    except (WeightMismatch, pickle.UnpicklingError, OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise RunError(f"{folder}: not a record that can be replayed: {' '.join(str(error).split())}") from None


def share_of(passes: list[MicroBatch], costs: list[dict[str, Tensor]], generators: dict[str, Tensor]) -> Share:
    """This process's share of a record, on the CPU."""
    return Share(
        [(done.images.to("cpu"), [target.to("cpu") for target in done.targets]) for done in passes],
        [{term: values.cpu() for term, values in terms.items()} for terms in costs],
        generators,
    )


def _to_plain(share: Share) -> dict[str, Any]:
    """The same as containers that load with `weights_only=True`."""
    passes = [
        {
            "images": images._asdict(),
            "targets": [target._asdict() for target in targets],
            "costs": costs,
        }
        for (images, targets), costs in zip(share.batches, share.costs, strict=True)
    ]
    return {"passes": passes, "generators": share.generators}


def _from_plain(plain: Mapping[str, Any]) -> Share:
    batches = [
        (ImageBatch(**done["images"]), [Target(**target) for target in done["targets"]]) for done in plain["passes"]
    ]
    return Share(batches, [done["costs"] for done in plain["passes"]], plain["generators"])


def _try_together(write: Callable[[], None], *, main_only: bool = False) -> str | None:
    """Let the processes write, or the main one alone; what went wrong first, on every one of them."""
    problem = None
    if distributed.is_main() or not main_only:
        try:  # torch and safetensors have errors of their own for a full disk
            write()
        except (
            OSError,
            RuntimeError,
            SafetensorError,
        ) as error:
            problem = " ".join(str(error).split())
    return next((found for found in distributed.gather_objects(problem) if found), None)
