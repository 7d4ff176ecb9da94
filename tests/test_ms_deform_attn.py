"""Deformable attention: the sums, their gradients, and what the operator promises to torch."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from solq_lab.ops.ms_deform_attn import ms_deform_attn


@pytest.mark.golden
@pytest.mark.parametrize("case", [0, 1, 2])
def test_output_and_gradients_equal_the_released_kernel(golden_root, case):
    folder = golden_root / "parts_ms_deform_attn"
    arrays = np.load(folder / "fixture.npz")
    shapes = json.loads((folder / "fixture.json").read_text())["cases"][case]["spatial_shapes"]
    inputs = {name: torch.from_numpy(arrays[f"{name}_{case}"]) for name in ("value", "locations", "weights")}
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]

    output = ms_deform_attn(leaves[0], shapes, leaves[1], leaves[2])

    torch.testing.assert_close(output, torch.from_numpy(arrays[f"output_{case}"]), rtol=0, atol=1e-12)
    gradients = torch.autograd.grad(output, leaves, torch.from_numpy(arrays[f"grad_output_{case}"]))
    for name, gradient in zip(inputs, gradients, strict=True):
        torch.testing.assert_close(gradient, torch.from_numpy(arrays[f"grad_{name}_{case}"]), rtol=0, atol=1e-10)
