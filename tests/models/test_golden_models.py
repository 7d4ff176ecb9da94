"""The network computes what the released implementation computed: names, shapes, outputs of all layers, digests."""

from pathlib import Path
from typing import Any, NamedTuple

import golden
import numpy as np
import pytest
import torch
from conftest import golden_folder
from torch import Tensor, nn

from solq_lab.models.attention import Memory, MultiScaleDeformableAttention
from solq_lab.models.official import infer_architecture
from solq_lab.models.weights import to_official_state, translate_official_state
from solq_lab.structures import Predictions

pytestmark = pytest.mark.golden

FOLDERS = golden.fixtures(golden_folder())
# Multiples of what the released implementation differs from itself between float32 and float64.
NOISE = {torch.float64: 10, torch.float32: 50}
# The same for tensors on the way, as a share of each one's largest value; the fixtures give no noise for them.
SHARE_OF_LARGEST = {torch.float64: 1e-5, torch.float32: 5e-5}

each_folder = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


class Run(NamedTuple):
    """One forward pass of our model on a fixture, and what hooks saw on its way."""

    fixture: golden.Fixture
    dtype: torch.dtype
    predictions: Predictions
    seen: dict[str, Tensor]


@pytest.fixture(
    scope="module",
    params=[(folder, dtype) for folder in FOLDERS for dtype in NOISE],
    ids=lambda case: f"{case[0].name}-{str(case[1]).removeprefix('torch.')}",
)
def run(request: pytest.FixtureRequest) -> Run:
    folder, dtype = request.param
    fixture = golden.Fixture(folder)
    model = fixture.build_model(dtype)
    seen: dict[str, Tensor] = {}

    def keep_maps(_: nn.Module, __: Any, maps: list[Tensor]) -> None:
        seen.update({f"backbone_feature_{level}": level_map for level, level_map in enumerate(maps)})

    def keep_start(_: nn.Module, inputs: tuple[Tensor, Tensor, Tensor, Memory, None]) -> None:
        _, _, seen["init_reference"], memory, _ = inputs
        sizes = [height * width for height, width in memory.spatial_shapes]
        paddings = memory.padding.split(sizes, dim=1)
        positions = memory.positions.split(sizes, dim=1)
        for level, (height, width) in enumerate(memory.spatial_shapes):
            position = positions[level] - model.level_embedding[level]
            seen[f"position_{level}"] = position.transpose(1, 2).unflatten(-1, (height, width))
            seen[f"padding_mask_{level}_true_count"] = paddings[level].sum(1)

    model.backbone.register_forward_hook(keep_maps)
    model.decoder[0].register_forward_pre_hook(keep_start)
    for kind, layers in (("input_proj", model.projections), ("decoder_layer", model.decoder)):
        for number, layer in enumerate(layers):
            layer.register_forward_hook(lambda _, __, out, name=f"{kind}_{number}": seen.update({name: out}))
    for number, layer in enumerate(model.encoder):
        layer.register_forward_hook(lambda _, __, out, name=f"encoder_layer_{number}": seen.update({name: out.tokens}))
    with torch.no_grad():
        predictions = model(fixture.images(dtype))
    for number, layer in enumerate(predictions.layers):
        refined = layer.boxes if model.refine_boxes else seen["init_reference"]
        seen[f"reference_after_layer_{number}"] = refined
    return Run(fixture, dtype, predictions, seen)


def assert_near(found: Tensor, stored: np.ndarray, atol: float, what: str) -> None:
    assert tuple(found.shape) == stored.shape, f"{what}: shape {tuple(found.shape)}, stored {stored.shape}"
    worst = float((found.double() - torch.from_numpy(stored).double()).abs().max())
    assert worst <= atol, f"{what}: differs by {worst:.3g}, allowed is {atol:.3g}"


def assert_same_digest(found: Tensor, stored: dict[str, Any], share: float, what: str) -> None:
    summary = golden.digest(found)
    assert summary["shape"] == stored["shape"], f"{what}: shape {summary['shape']}, stored {stored['shape']}"
    largest = max(abs(stored["min"]), abs(stored["max"]))
    for name in ("mean", "std", "min", "max"):
        assert summary[name] == pytest.approx(stored[name], abs=share * largest), f"{what}: {name}"
    assert summary["l2"] == pytest.approx(stored["l2"], rel=share), f"{what}: L2"
    worst = np.abs(np.subtract(summary["sample"], stored["sample"])).max()
    assert worst <= share * largest, f"{what}: samples differ by {worst:.3g}, allowed is {share * largest:.3g}"


def test_a_golden_folder_was_found(golden_root: Path):
    assert golden.fixtures(golden_root), f"no model folder in {golden_root}"


@each_folder
def test_names_shapes_and_order_of_the_state_dict_are_the_released_ones(folder: Path):
    fixture = golden.Fixture(folder)
    model = golden.build_untrained(fixture.args, fixture.num_classes)
    # One decoder layer alone does not tell whether boxes are refined; then the released aliases decide.
    exported = to_official_state(model.state_dict(), refine_boxes=fixture.args["with_box_refine"])
    found = [[name, list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in exported.items()]
    assert found == [row[:3] for row in fixture.record["state_dict"]]


@each_folder
def test_official_to_ours_to_official_is_bit_exact(folder: Path):
    fixture = golden.Fixture(folder)
    official = fixture.official_state()
    back = to_official_state(translate_official_state(official)[0], refine_boxes=fixture.args["with_box_refine"])
    assert list(back) == list(official)
    for name, tensor in official.items():
        assert back[name].dtype == tensor.dtype, name
        assert torch.equal(back[name], tensor), name


@each_folder
def test_architecture_is_inferred_from_the_tensors(folder: Path):
    fixture = golden.Fixture(folder)
    args = fixture.args
    found = infer_architecture(fixture.official_state(), args)
    model = found["model"]
    assert model["backbone"] == args["backbone"].removesuffix("_p4w7")
    assert model.get("mask_branch", "none") == ("sqr" if args["meta_arch"] == "deformable_detr" else "none")
    for ours, theirs in {
        "width": "hidden_dim",
        "heads": "nheads",
        "levels": "num_feature_levels",
        "encoder_layers": "enc_layers",
        "decoder_layers": "dec_layers",
        "encoder_points": "enc_n_points",
        "decoder_points": "dec_n_points",
        "feedforward": "dim_feedforward",
        "queries": "num_queries",
        "refine_boxes": "with_box_refine",
        "two_stage": "two_stage",
        "dilation": "dilation",
        "activation": "activation",
    }.items():
        assert model[ours] == args[theirs], ours
    if args["with_vector"]:
        assert model["vector_hidden"] == args["vector_hidden_dim"]
        assert found["codec"] == {"kind": "dct", "vector_dim": args["n_keep"], "mask_size": args["gt_mask_len"]}
    else:
        assert found["codec"] == {"kind": "none"}


@each_folder
def test_the_same_parameters_are_trained(folder: Path):
    fixture = golden.Fixture(folder)
    model = golden.build_untrained(fixture.args, fixture.num_classes)
    released = {row[0]: row[3] for row in fixture.record["state_dict"]}
    exported = to_official_state(model.state_dict(keep_vars=True), refine_boxes=fixture.args["with_box_refine"])
    ours = {released[name] for name, tensor in exported.items() if tensor.requires_grad}
    assert ours == {released[name] for name in fixture.trainable}


def test_outputs_of_all_layers_are_the_stored_ones(run: Run):
    fixture, dtype, predictions, _ = run
    atol = {kind: NOISE[dtype] * fixture.noise[f"pred_{kind}_maxabs"] for kind in ("boxes", "logits", "vectors")}
    *earlier, last = predictions.layers
    if last.masks is not None:  # the fixture of the SQR baseline holds the last layer alone
        assert_near(last.boxes, fixture.arrays["pred_boxes"], atol["boxes"], "boxes")
        assert_near(last.logits, fixture.arrays["pred_logits"], atol["logits"], "logits")
        assert_near(last.masks.logits[:, ::4], fixture.arrays["pred_masks"], atol["logits"], "masks")
        return
    queries, few = (torch.from_numpy(fixture.arrays[name]) for name in ("query_subset", "few_queries"))
    assert_near(last.boxes, fixture.arrays["pred_boxes"], atol["boxes"], "boxes")
    assert_near(last.logits[:, queries], fixture.arrays["pred_logits"], atol["logits"], "logits")
    assert_near(last.vectors[:, queries], fixture.arrays["pred_vectors"], atol["vectors"], "vectors")
    for number, layer in enumerate(earlier):
        stored = {kind: fixture.arrays[f"aux{number}_pred_{kind}"] for kind in ("boxes", "logits_few", "vectors_few")}
        assert_near(layer.boxes, stored["boxes"], atol["boxes"], f"boxes of layer {number}")
        assert_near(layer.logits[:, few], stored["logits_few"], atol["logits"], f"logits of layer {number}")
        assert_near(layer.vectors[:, few], stored["vectors_few"], atol["vectors"], f"vectors of layer {number}")
    if predictions.proposals is not None:
        boxes, scores = fixture.arrays["enc_pred_boxes"], fixture.arrays["enc_pred_logits_class0"]
        assert_near(predictions.proposals.boxes, boxes, atol["boxes"], "boxes of the proposals")
        assert_near(predictions.proposals.logits[..., 0], scores, atol["logits"], "logits of the proposals")


def test_every_tensor_on_the_way_has_the_stored_digest(run: Run):
    fixture, dtype, predictions, seen = run
    share = SHARE_OF_LARGEST[dtype]
    if predictions.layers[-1].masks is not None:
        assert_same_digest(predictions.layers[-1].masks.logits, fixture.record["pred_masks_digest"], share, "masks")
        return
    for name, stored in fixture.record["digests"].items():
        if name.endswith("_true_count"):
            assert seen[name].tolist() == stored, name
        else:
            assert_same_digest(seen[name], stored, share, name)
    layers = [*fixture.record["aux_digest"], fixture.record["output_digest"]]
    assert len(layers) == len(predictions.layers)
    for number, (layer, digests) in enumerate(zip(predictions.layers, layers, strict=True)):
        outputs = {"pred_logits": layer.logits, "pred_boxes": layer.boxes, "pred_vectors": layer.vectors}
        for name, stored in digests.items():
            assert_same_digest(outputs[name], stored, share, f"{name} of layer {number}")
    if predictions.proposals is not None:
        outputs = {"pred_logits": predictions.proposals.logits, "pred_boxes": predictions.proposals.boxes}
        for name, stored in fixture.record["enc_outputs_digest"].items():
            assert_same_digest(outputs[name], stored, share, f"{name} of the proposals")


@pytest.mark.parametrize("number", [0, 1], ids=["points", "boxes"])
def test_attention_module_and_its_gradients_are_the_stored_ones(golden_root: Path, number: int):
    with np.load(golden_root / "parts_ms_deform_attn" / "fixture.npz") as arrays:
        prefix = f"module{number}_"
        stored = {k.removeprefix(prefix): torch.from_numpy(arrays[k]) for k in arrays.files if k.startswith(prefix)}
    parameters = {k.removeprefix("param_"): v for k, v in stored.items() if k.startswith("param_")}
    shapes = ((6, 8), (3, 4), (2, 2))  # as `module` in fixture.json says
    attention = MultiScaleDeformableAttention(32, heads=4, levels=3, points=4).double()
    attention.load_state_dict(parameters)
    query, tokens, reference = (stored[name].requires_grad_() for name in ("query", "src", "ref"))
    sizes = torch.tensor(shapes, dtype=torch.float64).flip(-1)
    memory = Memory(tokens, tokens, query, stored["padding"], shapes, sizes, torch.ones(2, 3, 2))
    output = attention(query, reference, memory)
    torch.testing.assert_close(output, stored["output"], rtol=0, atol=1e-12)
    output.backward(stored["grad_output"])
    found = {"query": query.grad, "src": tokens.grad, "ref": reference.grad}
    found |= {name: parameter.grad for name, parameter in attention.named_parameters()}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, stored[f"grad_{name}"], rtol=1e-9, atol=1e-10, msg=name)
