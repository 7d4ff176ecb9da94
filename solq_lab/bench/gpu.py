"""The op, inference and training on a GPU, against `grid_sample` and the plain network on the same GPU.

Sizes are COCO's: an encoder layer and a training step at 800 x 1333, inference at the 512 x 852 of the paper's table 5.
"""

from collections.abc import Iterator
from functools import partial

import torch

from solq_lab.bench.network import IMAGE_SIZE, Numbers, Workload, describe_size, infer_row, released_model, train_row
from solq_lab.bench.op import draw_inputs, layer_rows
from solq_lab.bench.timing import Row, compare, timer
from solq_lab.ops.ms_deform_attn import implementation_for

STRIDES = (8, 16, 32, 64)  # of C3, C4, C5 and the level above
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of the largest number; bfloat16 itself rounds by 4e-3
OUTPUT_TOLERANCES = {"none": 1e-2, "bf16": 5e-2}  # after fifty convolutions, in TF32 as torch has it, and twelve layers
LOSS_TOLERANCE = 5e-2  # relative, between float32 and bfloat16
CALLS = 5  # of an operator that are timed as one, so that the GPU never waits for the host
COCO = Workload(released_model(), image=(800, 1333), shown=IMAGE_SIZE, batch=4, repeats=50)


def rows(device: torch.device | str = "cuda", work: Workload = COCO) -> Iterator[Row]:
    """An encoder layer's attention, inference, and a training step; a CPU has no CUDA graphs, and runs without."""
    device = torch.device(device)
    shapes = [(-(-work.image[0] // stride), -(-work.image[1] // stride)) for stride in STRIDES]
    measure = partial(compare, repeats=work.repeats, timed=timer(device, CALLS))
    for dtype, tolerance in TOLERANCES.items():
        tokens = sum(height * width for height, width in shapes)
        inputs, gradient = draw_inputs(tokens, shapes, batch=work.batch, device=device, dtype=dtype)
        kind = f"{str(dtype).removeprefix('torch.')}, {implementation_for(device.type)}"
        what = f"encoder layer, {describe_size(work.image)}, batch {work.batch}, {kind}"
        yield from layer_rows(
            "gpu", what, inputs, shapes, gradient, tolerance=tolerance, deterministic=True, measure=measure
        )

    for autocast, tolerance in OUTPUT_TOLERANCES.items():
        name = "bfloat16" if autocast == "bf16" else "float32"
        what = f"inference, {work.describe(work.shown, 1)}, with masks, {name}"
        row = infer_row("gpu", what, work, device, autocast=autocast, tolerance=tolerance, timed=timer(device))
        yield _with_speed(row, images=1)

    def same(expected: Numbers, found: Numbers) -> bool:
        return abs(found[0] - expected[0]) <= LOSS_TOLERANCE * expected[0]

    what = f"training step, {work.describe(work.image, work.batch)}, bfloat16"
    row = train_row("gpu", what, work, device, autocast="bf16", equal=same, timed=timer(device))
    yield _with_speed(row, images=work.batch)


def _with_speed(row: Row, *, images: int) -> Row:
    return row._replace(what=f"{row.what}: {1000 * images / row.ours:.1f} images/s")
