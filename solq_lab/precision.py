"""Where bfloat16 autocast saves time and where it costs time."""

from __future__ import annotations

import logging

import torch

log = logging.getLogger(__name__)

AUTOCAST = ("none", "bf16")


def check_autocast(autocast: str, device: torch.device, *, setting: str = "autocast") -> None:
    """Say so in the log where bf16 makes a network slower.

    Args:
        autocast: "none" or "bf16".
        device: where the network runs.
        setting: the name under which the user chose `autocast`.

    Raises:
        ValueError: another value than these two.
    """
    if autocast not in AUTOCAST:
        raise ValueError(f"{setting}={autocast!r} is unknown; allowed are {', '.join(AUTOCAST)}")
    if autocast == "bf16" and device.type == "cpu" and not _cpu_multiplies_bf16():
        log.warning("%s=bf16: this CPU has no bf16 instructions, so it will be slower than autocast=none", setting)


def _cpu_multiplies_bf16() -> bool:
    known = getattr(torch.cpu, "get_capabilities", dict)()  # new in some torch later than our oldest
    return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
