"""Files that `torch.save` wrote, read without executing anything in them."""

import argparse
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from solq_lab.models.official import WeightMismatch


def load_pickle(path: Path) -> Any:
    """Load tensors and plain values that `torch.save` wrote; anything else is rejected."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise WeightMismatch(f"{path}: no such checkpoint file") from None
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        found = f"it needs {wanted[1]}" if wanted else "it is no pickle of tensors"
        raise WeightMismatch(
            f"{path}: rejected, {found}; nothing in it was executed. Allowed are tensors, plain values and an "
            "argparse.Namespace; save the state dict alone with torch.save and give that"
        ) from None

    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise WeightMismatch(
            f"{path}: not a checkpoint, or cut short ({type(error).__name__}); allowed are files that torch.save wrote"
        ) from None
