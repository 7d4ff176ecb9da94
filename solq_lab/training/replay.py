"""Repeating a recorded step from its record alone, and finding where its numbers stopped being finite."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from solq_lab import distributed
from solq_lab.build import build_codec, build_model
from solq_lab.config import Experiment, parse_experiment
from solq_lab.data.classes import ClassMap
from solq_lab.models.checkpointing import checkpoint_activations
from solq_lab.models.onednn import use_onednn
from solq_lab.models.weights import load_state
from solq_lab.precision import TRAINING, check_autocast
from solq_lab.runs import RunError
from solq_lab.training.findings import SHOWN_GRADIENTS, count_nonfinite, describe_gradients, describe_pass
from solq_lab.training.losses import SetCriterion, build_criterion
from solq_lab.training.optim import build_optimizer, gradient_norm
from solq_lab.training.random import restore_generators
from solq_lab.training.record import Record, load_record
from solq_lab.training.step import forward_backward

BAD_GRADIENT = "gradient not finite: "
INIT_SCALE = 2.0**16  # of fp16 where the recorded step was not in fp16; torch's own


class Replay(NamedTuple):
    """A recorded step and its repetition.

    facts: what the record says.
    autocast: the type that the repetition multiplied in.
    shares: of every process, the passes as `describe_pass` gives them.
    gradients: as `describe_gradients` gives them.
    firsts: where numbers first were not finite, by the way they went: "forward", "backward", "parameter".
    """

    facts: dict[str, Any]
    autocast: str
    shares: list[list[dict[str, Any]]]
    gradients: dict[str, Any]
    firsts: dict[str, str]

    @property
    def numbers(self) -> dict[str, tuple[Any, Any]]:
        """The recorded and the repeated value of every cost, loss and gradient norm, by name; None where it is not."""
        recorded = _by_name([share["passes"] for share in self.facts["shares"]], self.facts["gradients"])
        repeated = _by_name(self.shares, self.gradients)
        return {name: (recorded.get(name), repeated.get(name)) for name in recorded | repeated}

    @property
    def exact(self) -> bool:
        """Whether every number is the recorded one bit for bit."""
        return all(before == now for before, now in self.numbers.values())

    @property
    def reproduced(self) -> bool:
        """Whether the very same costs, losses and gradients are not finite again."""
        return all(_is_fault(name, before) == _is_fault(name, now) for name, (before, now) in self.numbers.items())

    def report(self) -> str:
        """All of it as text: the step, its images, every number before and now, and the verdict."""
        facts = self.facts
        rates = ", ".join(f"{name} {rate:.3g}" for name, rate in facts["learning_rates"].items())
        poisoned = facts["weights_nonfinite"]
        lines = [
            f"step {facts['step']}, epoch {facts['epoch']}: {facts['reason']}",
            f"recorded with autocast {facts['autocast']}, losses times {facts['scale']:g}, learning rates {rates}",
            f"repeated with autocast {self.autocast}",
            f"weights not finite before the step: {', '.join(poisoned) or 'none'}",
        ]
        for share in facts["shares"]:
            for number, done in enumerate(share["passes"], start=1):
                shown = ", ".join(f"{p['id']} ({p['file_name']}, {p['objects']} objects)" for p in done["images"])
                lines.append(f"process {share['rank']}, pass {number}: images {shown}")
        lines += ["", *self._table(), "", "first value that is not finite"]
        lines += [f"  {way}: {self.firsts.get(way, 'none')}" for way in ("forward", "backward", "parameter")]
        return "\n".join([*lines, "", self._verdict()])

    def _table(self) -> list[str]:
        """A line for every number, but of the gradients that are not finite for the first few only."""
        bad = [name for name in self.numbers if name.startswith(BAD_GRADIENT)]
        left_out = set(bad[SHOWN_GRADIENTS:])
        shown = {name: values for name, values in self.numbers.items() if name not in left_out}
        width = max(map(len, shown))
        lines = [f"{'':{width}}  {'recorded':>16}  {'now':>16}"]
        for name, (before, now) in shown.items():
            same = "as recorded" if before == now else _shown(now)
            lines.append(f"{name:{width}}  {_shown(before):>16}  {same:>16}")
        return lines + ([f"and {len(left_out)} more gradients that are not finite"] if left_out else [])

    def _verdict(self) -> str:
        if self.exact:
            return "reproduced, bit for bit"
        if self.reproduced:
            return "reproduced: the same values are not finite, others differ"
        if any(_is_fault(name, now) for name, (_, now) in self.numbers.items()):
            return "not reproduced: other values are not finite now"
        return "not reproduced: every value is finite now"


def replay_record(folder: Path | str, *, autocast: str | None = None) -> Replay:
    """Repeat a recorded step: its weights, images, random numbers and scale, in one process.

    The shares of several processes are repeated one after the other. On the processor that recorded them the numbers
    are the same bit for bit; gradients of more than two processes, and compiled layers, may be rounded differently.

    Args:
        folder: the record, RUN/flight/step_XXXXXXX.
        autocast: "none", "bf16" or "fp16" instead of what was recorded.

    Raises:
        RunError: there is no record, or it is damaged.
        ConfigError, WeightMismatch: its experiment and weights do not fit together.
        ValueError: no such autocast.
    """
    record = load_record(Path(folder))
    facts = record.facts
    autocast = autocast or facts["autocast"]
    device = distributed.device() if facts["environment"]["device"] == "cuda" else torch.device("cpu")
    check_autocast(autocast, device, allowed=TRAINING)
    with _threads(facts["environment"]["threads"]):
        model, criterion, optimizer = _rebuild(record, str(folder), device)
        firsts: dict[str, str] = {}
        with _watched(model, firsts):
            shares = _repeat(record, model, criterion, optimizer, autocast, device)
        return Replay(facts, autocast, shares, describe_gradients(model, gradient_norm(model)), firsts)


def _rebuild(
    record: Record, source: str, device: torch.device
) -> tuple[nn.Module, SetCriterion, torch.optim.Optimizer]:
    """Network, criterion and optimizer as they were before the step."""
    experiment, classes = _read_experiment(record, source)
    model = build_model(experiment, len(classes))
    load_state(model, record.weights.state, source=f"{source}/weights.safetensors")
    model.to(device)
    if not experiment.train.compile:
        use_onednn(model, training=True)
    if experiment.train.gradient_checkpointing:
        checkpoint_activations(model)
    criterion = build_criterion(experiment, build_codec(experiment, tables=record.weights.codec)).to(device)
    return model, criterion, build_optimizer(model, experiment.optim)


def _read_experiment(record: Record, source: str) -> tuple[Experiment, ClassMap]:
    if record.weights.experiment is None or record.weights.classes is None:
        raise RunError(f"{source}/weights.safetensors: carries no experiment or no classes; is it the record's own?")
    experiment = parse_experiment(record.weights.experiment, source=source)
    return experiment, ClassMap.from_json(record.weights.classes)


def _repeat(
    record: Record,
    model: nn.Module,
    criterion: SetCriterion,
    optimizer: torch.optim.Optimizer,
    autocast: str,
    device: torch.device,
) -> list[list[dict[str, Any]]]:
    """The passes of every process; the gradients' mean over the processes is left in the model."""
    facts = record.facts
    scale = facts["scale"] if autocast == facts["autocast"] else INIT_SCALE
    scaler = torch.amp.GradScaler(device.type, init_scale=scale, enabled=autocast == "fp16")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    means: dict[nn.Parameter, Tensor] = {}
    shares = []
    for share, recorded in zip(record.shares, facts["shares"], strict=True):
        names = {p["id"]: p["file_name"] for done in recorded["passes"] for p in done["images"]}
        restore_generators(share.generators, device)
        optimizer.zero_grad()
        passes = []
        for batch in share.batches:
            done = forward_backward(model, criterion, scaler, batch, facts["num_boxes"], autocast)
            costs = criterion.matcher.costs(done.predictions, done.targets)
            passes.append(describe_pass(done, costs, names.__getitem__))
        scaler.unscale_(optimizer)
        scaler.update(scale)
        for parameter in parameters:
            if parameter.grad is not None:
                means[parameter] = means.get(parameter, 0) + parameter.grad / len(record.shares)
        shares.append(passes)
    for parameter, mean in means.items():
        parameter.grad = mean
    return shares


@contextlib.contextmanager
def _watched(model: nn.Module, firsts: dict[str, str]) -> Iterator[None]:
    """Within: the first place on each way where numbers of the model are not finite is noted in `firsts`.

    A place is a module by its name, which stands for what happened since the module before it was done.
    """

    def look_back(place: str, gradient: Tensor) -> None:
        if "backward" not in firsts and not _is_finite(gradient):
            firsts["backward"] = f"gradient of the output of {place}, {count_nonfinite(gradient)} values"

    def look(place: str, module: nn.Module, inputs: tuple, outputs: Any) -> None:
        for output in _tensors(outputs):
            if "forward" not in firsts and not _is_finite(output):
                born = all(_is_finite(value) for value in _tensors(inputs))
                source = "from finite inputs" if born else "its inputs are not finite either"
                firsts["forward"] = f"output of {place}, {count_nonfinite(output)} values, {source}"
            if output.requires_grad:
                output.register_hook(partial(look_back, place))

    def look_at_parameter(name: str, parameter: Tensor) -> None:
        if "parameter" not in firsts and not _is_finite(parameter.grad):
            firsts["parameter"] = f"{name}, {count_nonfinite(parameter.grad)} values"

    handles = [
        module.register_forward_hook(partial(look, f"{name or 'the network'} ({type(module).__name__})"))
        for name, module in model.named_modules()
    ]
    handles += [
        parameter.register_post_accumulate_grad_hook(partial(look_at_parameter, name))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Within, torch computes with as many threads as are given: sums are split between them."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _is_finite(values: Tensor) -> bool:
    """Whether all numbers are finite; asked outside autograd, which recomputed layers want to find as it was."""
    return bool(values.detach().isfinite().all())


def _tensors(value: Any) -> Iterator[Tensor]:
    """All floating tensors inside tuples, lists and a tensor itself."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


def _by_name(shares: list[list[dict[str, Any]]], gradients: dict[str, Any]) -> dict[str, Any]:
    """The numbers of all passes and the gradients' norms, each under one name."""
    found: dict[str, Any] = {}
    for rank, passes in enumerate(shares):
        for number, done in enumerate(passes, start=1):
            where = f"process {rank}, pass {number}: " if len(shares) > 1 or len(passes) > 1 else ""
            found |= {f"{where}loss {name}": value for name, value in done["losses"].items()}
            for term, layers in done["costs"].items():
                for layer, ends in layers.items():
                    found |= {f"{where}{term} cost, {layer}, {end}": value for end, value in ends.items()}
    found["gradient norm"] = gradients["norm"]
    for kind in ("groups", "modules", "largest"):
        found |= {f"gradient norm, {kind}: {name}": value for name, value in gradients[kind].items()}
    return found | {BAD_GRADIENT + name: value for name, value in gradients["nonfinite"].items()}


def _is_fault(name: str, value: Any) -> bool:
    """Whether a number says that something is not finite."""
    return isinstance(value, str) or (name.endswith("nonfinite") and bool(value))


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else "-" if value is None else str(value)
