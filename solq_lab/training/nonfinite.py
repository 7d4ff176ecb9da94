"""Records training steps whose costs, losses or gradients are not finite, for `solq-lab replay`.

Such a step is skipped and counted; no value is ever replaced by a finite one. What is recorded:

RUN/flight/step_XXXXXXX/
    record.json          what was not finite, losses of every process, learning rates, environment, file hashes
    weights.safetensors  the network before the step, with experiment, classes and mask codec inside
    rank_N.pt            of process N: images, targets, and states of the random generators

In JSON, numbers that are not finite are the texts "nan", "inf" and "-inf".
"""

import logging
import math
import pickle
import shlex
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from solq_lab import distributed
from solq_lab.data.coco import CocoDataset
from solq_lab.environment import describe_software
from solq_lab.errors import ExplainedError
from solq_lab.files import hash_file, read_json, replacing_folder, write_json
from solq_lab.models.weights import WeightFile, WeightMismatch, read_weights, save_weights
from solq_lab.ops.ms_deform_attn import implementation_for
from solq_lab.runs import Run, RunError
from solq_lab.structures import ImageBatch, Target
from solq_lab.training.checkpoint import step_folders
from solq_lab.training.losses import SetCriterion
from solq_lab.training.step import Batch, MicroBatch, StepResult

log = logging.getLogger(__name__)

KEPT = 3  # records of a run; each is as large as the weights and the step's images
LARGEST_GRADIENTS = 20  # that are recorded; those that are not finite are all recorded


class NonFiniteError(ExplainedError):
    """Too many steps in a row were not finite; the message names the step, the images, the reason and the record."""


@dataclass
class NonFiniteRecorder:
    """Writes steps of a training that are not finite to the run's folder `flight`, and counts them."""

    run: Run
    model: nn.Module
    criterion: SetCriterion
    optimizer: torch.optim.Optimizer
    dataset: CocoDataset  # the training images
    device: torch.device  # of the network
    in_a_row: int = 0  # how many steps were not finite since the last one that was; the trainer resets it

    def check_weights(self, number: int) -> None:
        """Keep weights that are not finite out of the checkpoints: the one before is worth more.

        Raises:
            NonFiniteError: the network's parameters are not finite after step `number`.
        """
        bad = nonfinite_tensors(self.model.named_parameters())  # the same in every process
        if bad:
            raise NonFiniteError(
                f"{_first_of(bad)} is not finite after step {number}: no checkpoint is written, the last one stays. "
                "Lower optim.lr, or set train.autocast=none"
            )

    def record(self, result: StepResult, number: int, epoch: float) -> tuple[dict[str, Any], NonFiniteError | None]:
        """Record step `number`, the first being 1, which was not finite.

        Returns:
            Its line for the metrics, and the error to raise where as many steps before it as `train.skip_nonfinite`
            allows were not finite either; both are the same in every process.
        """
        self.in_a_row += 1
        name = f"flight/step_{number:07d}"
        facts = {"step": number, "epoch": epoch, "in_a_row": self.in_a_row} | self._describe(result)
        problem = self._save(self.run.folder / name, facts, result)
        images = [image["id"] for share in facts["shares"] for done in share["passes"] for image in done["images"]]
        line = {"reason": facts["reason"], "image_ids": images, "record": None if problem else name}

        place, allowed = self.run.folder / name, self.run.experiment.train.skip_nonfinite
        where = f"no record could be written ({problem})" if problem else f"record: {place}"
        message = f"step {number}: {facts['reason']}. Image ids of this step: {images}; {where}"
        if self.in_a_row <= allowed:
            if distributed.is_main():
                log.warning("%s; skipped, %d of at most %d in a row", message, self.in_a_row, allowed)
            return line, None
        cure = "" if problem else f"Repeat it with `solq-lab replay {shlex.quote(str(place))}`. "
        return line, NonFiniteError(
            f"{message}. The weights were left as they were before it; steps in a row that were not finite: "
            f"{self.in_a_row}, train.skip_nonfinite={allowed}. {cure}Raise train.skip_nonfinite to skip it when "
            "resuming from the last checkpoint, or train anew with a lower optim.lr or train.autocast=none"
        )

    def _describe(self, result: StepResult) -> dict[str, Any]:
        """What was not finite in which process, and what a repetition has to set up alike."""
        passes = [
            {
                "images": [
                    {"id": key, "file_name": self.dataset.file_name(key), "objects": len(target.labels)}
                    for target in done.targets
                    for key in [target.image_id]
                ],
                **describe_losses(done),
            }
            for done in result.micro_batches
        ]
        shares = distributed.gather_objects({"rank": distributed.rank(), "passes": passes})
        gradients = describe_gradients(self.model, result.norm)
        bad = nonfinite_tensors([*self.model.named_parameters(), *self.model.named_buffers()])

        # One sentence: the first value that was not finite, in the order weights, costs, losses, gradients.
        reason = first_bad_loss(shares)
        if not reason and gradients["nonfinite"]:
            reason = f"all losses are finite, the gradient of {_first_of(list(gradients['nonfinite']))} is not"
        reason = reason or f"every gradient is finite, and their norm is {gradients['norm']}"
        return {
            "reason": (f"{_first_of(bad)} was not finite before the step already; " if bad else "") + reason,
            "learning_rates": {group["name"]: group["lr"] for group in self.optimizer.param_groups},
            "autocast": self.run.experiment.train.autocast,
            "scale": result.scale,
            "num_boxes": result.num_boxes,
            "weights_nonfinite": bad,
            "gradients": gradients,
            "shares": shares,
            "environment": {  # what decides whether a step gives the same bits again
                "device": self.device.type,
                "threads": torch.get_num_threads(),
                "operator": implementation_for(self.device.type),
                "versions": describe_software()["versions"],
            },
        }

    def _save(self, folder: Path, facts: Mapping[str, Any], result: StepResult) -> str | None:
        """Write a record and remove all but the last `KEPT`; why it could not be written, if so, in every process."""
        # On the CPU, in containers that load with `weights_only=True`; the main process writes all files or none.
        dumps = [
            {
                "images": done.images.to("cpu")._asdict(),
                "targets": [target.to("cpu")._asdict() for target in done.targets],
            }
            for done in result.micro_batches
        ]
        ranks = distributed.gather_on_main({"passes": dumps, "generators": result.generators})
        codec, problem = self.criterion.codec, None
        try:
            if distributed.is_main():
                with replacing_folder(folder) as partial:
                    save_weights(
                        partial / "weights.safetensors",
                        self.model.state_dict(),
                        experiment=self.run.experiment.to_yaml(),
                        classes=self.dataset.classes.to_json(),
                        codec={} if codec is None else codec.state_dict(),
                    )
                    for rank, dump in enumerate(ranks):
                        torch.save(dump, partial / f"rank_{rank}.pt")
                    # Last, as it holds the hashes of the others.
                    hashes = {path.name: hash_file(path) for path in sorted(partial.iterdir())}
                    write_json(partial / "record.json", {**facts, "files": hashes})

                for old in step_folders(folder.parent)[:-KEPT]:
                    shutil.rmtree(old)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors at a full disk
            problem = " ".join(str(error).split())
        return distributed.gather_objects(problem)[0]


def load_record(folder: Path) -> tuple[dict[str, Any], WeightFile, list[tuple[list[Batch], dict[str, Tensor]]]]:
    """Read a record back; nothing in it is executed.

    Returns:
        The content of record.json; the network before the step, with experiment, classes and mask codec; and of each
        process its batches, one per micro-batch, and the states of its random generators before the first.

    Raises:
        RunError: there is none, or it is not as it was written.
    """
    if not (folder / "record.json").is_file():
        found = ", ".join(str(path) for path in step_folders(folder if folder.name == "flight" else folder / "flight"))
        raise RunError(f"{folder}: not a flight record (no record.json); records there: {found or 'none'}")
    facts = read_json(folder / "record.json")
    files = facts.get("files") if isinstance(facts, dict) else None
    if not isinstance(files, dict) or "weights.safetensors" not in files or "rank_0.pt" not in files:
        raise RunError(f"{folder / 'record.json'}: not the JSON of a flight record (no hashes of its files)")

    for name, expected in files.items():
        path = folder / Path(name).name  # no other folder, whatever is written there
        if not path.is_file():
            raise RunError(f"{path}: missing; the record cannot be replayed without it")
        if hash_file(path) != expected:
            raise RunError(f"{path}: damaged, it is not what was written; copy the record anew from where it was made")

    try:
        weights = read_weights(folder / "weights.safetensors")
        ranks = []
        for rank in range(sum(name.startswith("rank_") for name in files)):
            dump = torch.load(folder / f"rank_{rank}.pt", map_location="cpu", weights_only=True)
            batches = [
                (ImageBatch(**done["images"]), [Target(**target) for target in done["targets"]])
                for done in dump["passes"]
            ]
            ranks.append((batches, dump["generators"]))
        return facts, weights, ranks
    except (WeightMismatch, pickle.UnpicklingError, OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise RunError(f"{folder}: not a record that can be replayed: {' '.join(str(error).split())}") from None


def describe_losses(done: MicroBatch) -> dict[str, Any]:
    """Losses of a micro-batch, and what the matcher found wrong with it."""
    return {"fault": done.fault, "losses": {name: _to_json(value.item()) for name, value in done.losses.items()}}


def describe_gradients(model: nn.Module, norm: Tensor) -> dict[str, Any]:
    """L2 norms of the gradients: of all and of the largest; and which gradients are not finite."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norms = {name: torch.linalg.vector_norm(gradient).item() for name, gradient in gradients.items()}
    finite = sorted((name for name in norms if math.isfinite(norms[name])), key=lambda name: -norms[name])
    return {
        "norm": _to_json(norm.item()),
        "largest": {name: norms[name] for name in finite[:LARGEST_GRADIENTS]},
        "nonfinite": {name: count_nonfinite(gradients[name]) for name in norms if not math.isfinite(norms[name])},
    }


def nonfinite_tensors(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the tensors, all on one device, with a value that is not finite."""
    named = list(named)
    if not named:
        return []
    finite = torch.stack([tensor.isfinite().all() for _, tensor in named]).tolist()  # one wait for a GPU
    return [name for (name, _), fine in zip(named, finite, strict=True) if not fine]


def count_nonfinite(values: Tensor) -> str:
    """How many values of a tensor are not finite, in words."""
    return f"{int((~values.detach().isfinite()).sum())} of {values.numel()}"


def first_bad_loss(shares: Sequence[Mapping[str, Any]]) -> str:
    """The first cost or loss that is not finite, in words; "" where all are finite."""
    for share in shares:
        where = f"in process {share['rank']}, " if len(shares) > 1 else ""
        for done in share["passes"]:
            bad = [f"{name} is {value}" for name, value in done["losses"].items() if isinstance(value, str)]
            if done["fault"] or bad:
                return where + (done["fault"] or f"the loss {_first_of(bad)}")
    return ""


def _first_of(names: Sequence[str]) -> str:
    return names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def _to_json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
