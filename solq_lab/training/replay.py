"""Repeats a recorded training step, and finds the first module, loss and gradient that is not finite."""

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from solq_lab import distributed
from solq_lab.build import build_codec, build_model
from solq_lab.config import parse_experiment
from solq_lab.data.classes import ClassMap
from solq_lab.models.checkpointing import checkpoint_activations
from solq_lab.models.onednn import use_onednn
from solq_lab.models.weights import WeightFile, load_state
from solq_lab.precision import TRAINING, check_autocast
from solq_lab.runs import RunError
from solq_lab.training.losses import SetCriterion, build_criterion
from solq_lab.training.nonfinite import (
    count_nonfinite,
    describe_gradients,
    describe_losses,
    first_bad_loss,
    load_record,
)
from solq_lab.training.optim import gradient_norm
from solq_lab.training.random import restore_generators
from solq_lab.training.step import Batch, forward_backward

INIT_SCALE = 2.0**16  # of fp16 where the recorded step was not in fp16; torch's own
MAX_SHOWN = 20  # values of a report


class Replay(NamedTuple):
    """A recorded step and its repetition."""

    facts: dict[str, Any]  # what was recorded
    autocast: str  # of the repetition
    # recorded, repeated: the losses and gradients that are not finite, by name
    recorded: dict[str, str]
    repeated: dict[str, str]
    exact: bool  # whether losses and gradient norms are the recorded ones bit for bit
    # the first place where values were not finite: "forward", "loss", "backward"; missing where all are finite
    firsts: dict[str, str]

    @property
    def reproduced(self) -> bool:
        """Whether the same losses and gradients are not finite again."""
        return self.recorded.keys() == self.repeated.keys()

    def report(self) -> str:
        """The step, its images, what is not finite, the first places, and a verdict, as text."""
        facts = self.facts
        rates = ", ".join(f"{name} {rate:.3g}" for name, rate in facts["learning_rates"].items())
        passes = [done for share in facts["shares"] for done in share["passes"]]
        names = [f"{image['id']} ({image['file_name']})" for done in passes for image in done["images"]]
        lines = [
            f"step {facts['step']}, epoch {facts['epoch']}: {facts['reason']}",
            f"recorded with autocast {facts['autocast']}, losses times {facts['scale']:g}, learning rates {rates}",
            f"repeated with autocast {self.autocast}",
            f"weights not finite before the step: {', '.join(facts['weights_nonfinite']) or 'none'}",
            f"images: {', '.join(names)}",
            "",
            "recorded values that are not finite",
            *(f"  {name}: {value}" for name, value in list(self.recorded.items())[:MAX_SHOWN]),
            *([f"  and {len(self.recorded) - MAX_SHOWN} more"] if len(self.recorded) > MAX_SHOWN else []),
            "",
            "first value that is not finite in the repetition",
            *(f"  {way}: {self.firsts.get(way, 'none')}" for way in ("forward", "loss", "backward")),
            "",
        ]

        if self.exact:
            verdict = "reproduced, bit for bit"
        elif self.reproduced:
            verdict = "reproduced: the same values are not finite, others differ"
        else:
            verdict = f"not reproduced: {'other values are not' if self.repeated else 'every value is'} finite now"
        return "\n".join([*lines, verdict])


def replay_record(folder: Path | str, *, autocast: str | None = None) -> Replay:
    """Repeat a recorded step: its weights, images, random numbers and loss scale, in one process.

    The micro-batches of several processes are repeated one after the other. On the processor that recorded them the
    numbers are the same bit for bit; gradients of more than two processes, and compiled layers, may round differently.
    Batch norms that learn saw the images of all processes, and see those of one here: close, not the same.

    Args:
        folder: the record, RUN/flight/step_XXXXXXX.
        autocast: "none", "bf16" or "fp16" instead of what was recorded.

    Raises:
        RunError: there is no record, or it is damaged.
        ConfigError, WeightMismatch: its experiment and weights do not fit together.
        ValueError: no such autocast.
    """
    facts, weights, ranks = load_record(Path(folder))
    autocast = autocast or facts["autocast"]
    device = distributed.device() if facts["environment"]["device"] == "cuda" else torch.device("cpu")
    check_autocast(autocast, device, allowed=TRAINING)
    firsts: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        # Sums are split between the threads; another number of them would round differently.
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(facts["environment"]["threads"])
        model, criterion = _rebuild(weights, f"{folder}/weights.safetensors", device)
        stack.enter_context(_first_nonfinite(model, firsts))
        shares = _repeat(facts, ranks, model, criterion, autocast, device)
        gradients = describe_gradients(model, gradient_norm(model.parameters()))

    if in_losses := first_bad_loss(shares):
        firsts["loss"] = in_losses
    return Replay(
        facts,
        autocast,
        recorded=_bad_values(facts["shares"], facts["gradients"]),
        repeated=_bad_values(shares, gradients),
        exact=shares == facts["shares"] and gradients == facts["gradients"],
        firsts=firsts,
    )


def _rebuild(weights: WeightFile, source: str, device: torch.device) -> tuple[nn.Module, SetCriterion]:
    """Network and criterion as they were before the step."""
    if weights.experiment is None or weights.classes is None:
        raise RunError(f"{source}: carries no experiment or no classes; is it the record's own?")
    experiment = parse_experiment(weights.experiment, source=source)
    model = build_model(experiment, len(ClassMap.from_json(weights.classes)))
    load_state(model, weights.state, source=source)
    model.to(device)
    if not experiment.train.compile:
        use_onednn(model, training=True)
    if experiment.train.gradient_checkpointing:
        checkpoint_activations(model)
    codec = build_codec(experiment, tables=weights.codec)
    criterion = build_criterion(experiment, codec, model).to(device)
    return model, criterion


def _repeat(
    facts: dict[str, Any],
    ranks: list[tuple[list[Batch], dict[str, Tensor]]],
    model: nn.Module,
    criterion: SetCriterion,
    autocast: str,
    device: torch.device,
) -> list[dict[str, Any]]:
    """What was recorded of every process, with the losses of now.

    The mean of the processes' gradients is left in the model, as DDP does.
    """
    scale = facts["scale"] if autocast == facts["autocast"] else INIT_SCALE
    scaler = torch.amp.GradScaler(device.type, init_scale=scale, enabled=autocast == "fp16")
    shares: list[dict[str, Any]] = []
    means: dict[nn.Parameter, Tensor] = {}
    for (batches, generators), recorded in zip(ranks, facts["shares"], strict=True):
        restore_generators(generators, device)
        model.zero_grad()
        passes = []
        for batch, known in zip(batches, recorded["passes"], strict=True):
            done = forward_backward(model, criterion, scaler, batch, facts["num_boxes"], autocast)
            passes.append(known | describe_losses(done))
        shares.append(recorded | {"passes": passes})

        # The scale is a power of two: dividing by it rounds nothing.
        for parameter in model.parameters():
            if parameter.grad is not None:
                mean = parameter.grad / scaler.get_scale() / len(ranks)
                means[parameter] = means[parameter] + mean if parameter in means else mean
    for parameter, mean in means.items():
        parameter.grad = mean
    return shares


@contextlib.contextmanager
def _first_nonfinite(model: nn.Module, firsts: dict[str, str]) -> Iterator[None]:
    """Within: note in `firsts` the first module whose output, and first one whose output's gradient, is not finite.

    A module stands for all that happened since the module before it was done.
    """

    def check_gradient(place: str, gradient: Tensor) -> None:
        if "backward" not in firsts and _nonfinite(gradient)[1]:
            firsts["backward"] = f"gradient of the output of {place}, {count_nonfinite(gradient)} values"

    def check_output(place: str, module: nn.Module, inputs: tuple, outputs: Any) -> None:
        tensors, bad = _nonfinite(outputs)
        if bad and "forward" not in firsts:
            source = "its inputs are not finite either" if _nonfinite(inputs)[1] else "from finite inputs"
            firsts["forward"] = f"output of {place}, {count_nonfinite(bad[0])} values, {source}"
        for output in tensors:
            if output.requires_grad:
                output.register_hook(partial(check_gradient, place))

    handles = [
        module.register_forward_hook(partial(check_output, f"{name or 'the network'} ({type(module).__name__})"))
        for name, module in model.named_modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _nonfinite(value: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The floating tensors inside tuples, lists or a tensor itself, and those of them that are not finite."""
    tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    # Detached: recomputed layers must find the graph as it was.
    return tensors, [tensor for tensor in tensors if not tensor.detach().isfinite().all()]


def _bad_values(shares: list[dict[str, Any]], gradients: dict[str, Any]) -> dict[str, str]:
    """The losses and gradients that are not finite, by name."""
    found = {
        f"process {share['rank']}, micro-batch {number}, loss {name}": value
        for share in shares
        for number, done in enumerate(share["passes"], start=1)
        for name, value in done["losses"].items()
        if isinstance(value, str)
    }
    if isinstance(gradients["norm"], str):
        found["gradient norm"] = gradients["norm"]
    return found | {f"gradient of {name}": value for name, value in gradients["nonfinite"].items()}
