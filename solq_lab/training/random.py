"""Random generators of a training process: seed them, and save and restore their states."""

import contextlib
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from solq_lab import distributed

log = logging.getLogger(__name__)


def seed_generators(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - a user's transform may draw from the global generator
    torch.manual_seed(seed)


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """States of torch's generators alone, which a forward pass draws from: dropout, and noise of codecs."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_generators(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Set torch's generators to what `generator_states` returned, perhaps on a machine without a GPU."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def random_state(device: torch.device) -> dict[str, Any]:
    """States of all generators of this process, as tensors and numbers that a checkpoint can hold."""
    legacy: Any = np.random.get_state()  # noqa: NPY002
    _, keys, *rest = legacy
    version, internal, gauss_next = random.getstate()
    states = generator_states(device)
    state = {
        "torch": states.pop("cpu"),
        "numpy": {"keys": torch.from_numpy(keys.astype(np.int64)), "rest": tuple(rest)},
        "python": {"version": version, "internal": torch.tensor(internal), "gauss_next": gauss_next},
    }
    return state | states


def restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Set all generators of this process to what `random_state` returned."""
    keys, python = state["numpy"]["keys"].numpy().astype(np.uint32), state["python"]
    np.random.set_state(("MT19937", keys, *state["numpy"]["rest"]))  # noqa: NPY002
    random.setstate((python["version"], tuple(python["internal"].tolist()), python["gauss_next"]))
    on_gpu = {} if state.get("cuda") is None else {"cuda": state["cuda"]}
    restore_generators({"cpu": state["torch"], **on_gpu}, device)


def resume_random_states(states: Sequence[Mapping[str, Any]], device: torch.device, *, seed: int) -> None:
    """Set the generators of every process to those of a checkpoint, or seed them where it has another number of them.

    Images and their augmentation have seeds of their own, and stay the same.
    """
    processes = distributed.world_size()
    if len(states) == processes:
        restore_random_state(states[distributed.rank()], device)
    else:
        log.warning("%d processes resume a run of %d: dropout is drawn anew", processes, len(states))
        seed_generators(seed + distributed.rank())


@contextlib.contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Restore the generators after the block, whatever it drew from them."""
    state = random_state(device)
    try:
        yield
    finally:
        restore_random_state(state, device)
