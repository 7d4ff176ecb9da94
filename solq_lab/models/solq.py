"""SOLQ, the whole network: read `forward` first. Paper: section 3, figs. 1(b) and 2.

Shape letters: B batch, J queries, C width, L levels, T tokens of all levels, S classes, D vector_dim.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from solq_lab.models.attention import Memory
from solq_lab.models.checkpointing import Checkpointed
from solq_lab.models.decoder import DecoderLayer
from solq_lab.models.encoder import EncoderLayer
from solq_lab.models.heads import UnifiedQueryHead, VectorMLP
from solq_lab.models.look import MaskLook, Rows, View
from solq_lab.models.position import cell_centers, sine_encoding, sine_features
from solq_lab.structures import Guests, ImageBatch, LayerPrediction, Predictions, filled, padding_at, unpadded_sizes

if TYPE_CHECKING:
    from solq_lab.models.backbone import Backbone

GROUPS = 32  # of the group norm after each projection
PROPOSAL_SIDE = 0.05  # of a proposal on the finest level, share of the image; doubles from level to level
PROPOSAL_MARGIN = 0.01  # proposals whose centre or side is nearer to 0 or 1 are not used

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)
Match = Callable[[Predictions], Rows | None]  # which T queries of Z layers need vectors: images (T,), places (Z, T)


class SOLQ(Checkpointed):
    """Deformable DETR whose queries also predict their mask vector.

    Args:
        backbone: module with `channels`; maps pixels (B, 3, H, W) to the maps C3, C4, C5 (or C5 alone, or C2 to C5).
        num_classes: S, class channels.
        vector_dim: D, length of the mask vectors; None is plain Deformable DETR.
        width: C, features per token and query.
        heads: M, attention heads.
        levels: 1 for C5 alone; 3 for C3-C5; each one more adds a stride-2 convolution on top.
        encoder_layers: number of encoder layers, may be 0.
        decoder_layers: number of decoder layers.
        encoder_points: P of the encoder.
        decoder_points: P of the decoder.
        feedforward: hidden features of the feed-forward blocks.
        vector_hidden: hidden features of the vector MLP.
        queries: J.
        dropout: share of features that training drops.
        activation: of the feed-forward blocks: "relu", "gelu" or "silu".
        refine_boxes: each layer starts from the box of the one before, and has its own class and box head.
        two_stage: queries come from the encoder's best proposals; needs `refine_boxes`.
        mixed_queries: positions of queries come from the encoder's best proposals, which have classes; their content is
            learned (DINO's mixed query selection). Instead of `two_stage`; needs `refine_boxes`.
        look_twice: a layer's box loss also trains the layer before (DINO's look forward twice); needs `refine_boxes`.
        denoising: groups of guests (copies of the objects with noise) that training gives to `forward`; 0: none. Guests
            start as boxes, as queries do with `two_stage` or `mixed_queries`: it needs one of them.
        mask_look: points inside the predicted box where the vector MLP reads a map of stride 4; 0: none. The backbone
            returns C2 too, before the others.
        standardise_vectors: the vector head predicts in units of the training vectors' std.
        vector_layers: training makes mask vectors after so many of the last decoder layers; None: after all.
        mask_decoder: (D, N*N) start of a matrix that decodes mask vectors and is learnt too; None: the codec decodes.

    Raises:
        ValueError: the numbers do not fit together.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        vector_dim: int | None,
        width: int,
        heads: int,
        levels: int,
        encoder_layers: int,
        decoder_layers: int,
        encoder_points: int,
        decoder_points: int,
        feedforward: int,
        vector_hidden: int,
        queries: int,
        dropout: float,
        activation: str,
        refine_boxes: bool,
        two_stage: bool = False,
        mixed_queries: bool = False,
        look_twice: bool = False,
        denoising: int = 0,
        mask_look: int = 0,
        standardise_vectors: bool = False,
        vector_layers: int | None = None,
        mask_decoder: Tensor | None = None,
    ) -> None:
        super().__init__()
        if width % GROUPS:
            raise ValueError(f"width {width} is not a multiple of {GROUPS}, the groups of the group norm")
        for name, wanted in (("two_stage", two_stage), ("mixed_queries", mixed_queries), ("look_twice", look_twice)):
            if wanted and not refine_boxes:
                raise ValueError(f"{name} needs refine_boxes=True: it is about boxes that the layers refine")
        if two_stage and mixed_queries:
            raise ValueError("two_stage and mixed_queries both say where queries come from; leave one out")
        if denoising and not (two_stage or mixed_queries):
            raise ValueError(f"denoising {denoising} needs two_stage or mixed_queries: guests are boxes from the start")
        if mask_look and vector_dim is None:
            raise ValueError(f"mask_look {mask_look} serves mask vectors, and vector_dim is None; set mask_look to 0")
        self.refine_boxes, self.look_twice, self.num_queries = refine_boxes, look_twice, queries
        self.two_stage, self.mixed_queries, self.denoising = two_stage, mixed_queries, denoising
        self.vector_layers = vector_layers

        self.backbone = backbone
        if bool(mask_look) != (len(backbone.channels) == 4):
            raise ValueError(
                f"mask_look {mask_look} does not fit a backbone with {len(backbone.channels)} maps: a look reads C2, "
                "the first of four; without a look there are three, or C5 alone"
            )
        self.projections = _level_projections(backbone.channels[-3:], width, levels)
        # Only the encoder reads positions; without one an idle trainable tensor would stall distributed training.
        self.level_embedding = nn.Parameter(torch.randn(levels, width), requires_grad=encoder_layers > 0)
        shared: dict[str, Any] = {
            "levels": levels,
            "feedforward": feedforward,
            "dropout": dropout,
            "activation": activation,
        }
        self.encoder = nn.ModuleList(
            EncoderLayer(width, heads, points=encoder_points, **shared) for _ in range(encoder_layers)
        )
        self.decoder = nn.ModuleList(
            DecoderLayer(width, heads, points=decoder_points, **shared) for _ in range(decoder_layers)
        )
        vector = None
        if vector_dim is not None:
            vector = VectorMLP(width, vector_hidden, vector_dim, standardise=standardise_vectors)
        look = MaskLook(width, backbone.channels[0], mask_look, groups=GROUPS) if mask_look else None
        query_heads = _query_heads(UnifiedQueryHead(width, num_classes, vector, look), decoder_layers, refine_boxes)
        self.heads = nn.ModuleList(query_heads)
        if two_stage or mixed_queries:
            self.proposal_head = UnifiedQueryHead(width, num_classes, None)
            self.proposal_projection = _xavier(nn.Linear(width, width))
            self.proposal_norm = nn.LayerNorm(width)
            outputs = 2 * width if two_stage else width  # position and content, or position alone
            self.query_projection = _xavier(nn.Linear(2 * width, outputs))
            self.query_norm = nn.LayerNorm(outputs)
        self.mask_decoder = None if mask_decoder is None else nn.Parameter(mask_decoder)
        if denoising:
            self.label_embedding = nn.Embedding(num_classes, width)
        if mixed_queries:
            self.query_embedding = nn.Parameter(torch.randn(queries, width))
        elif not two_stage:
            self.query_embedding = nn.Parameter(torch.randn(queries, 2 * width))
            self.reference_points = _xavier(nn.Linear(width, 2))
            nn.init.zeros_(self.reference_points.bias)
            nn.init.constant_(query_heads[0].box.output_bias[2:], -2.0)  # first boxes are small

    def forward(self, images: ImageBatch, guests: Guests | None = None, match: Match | None = None) -> Predictions:
        """Classes, boxes and mask vectors of all queries after every decoder layer.

        Args:
            images: normalised pixels (B, 3, H, W) and their padding (B, H, W).
            guests: in training with `denoising`; they change nothing for the queries.
            match: in training, finds the queries with an object from classes and boxes; others have vectors of zero.
        """
        features = self.backbone(images.pixels)  # C3, C4, C5; C2 before them for a mask look
        memory = self.embed_levels(features[-3:], images.padding)  # C3 to C6 as one row of tokens
        for encode in self.encoder:
            memory = self.checkpoint(encode, memory)
        look = self.query_heads[0].look  # all heads share it
        view = None if look is None else look.view(features[0], memory, images.padding)
        return self.decode(memory, guests, view, match)[0]

    def decode(
        self, memory: Memory, guests: Guests | None = None, view: View | None = None, match: Match | None = None
    ) -> tuple[Predictions, Tensor]:
        """The decoder: predictions of every layer, and the queries (B, J, C) after the last."""
        queries, query_pos, reference, proposals = self.initial_queries(memory)
        queries, query_pos, reference, visible = self.seat(guests, queries, query_pos, reference)

        layers, outputs, anchor = list[LayerPrediction](), list[Tensor](), reference
        for decode, head in zip(self.decoder, self.heads, strict=True):  # H^k and its unified query head
            queries = self.checkpoint(decode, queries, query_pos, reference, memory, visible)  # (B, J, C)
            prediction = head(queries, anchor)  # logits, boxes
            layers.append(prediction)
            outputs.append(queries)
            if self.refine_boxes:
                reference = prediction.boxes.detach()
                anchor = prediction.next_anchor if self.look_twice else reference

        chosen = None if match is None else match(self.part(layers, guests, proposals))
        layers = self.add_vectors(layers, outputs, view, chosen)
        return self.part(layers, guests, proposals), queries[:, -self.num_queries :]

    def add_vectors(
        self, layers: list[LayerPrediction], outputs: list[Tensor], view: View | None, chosen: Rows | None = None
    ) -> list[LayerPrediction]:
        """The layers with their mask vectors, made at once: no layer reads another's, and all share one head for them.

        In training those without a vector loss have none. `outputs` are the queries (B, J, C) after each layer, `view`
        is what a mask look reads. All but those `chosen` by a `Match` are zero.
        """
        count = sum(head.vector is not None for head in self.query_heads)  # inference keeps the last layer's alone
        if self.training and self.vector_layers is not None:
            count = min(count, self.vector_layers)
        if not count:
            return layers
        queries = torch.cat(outputs[-count:], dim=1)
        boxes = torch.cat([layer.boxes.detach() for layer in layers[-count:]], dim=1)
        rows = None
        if chosen is not None:  # the layers stand side by side
            first = torch.arange(count, device=queries.device) * outputs[0].shape[1]
            images, order = chosen[0].repeat(count).sort(stable=True)  # a look wants an image's queries together
            rows = images, (chosen[1][-count:] + first.unsqueeze(1)).flatten()[order]

        vectors = self.query_heads[-1].vectors(queries, boxes, view, rows=rows).chunk(count, dim=1)
        made = [layer._replace(vectors=found) for layer, found in zip(layers[-count:], vectors, strict=True)]
        return layers[:-count] + made

    def embed_levels(self, features: list[Tensor], padding: Tensor) -> Memory:
        """All levels at width C, flattened into one row of tokens, with their positions.

        Args:
            features: the backbone's maps, (B, C_l, H_l, W_l) each, finest first.
            padding: (B, H, W) bool of the pixels.
        """
        maps: list[Tensor] = []
        for level, project in enumerate(self.projections):
            if level < len(features):
                maps.append(project(features[level]))
            else:  # the first extra level reads the raw C5, the next ones the level below
                maps.append(project(features[-1] if level == len(features) else maps[-1]))
        shapes = tuple((level_map.shape[-2], level_map.shape[-1]) for level_map in maps)
        paddings = padding_at(shapes, padding)

        tokens = torch.cat([level_map.flatten(2).transpose(1, 2) for level_map in maps], dim=1)  # (B, T, C)
        positions = torch.cat(
            [
                sine_encoding(level_padding, tokens.shape[-1]).flatten(1, 2).to(tokens.dtype) + embedding
                for level_padding, embedding in zip(paddings, self.level_embedding, strict=True)
            ],
            dim=1,
        )
        valid = [unpadded_sizes(level_padding).flip(-1).float() for level_padding in paddings]  # (width, height)
        sides = [side for height, width in shapes for side in (width, height)]
        level_sizes = filled(sides, dtype=torch.float32, device=tokens.device).view(-1, 2)
        return Memory(
            tokens=tokens,
            positions=positions,
            centers=torch.cat([cell_centers(shape, size) for shape, size in zip(shapes, valid, strict=True)], dim=1),
            padding=torch.cat([level_padding.flatten(1) for level_padding in paddings], dim=1),
            spatial_shapes=shapes,
            level_sizes=level_sizes,
            valid_ratios=torch.stack(valid, dim=1) / level_sizes,
        )

    def initial_queries(self, memory: Memory) -> tuple[Tensor, Tensor, Tensor, LayerPrediction | None]:
        """Inputs of the first decoder layer.

        Returns:
            queries (B, J, C), query_pos (B, J, C), reference (B, J, 2 or 4) in the normalised image, and the
            proposals of all tokens (None with learned queries).
        """
        if self.two_stage or self.mixed_queries:
            return self._queries_from_proposals(memory)
        embedding = self.query_embedding.expand(memory.tokens.shape[0], -1, -1)  # (J, 2C) -> (B, J, 2C)
        query_pos, queries = embedding.chunk(2, dim=-1)
        reference = self.reference_points(query_pos)
        exact = torch.promote_types(reference.dtype, torch.float32)  # bfloat16 boxes would be off by half a percent
        return queries, query_pos, reference.to(exact).sigmoid(), None

    def _queries_from_proposals(self, memory: Memory) -> tuple[Tensor, Tensor, Tensor, LayerPrediction]:
        """Each token proposes a box around its cell; the best J become references and queries, or their positions."""
        if memory.tokens.shape[1] < self.num_queries:
            raise ValueError(
                f"{self.num_queries} queries cannot be chosen from the {memory.tokens.shape[1]} tokens of this "
                "image; lower queries or give a larger image"
            )
        sizes = [
            memory.centers.new_full((height * width, 2), PROPOSAL_SIDE * 2.0**level)
            for level, (height, width) in enumerate(memory.spatial_shapes)
        ]
        cells = torch.cat([memory.centers, torch.cat(sizes).expand_as(memory.centers)], dim=-1)  # (B, T, 4)
        usable = ((cells > PROPOSAL_MARGIN) & (cells < 1 - PROPOSAL_MARGIN)).all(-1) & ~memory.padding
        tokens = memory.tokens.masked_fill(~usable.unsqueeze(-1), 0.0)
        proposals = self.proposal_head(self.proposal_norm(self.proposal_projection(tokens)), cells)
        proposals = proposals._replace(boxes=proposals.boxes.masked_fill(~usable.unsqueeze(-1), 1.0))

        if self.mixed_queries:
            scores = proposals.logits.amax(-1).masked_fill(~usable, -torch.inf)
        else:
            scores = proposals.logits[..., 0]  # stage one has one class, channel 0
        best = scores.topk(self.num_queries, dim=1).indices
        reference = proposals.boxes.gather(1, best.unsqueeze(-1).expand(-1, -1, 4)).detach()
        encoded = self._encode_boxes(reference, memory.tokens.dtype)
        if self.mixed_queries:
            return self.query_embedding.expand(encoded.shape[0], -1, -1), encoded, reference, proposals
        query_pos, queries = encoded.chunk(2, dim=-1)
        return queries, query_pos, reference, proposals

    def _encode_boxes(self, boxes: Tensor, dtype: torch.dtype) -> Tensor:
        """Position and content (B, J, 2C) of queries at boxes (B, J, 4); with mixed queries the position (B, J, C)."""
        encoded = sine_features(boxes, self.level_embedding.shape[1] // 2).flatten(2)  # (B, J, 4) -> (B, J, 2C)
        return self.query_norm(self.query_projection(encoded.to(dtype)))

    def seat(
        self, guests: Guests | None, queries: Tensor, query_pos: Tensor, reference: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Put guests in front of the queries; without guests everything stays as it is.

        Returns:
            queries and query_pos (B, G + J, C), reference (B, G + J, 4), and visible (B, 1, G + J, G + J) bool: guests
            attend to the queries and to the guests of their own group, queries to queries alone.
        """
        if guests is None:
            return queries, query_pos, reference, None
        (images, count), width = guests.labels.shape, queries.shape[-1]
        group = torch.arange(count, device=queries.device) // (count // guests.groups)
        visible = guests.real.new_ones(images, *[count + queries.shape[1]] * 2)
        visible[:, :count, :count] = (group[:, None] == group) & guests.real[:, None]
        visible[:, count:, :count] = False

        boxes = guests.boxes.to(reference.dtype)
        position = self._encode_boxes(boxes, queries.dtype)[..., :width]
        queries = torch.cat([self.label_embedding(guests.labels).to(queries.dtype), queries], dim=1)
        return queries, torch.cat([position, query_pos], dim=1), torch.cat([boxes, reference], dim=1), visible[:, None]

    def part(
        self, layers: list[LayerPrediction], guests: Guests | None, proposals: LayerPrediction | None
    ) -> Predictions:
        """The predictions of queries and guests, each by themselves."""
        predictions = Predictions(layers, proposals, proposals_have_classes=self.mixed_queries)
        if guests is None:
            return predictions
        count = guests.labels.shape[1]
        return predictions._replace(
            layers=[layer.queries(slice(count, None)) for layer in layers],
            guests=guests,
            guest_layers=[layer.queries(slice(count)) for layer in layers],
        )

    @property
    def query_heads(self) -> list[UnifiedQueryHead]:
        """Of the decoder layers."""
        return cast("list[UnifiedQueryHead]", list(self.heads))

    @property
    def vector_std(self) -> Tensor | None:
        """The buffer (D,) of `set_vector_statistics`; None in a model that does not standardise its vectors."""
        first = self.query_heads[0]
        return first.vector.vector_spread if first.vector is not None and first.vector.standardise else None

    def set_vector_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Set mean and std, each (D,), of the training vectors in a model built with `standardise_vectors`.

        Raises:
            ValueError: the model has no mask vectors or does not standardise them, or the lengths differ.
        """
        first = self.query_heads[0]  # all heads share one vector MLP
        if first.vector is None:
            raise ValueError("a plain detector (vector_dim=None) has no mask vectors to standardise")
        first.vector.set_statistics(mean, std)


def _level_projections(channels: tuple[int, ...], width: int, levels: int) -> nn.ModuleList:
    """1x1 convolutions of the backbone's maps and 3x3 stride-2 ones above, each with a group norm."""
    if levels < len(channels) or (len(channels) == 1) != (levels == 1):
        raise ValueError(
            f"levels {levels} does not fit a backbone with {len(channels)} maps: C5 alone makes 1 level, "
            "C3-C5 make 3 or more"
        )
    extra = [channels[-1], *[width] * levels][: levels - len(channels)]
    convolutions = [nn.Conv2d(inputs, width, kernel_size=1) for inputs in channels]
    convolutions += [nn.Conv2d(inputs, width, kernel_size=3, stride=2, padding=1) for inputs in extra]
    for convolution in convolutions:
        _xavier(convolution)
        assert convolution.bias is not None
        nn.init.zeros_(convolution.bias)
    return nn.ModuleList(nn.Sequential(convolution, nn.GroupNorm(GROUPS, width)) for convolution in convolutions)


def _query_heads(head: UnifiedQueryHead, layers: int, refine_boxes: bool) -> list[UnifiedQueryHead]:
    """One head per decoder layer: the same for all, or with refinement copies that share what makes mask vectors."""
    if not refine_boxes:
        return [head] * layers
    shared = {id(part): part for part in (head.vector, head.look)}
    return [copy.deepcopy(head, dict(shared)) for _ in range(layers)]


def _xavier(layer: Layer) -> Layer:
    nn.init.xavier_uniform_(layer.weight)
    return layer
