"""The network's claims about itself: geometry, gradients, sharing, initialisation, sizes, messages."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_network import SIZES, draw_images
from torch import Tensor, nn

from solq_lab.models.attention import MultiScaleDeformableAttention, SelfAttention
from solq_lab.models.backbone import FrozenBatchNorm2d, ResNetBackbone, SmallBackbone, SwinBackbone
from solq_lab.models.decoder import DecoderLayer
from solq_lab.models.encoder import FeedForward
from solq_lab.models.heads import inverse_sigmoid
from solq_lab.models.look import MaskLook
from solq_lab.models.solq import SOLQ
from solq_lab.models.weights import WeightMismatch, to_official_state
from solq_lab.structures import ImageBatch

SMALL = SIZES | {"vector_dim": 20, "heads": 4, "levels": 3, "encoder_layers": 1, "queries": 7, "dropout": 0.0}


class FixedMaps(nn.Module):
    """Stands for a backbone: gives the maps it was given, whatever the pixels are."""

    strides, channels = (8, 16, 32), (32, 32, 32)

    def __init__(self, maps: list[Tensor]) -> None:
        super().__init__()
        self.maps = maps

    def forward(self, _: Tensor) -> list[Tensor]:
        return self.maps


def small_model(**changes: Any) -> SOLQ:
    torch.manual_seed(0)
    backbone = SmallBackbone((8, 16, 24, 32), (1, 1, 1, 1), c2=bool(changes.get("mask_look")))
    model = SOLQ(backbone, 5, **(SMALL | changes))
    for name, parameter in model.named_parameters():  # zero-initialised layers would hide what depends on what
        if not name.startswith("backbone"):
            nn.init.normal_(parameter, std=0.3)
    return model


def every_output(model: SOLQ, images: ImageBatch) -> Tensor:
    predictions = model(images)
    said = [tensor for layer in predictions.layers for tensor in layer if tensor is not None]
    if predictions.proposals is not None:
        said += [predictions.proposals.logits, predictions.proposals.boxes]
    return torch.stack([(tensor * torch.linspace(0.5, 1.5, tensor.shape[-1])).sum() for tensor in said]).sum()


def test_predictions_have_the_promised_shapes():
    predictions = small_model()(draw_images((64, 96), (50, 40)))
    assert predictions.proposals is None
    assert len(predictions.layers) == 2
    for layer in predictions.layers:
        assert layer.logits.shape == (2, 7, 5)
        assert layer.boxes.shape == (2, 7, 4)
        assert layer.vectors.shape == (2, 7, 20)
        assert layer.boxes.min() > 0
        assert layer.boxes.max() < 1


@pytest.mark.parametrize("changes", [{}, {"two_stage": True}, {"mixed_queries": True}])
def test_padding_does_not_change_the_predictions(changes: dict[str, Any]):
    random = torch.Generator().manual_seed(3)
    maps = [torch.randn(1, 32, 12 // 2**k, 16 // 2**k, generator=random).double() for k in range(3)]
    model = small_model(**changes).double().eval()
    model.projections = nn.ModuleList([nn.Identity()] * 3)  # group norms look at the padded map as a whole

    model.backbone = FixedMaps(maps)
    alone = model(ImageBatch(torch.zeros(1, 3, 96, 128), torch.zeros(1, 96, 128, dtype=torch.bool)))

    padded_maps = [torch.full((1, 32, 20 // 2**k, 24 // 2**k), 99.0).double() for k in range(3)]
    for padded, real in zip(padded_maps, maps, strict=True):
        padded[:, :, : real.shape[2], : real.shape[3]] = real
    padding = torch.ones(1, 160, 192, dtype=torch.bool)
    padding[:, :96, :128] = False
    model.backbone = FixedMaps(padded_maps)
    padded = model(ImageBatch(torch.zeros(1, 3, 160, 192), padding))

    for first, second in zip(alone.layers, padded.layers, strict=True):
        # geometry is float32: a millionth of the image
        torch.testing.assert_close(second, first, rtol=0, atol=2e-4)


def test_training_makes_the_vectors_of_the_layers_that_have_a_vector_loss():
    images = draw_images((64, 64))
    every, last = (small_model(vector_layers=count) for count in (None, 1))
    expected, found = every(images).layers, last(images).layers
    assert found[0].vectors is None
    torch.testing.assert_close(found[1].vectors, expected[1].vectors)
    assert last.eval()(images).layers[0].vectors is not None


def test_a_plain_detector_is_solq_without_its_vectors():
    solq, plain = small_model().eval(), small_model(vector_dim=None).eval()
    assert set(plain.state_dict()) == {name for name in solq.state_dict() if ".vector." not in name}
    plain.load_state_dict({name: tensor for name, tensor in solq.state_dict().items() if ".vector." not in name})
    images = draw_images((64, 64))
    for with_vectors, without in zip(solq(images).layers, plain(images).layers, strict=True):
        assert without.vectors is None
        assert torch.equal(without.logits, with_vectors.logits)
        assert torch.equal(without.boxes, with_vectors.boxes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"refine_boxes": False},
        {"two_stage": True},
        {"mixed_queries": True, "look_twice": True},
        {"mask_look": 8},
        {"vector_dim": None},
        {"levels": 5},
        {"encoder_layers": 0},
        {"standardise_vectors": True},
        {"activation": "gelu"},
    ],
    ids=lambda changes: ",".join(f"{key}={value}" for key, value in changes.items()) or "plain",
)
def test_every_trainable_parameter_gets_a_gradient(changes: dict[str, Any]):
    model = small_model(**changes)
    every_output(model, draw_images((64, 96), (50, 40))).backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not [name for name, parameter in trained.items() if parameter.grad is None]
    assert all(parameter.grad.isfinite().all() for parameter in trained.values())


@pytest.mark.parametrize("width", [96, 256])
def test_two_stage_queries_come_from_proposals_at_any_width(width: int):
    predictions = small_model(two_stage=True, width=width)(draw_images((96, 96), (64, 80)))
    tokens = 12**2 + 6**2 + 3**2
    assert predictions.proposals.logits.shape == (2, tokens, 5)
    assert predictions.proposals.boxes.shape == (2, tokens, 4)
    assert predictions.proposals.vectors is None
    assert predictions.layers[-1].boxes.shape == (2, 7, 4)


def test_two_stage_never_proposes_from_padding():
    proposals = small_model(two_stage=True)(draw_images((96, 96), (96, 40))).proposals
    boxes = proposals.boxes[1, : 12 * 12].view(12, 12, 4)
    assert (boxes[:, 5:] == 1).all()  # columns beyond 40 pixels: the whole padded part is out of play
    assert (boxes[2:10, 1:4] < 1).all()


@pytest.mark.parametrize("look_twice", [False, True])
def test_a_layer_s_box_reaches_its_own_head_and_only_by_a_second_look_the_one_before(look_twice: bool):
    model = small_model(decoder_layers=3, look_twice=look_twice)
    layers = model(draw_images((64, 64))).layers
    for number, layer in enumerate(layers):
        inputs = [head.box.layers[0].weight for head in model.heads]
        gradients = torch.autograd.grad(layer.boxes.sum(), inputs, retain_graph=True, allow_unused=True)
        reached = {number, number - look_twice}
        assert [gradient is not None for gradient in gradients] == [k in reached for k in range(3)]


def test_looking_twice_changes_gradients_alone():
    once, twice = small_model(), small_model(look_twice=True)
    for before, after in zip(once(draw_images((64, 64))).layers, twice(draw_images((64, 64))).layers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(before[:3], after[:3], strict=True))


def test_mixed_queries_take_their_place_from_the_proposals_with_the_best_class_and_share_their_content():
    model, images = small_model(mixed_queries=True), draw_images((96, 96), (64, 80))
    memory = model.embed_levels(model.backbone(images.pixels), images.padding)
    queries, query_pos, reference, proposals = model.initial_queries(memory)
    assert torch.equal(queries, model.query_embedding.expand(2, -1, -1))
    assert query_pos.shape == (2, 7, 32)
    for image in range(2):
        usable = proposals.boxes[image, :, 0] < 1
        best = proposals.logits[image].amax(-1)[usable].topk(7).indices
        assert torch.equal(reference[image], proposals.boxes[image][usable][best])
    assert model(images).proposals_have_classes


@pytest.mark.parametrize("changes", [{"mixed_queries": True}, {"mask_look": 8}], ids=str)
def test_what_the_released_code_does_not_have_is_not_exported_to_it(changes: dict[str, Any]):
    with pytest.raises(WeightMismatch, match=r"mask_look and codec\.learn_decoder have no released counterpart"):
        to_official_state(small_model(**changes).state_dict())


@pytest.mark.parametrize("refine_boxes", [True, False])
def test_a_fresh_mask_look_changes_no_bit_and_every_part_of_it_learns(refine_boxes: bool):
    plain, images = small_model(refine_boxes=refine_boxes), draw_images((64, 96), (50, 40))
    model = small_model(refine_boxes=refine_boxes, mask_look=8)
    model.heads[0].look.reset_parameters()
    fresh = model.load_state_dict(plain.state_dict(), strict=False)
    assert (fresh.unexpected_keys, {name.split(".")[2] for name in fresh.missing_keys}) == ([], {"look"})
    for before, after in zip(plain(images).layers, model(images).layers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(before[:3], after[:3], strict=True))
    assert model.heads[0].look is model.heads[1].look

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        every_output(model, images).backward()
        optimizer.step()
    assert all(parameter.grad.any() for parameter in model.heads[0].look.parameters())


def test_a_mask_look_reads_channels_of_its_own_at_each_point_of_the_predicted_box():
    model, images = small_model(mask_look=8).double(), draw_images((64, 96), (48, 40))
    images = images._replace(pixels=images.pixels.double())
    look, found = model.heads[0].look, []
    look.register_forward_hook(lambda look, inputs, output: found.append((*inputs, output)))
    layers = model(images).layers
    ((*inputs, view, output),) = found
    assert torch.equal(inputs[1], torch.cat([layer.boxes for layer in layers], dim=1))
    assert view.shape == (16, 24)
    maps = view.values.flatten(2).transpose(1, 2).unflatten(2, view.shape)  # (B, C, h, w)
    assert not maps[1, :, 12:].any()
    assert not maps[1, :, :, 10:].any()
    for queries, boxes, expected in zip(*(part.chunk(2, dim=1) for part in (*inputs, output)), strict=True):
        for image, (height, width) in enumerate([(64, 96), (48, 40)]):
            valid = torch.tensor([width / 96, height / 64], dtype=torch.float64)
            offsets = look.sampling_offsets(queries[image]).view(7, 8, 2)
            points = (boxes[image, :, None, :2] + offsets * boxes[image, :, None, 2:] / 2) * valid
            samples = F.grid_sample(maps[image : image + 1], 2 * points[None] - 1, align_corners=False)  # (1, C, 7, 8)
            own = torch.stack([samples[0, 4 * n : 4 * n + 4, :, n].T for n in range(8)], dim=1)  # (7, N, C/N)
            seen = look.output_proj(own.flatten(1))
            torch.testing.assert_close(seen, expected[image], rtol=1e-5, atol=1e-6)  # the ratio is float32


def test_fresh_points_of_a_mask_look_lie_on_a_grid_over_the_box():
    points = MaskLook(32, 4, 8, groups=1).sampling_offsets.bias.view(8, 2)
    assert {tuple(point) for point in points.mul(12).round().int().tolist()} == {
        (x, y) for y in (-8, 0, 8) for x in (-8, 0, 8)
    } - {(8, 8)}


def test_references_are_detached_between_layers_but_the_first_box_trains_the_initial_reference():
    model = small_model()
    model.decoder[0].cross_attention.sampling_offsets.requires_grad_(False)
    layers = model(draw_images((64, 64))).layers
    weight = model.reference_points.weight
    assert torch.autograd.grad(layers[0].boxes.sum(), weight, retain_graph=True)[0].abs().sum() > 0
    heads = torch.autograd.grad(layers[1].boxes.sum(), model.heads[0].box.layers[2].bias, allow_unused=True)
    assert heads == (None,)


def test_without_refinement_all_layers_share_one_head_and_one_reference():
    model = small_model(refine_boxes=False)
    assert model.heads[0] is model.heads[1]
    seen = []
    for layer in model.decoder:
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2]))
    model(draw_images((64, 64)))
    assert torch.equal(seen[0], seen[1])
    assert seen[0].shape == (1, 7, 2)


def test_a_hook_sees_where_each_query_looks():
    model = small_model().eval()
    seen = []

    def look(attention: MultiScaleDeformableAttention, inputs: tuple, _: Tensor) -> None:
        seen.append((attention.sampling(*inputs), inputs))

    for module in model.modules():
        if isinstance(module, MultiScaleDeformableAttention):
            module.register_forward_hook(look)
    model(draw_images((64, 96), (50, 40)))
    assert len(seen) == 3  # one encoder and two decoder layers
    (locations, weights), (_, reference, memory) = seen[-1]
    assert locations.shape == (2, 7, 4, 3, 4, 2)
    torch.testing.assert_close(weights.sum((-1, -2)), torch.ones(2, 7, 4))
    assert reference.shape == (2, 7, 3, 4)
    assert memory.spatial_shapes == ((8, 12), (4, 6), (2, 3))
    torch.testing.assert_close(memory.valid_ratios[1, 0], torch.tensor([5 / 12, 7 / 8]))  # 40 of 96, 50 of 64 pixels


def test_fresh_attention_looks_in_compass_directions_at_one_to_p_cells():
    attention = MultiScaleDeformableAttention(32, heads=8, levels=2, points=3)
    offsets = attention.sampling_offsets.bias.view(8, 2, 3, 2)
    corner = torch.tensor([1.0, 1.0])
    torch.testing.assert_close(offsets[0, 0], torch.tensor([[1.0, 0], [2, 0], [3, 0]]))
    torch.testing.assert_close(offsets[1, 1], torch.stack([corner, 2 * corner, 3 * corner]))


def test_self_attention_is_torch_s_multi_head_attention():
    ours, theirs = SelfAttention(32, heads=4), nn.MultiheadAttention(32, 4, batch_first=True)
    nn.init.normal_(theirs.in_proj_bias)
    ours.load_state_dict(theirs.state_dict())
    queries, query_pos = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    expected, _ = theirs(queries + query_pos, queries + query_pos, queries)
    torch.testing.assert_close(ours(queries, query_pos), expected)


def test_standardised_vectors_are_center_plus_spread_times_the_answer():
    model = small_model(standardise_vectors=True).eval()
    images = draw_images((64, 64))
    plain = model(images).layers[-1].vectors
    center, spread = torch.linspace(-1, 1, 20), torch.linspace(1, 3, 20)
    model.set_vector_statistics(center, spread)
    torch.testing.assert_close(model(images).layers[-1].vectors, center + spread * plain)
    assert {"heads.0.vector.vector_center", "heads.0.vector.vector_spread"} < set(model.state_dict())
    with pytest.raises(ValueError, match="length 20"):
        model.set_vector_statistics(center[:3], spread[:3])
    with pytest.raises(ValueError, match="standardise_vectors"):
        small_model().set_vector_statistics(center, spread)
    with pytest.raises(ValueError, match="no mask vectors"):
        small_model(vector_dim=None).set_vector_statistics(center, spread)


def test_released_vector_bias_starts_at_minus_two_and_the_standardised_one_at_zero():
    build = lambda **changes: SOLQ(SmallBackbone(), 5, **(SMALL | changes))  # noqa: E731
    bias = build().heads[0].vector.layers[2].bias
    assert bias.tolist() == [0.0, 0.0] + [-2.0] * 18
    assert not build(standardise_vectors=True).heads[0].vector.layers[2].bias.any()


def test_inverse_sigmoid_is_finite_at_both_ends():
    values = torch.tensor([0.0, 0.2, 1.0])
    torch.testing.assert_close(inverse_sigmoid(values).sigmoid(), values, rtol=0, atol=1.1e-5)


def test_small_backbone_has_a_million_weights_and_strides_8_16_32():
    backbone = SmallBackbone()
    assert sum(parameter.numel() for parameter in backbone.parameters()) == pytest.approx(1.04e6, rel=0.02)
    maps = backbone(torch.randn(1, 3, 96, 64))
    assert [tuple(level.shape) for level in maps] == [(1, 64, 12, 8), (1, 128, 6, 4), (1, 160, 3, 2)]
    assert backbone.channels == (64, 128, 160)
    (c5,) = SmallBackbone(c5_only=True)(torch.randn(1, 3, 96, 64))
    assert c5.shape == (1, 160, 3, 2)


@pytest.mark.parametrize(
    "build",
    [
        SmallBackbone,
        lambda **options: ResNetBackbone("resnet50", **options),
        lambda **options: SwinBackbone("swin_t", **options),
    ],
    ids=["small", "resnet", "swin"],
)
def test_c2_comes_before_the_same_other_maps(build):
    maps, pixels = [], torch.randn(1, 3, 96, 64)
    for c2 in (False, True):
        torch.manual_seed(0)
        backbone = build(c2=c2).eval()
        maps.append(backbone(pixels))
        assert [tuple(level.shape) for level in maps[-1]] == [
            (1, channels, 96 // stride, 64 // stride)
            for channels, stride in zip(backbone.channels, backbone.strides, strict=True)
        ]
    assert (backbone.strides, len(maps[1])) == ((4, 8, 16, 32), 4)
    assert all(torch.equal(one, other) for one, other in zip(maps[0], maps[1][1:], strict=True))


def test_channels_last_changes_nothing_but_the_memory_order():
    model = small_model().double().eval()
    images = draw_images((64, 96), (50, 40))
    images = ImageBatch(images.pixels.double(), images.padding)
    plain = model(images).layers[-1]
    model.to(memory_format=torch.channels_last)
    ordered = ImageBatch(images.pixels.contiguous(memory_format=torch.channels_last), images.padding)
    torch.testing.assert_close(model(ordered).layers[-1], plain)


def test_frozen_batch_norm_is_batch_norm_in_evaluation():
    norm, frozen = nn.BatchNorm2d(6).eval(), FrozenBatchNorm2d(6)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        nn.init.uniform_(tensor, 0.5, 2)
    frozen.load_state_dict(norm.state_dict())
    maps = torch.randn(2, 6, 4, 5)
    torch.testing.assert_close(frozen(maps), norm(maps))
    assert not list(frozen.parameters())


@pytest.mark.parametrize("dilation", [False, True])
def test_resnet_freezes_its_first_layers_and_dilates_the_last(dilation: bool):
    backbone = ResNetBackbone("resnet50", dilation=dilation)
    frozen = [name for name, parameter in backbone.named_parameters() if not parameter.requires_grad]
    assert len(frozen) == 11
    assert all(name.startswith(("conv1.", "layer1.")) for name in frozen)
    maps = backbone(torch.randn(1, 3, 64, 96))
    assert [(level.shape[1], 64 // level.shape[2], 96 // level.shape[3]) for level in maps] == [
        (channels, stride, stride) for channels, stride in zip(backbone.channels, backbone.strides, strict=True)
    ]
    assert backbone.strides == (8, 16, 16 if dilation else 32)


def test_swin_is_timm_s_where_no_map_needs_padding():
    timm = pytest.importorskip("timm", reason="the swin extra is not installed")
    torch.manual_seed(0)
    backbone = SwinBackbone("swin_t").eval()
    sizes = {"strict_img_size": False, "always_partition": True}  # shift even a map of one window, as released
    theirs = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, **sizes).eval()
    own = {name: tensor for name, tensor in backbone.state_dict().items() if not name.startswith("norms.")}
    theirs.load_state_dict(own, strict=False)
    pixels = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        maps = backbone(pixels)
        _, expected = theirs.forward_intermediates(pixels, norm=False)
    for level, (found, stage) in enumerate(zip(maps, expected[1:], strict=True), start=1):
        normalised = backbone.norms[str(level)](stage.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        torch.testing.assert_close(found, normalised, rtol=1e-4, atol=1e-4)


def test_swin_takes_any_image_size():
    pytest.importorskip("timm", reason="the swin extra is not installed")
    backbone = SwinBackbone("swin_t").eval()
    with torch.no_grad():
        maps = backbone(torch.randn(2, 3, 50, 37))
    assert [tuple(level.shape) for level in maps] == [(2, 192, 7, 5), (2, 384, 4, 3), (2, 768, 2, 2)]
    assert backbone.channels == (192, 384, 768)


def test_without_timm_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"pip install 'solq-lab\[swin\]'"):
        SwinBackbone("swin_t")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: small_model(width=40), r"width 40 is not a multiple of 32"),
        (lambda: small_model(heads=5), r"width 32 is not a multiple of heads 5"),
        (lambda: small_model(levels=2), r"levels 2 does not fit a backbone with 3 maps"),
        (lambda: small_model(levels=1), r"levels 1 does not fit"),
        (lambda: small_model(two_stage=True, refine_boxes=False), r"two_stage needs refine_boxes"),
        (lambda: small_model(mixed_queries=True, refine_boxes=False), r"mixed_queries needs refine_boxes"),
        (lambda: small_model(look_twice=True, refine_boxes=False), r"look_twice needs refine_boxes"),
        (lambda: small_model(mask_look=8, vector_dim=None), r"mask_look 8 serves mask vectors.*set mask_look to 0"),
        (lambda: small_model(mask_look=12), r"mask_look 12 does not divide width 32"),
        (lambda: SOLQ(SmallBackbone(), 5, **(SMALL | {"mask_look": 8})), r"mask_look 8 .* a backbone with 3 maps"),
        (lambda: small_model(denoising=2), r"denoising 2 needs two_stage or mixed_queries"),
        (lambda: small_model(mixed_queries=True, two_stage=True), r"two_stage and mixed_queries both .*leave one out"),
        (lambda: FeedForward(32, 32, 0.0, "tanh"), r"'tanh' is unknown; allowed are relu, gelu, silu"),
        (lambda: SelfAttention(32, 5), r"width 32 is not a multiple of heads 5"),
        (lambda: ResNetBackbone("resnet18"), r"'resnet18' is unknown; allowed are resnet50, resnet101"),
    ],
)
def test_sizes_that_do_not_fit_are_rejected_with_the_cure(build: Any, message: str):
    with pytest.raises(ValueError, match=message):
        build()


def test_two_stage_needs_as_many_tokens_as_queries():
    with pytest.raises(ValueError, match=r"90 queries cannot be chosen from the 84 tokens"):
        small_model(two_stage=True, queries=90)(draw_images((64, 64)))


def test_dropout_is_off_in_evaluation_and_on_in_training():
    model = small_model(dropout=0.5)
    images = draw_images((64, 64))
    model.eval()
    assert torch.equal(model(images).layers[-1].logits, model(images).layers[-1].logits)
    for module in model.modules():
        if isinstance(module, DecoderLayer):
            module.train()
    assert not torch.equal(model(images).layers[-1].logits, model(images).layers[-1].logits)


@pytest.mark.parametrize("changes", [{}, {"refine_boxes": False}, {"two_stage": True}, {"mixed_queries": True}])
def test_boxes_stay_float32_under_bfloat16_autocast(changes: dict[str, Any]):
    model = small_model(**changes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layers = model(draw_images((64, 96), (50, 40))).layers
    assert {layer.boxes.dtype for layer in layers} == {torch.float32}


def test_a_model_can_be_exported_as_one_graph():
    model = small_model().eval()
    images = draw_images((64, 96), (50, 40))
    exported = torch.export.export(model, (images,)).module()
    torch.testing.assert_close(exported(images).layers[-1], model(images).layers[-1])


@pytest.fixture(scope="module")
def parts_misc(golden_root: Path) -> dict[str, Any]:
    return json.loads((golden_root / "parts_misc" / "fixture.json").read_text())


def released_model(backbone: str, c5: bool) -> SOLQ:
    """The released configuration (width 384); C5 alone has no box refinement."""
    sizes = {"vector_dim": 256, "width": 384, "heads": 8, "levels": 1 if c5 else 4, "refine_boxes": not c5}
    sizes |= {"encoder_layers": 6, "decoder_layers": 6, "feedforward": 1024, "vector_hidden": 1024, "queries": 300}
    return SOLQ(ResNetBackbone(backbone, c5_only=c5), 91, **(SMALL | sizes))


@pytest.mark.golden
@pytest.mark.parametrize("backbone", ["resnet50", "resnet101"])
@pytest.mark.parametrize("c5", [False, True], ids=["four levels", "C5 alone"])
def test_parameter_counts_are_the_released_ones(parts_misc: dict[str, Any], backbone: str, c5: bool):
    with torch.device("meta"):
        model = released_model(backbone, c5)
    stored = parts_misc["parameter_counts"][f"{backbone}/solq" + ("_c5" if c5 else "")]
    assert sum(p.numel() for p in model.parameters()) == stored["total"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == stored["trainable"]
    assert sum(p.numel() for p in model.heads[0].vector.parameters()) == stored["vector_head"]


@pytest.mark.golden
def test_fresh_parameters_are_distributed_as_released(parts_misc: dict[str, Any]):
    torch.manual_seed(0)
    fresh = to_official_state(released_model("resnet50", c5=False).state_dict())
    for name, stored in parts_misc["fresh_init_seed42_backbone_without_imagenet"].items():
        tensor = fresh[name].double()
        assert list(tensor.shape) == stored["shape"], name
        if stored["std"] == 0 or name.endswith(("sampling_offsets.bias", "embed.0.layers.2.bias")):  # not random
            for key, found in (("min", tensor.min()), ("max", tensor.max()), ("mean", tensor.mean())):
                assert float(found) == pytest.approx(stored[key], abs=1e-6), f"{name} {key}"
            continue
        few = 6 / tensor.numel() ** 0.5  # six standard errors, as a share of the standard deviation
        assert float(tensor.std()) == pytest.approx(stored["std"], rel=min(few, 0.5)), name
        assert float(tensor.mean()) == pytest.approx(stored["mean"], abs=2 * few * stored["std"]), name
