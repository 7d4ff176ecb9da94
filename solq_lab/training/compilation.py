"""`torch.compile` for training: the layers of the transformer, each kind once and for images of any size.

A layer compiles in a minute or two on a CPU, the whole network in many; and a network that is compiled layer by layer
still averages its gradients while the backward pass runs, and still checkpoints its activations.
"""

import logging
from contextlib import AbstractContextManager

import torch

from solq_lab.models.solq import SOLQ

log = logging.getLogger(__name__)

BACKEND = "inductor"


def compile_layers(model: SOLQ, device: torch.device) -> bool:
    """Compile the encoder and decoder layers in place, at their first call; names of weights stay as they are.

    Returns:
        Whether the compiler works here. Where it does not, a log line says why and the model stays as it is.
    """
    try:
        double = torch.compile(lambda numbers: 2 * numbers, backend=BACKEND)
        double(torch.ones(2, device=device))
    except Exception as error:  # a missing C++ compiler or Triton, an unsupported Python: each has errors of its own
        reason = " ".join(str(error).split())[:300]
        log.warning("train.compile: the compiler does not work here, training goes on without it: %s", reason)
        return False
    for layer in (*model.encoder, *model.decoder):
        layer.compile(dynamic=True, backend=BACKEND)
    log.info("the transformer's layers are compiled in the first step, which takes minutes")
    return True


def as_written() -> AbstractContextManager:
    """Within, compiled layers run as written: an evaluation needs no compiler."""
    return torch.compiler.set_stance("force_eager")
