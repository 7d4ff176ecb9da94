"""Networks that multiply in half precision: the types a user may name, and where they cost time."""

import logging
from collections.abc import Sequence

import torch

log = logging.getLogger(__name__)

PREDICTING = ("none", "bf16")
TRAINING = ("none", "bf16", "fp16")  # fp16 has five bits of exponent: its gradients need a scaler

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_INSTRUCTIONS = {"bf16": ("avx512_bf16", "amx_bf16", "bf16"), "fp16": ("avx512_fp16", "amx_fp16", "fp16")}


def check_autocast(
    autocast: str, device: torch.device, *, setting: str = "autocast", allowed: Sequence[str] = PREDICTING
) -> None:
    """Check the type, and warn where half precision makes a network slower.

    Args:
        autocast: one of `allowed`.
        device: where the network runs.
        setting: the name under which the user chose `autocast`.
        allowed: what may be chosen there.

    Raises:
        ValueError: another value than these.
    """
    if autocast not in allowed:
        raise ValueError(f"{setting}={autocast!r} is unknown; allowed are {', '.join(allowed)}")
    if autocast == "none" or device.type != "cpu":
        return
    known: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # new in some torch later than our oldest
    if not any(known.get(name, False) for name in _INSTRUCTIONS[autocast]):
        message = "%s=%s: this CPU has no %s instructions, so it will be slower than autocast=none"
        log.warning(message, setting, autocast, autocast)


def autocast_to(autocast: str, device: torch.device) -> torch.autocast:
    """A block in which a network on `device` multiplies in the type of that name; "none" leaves it in its own."""
    return torch.autocast(device.type, _TYPES.get(autocast), enabled=autocast != "none")
