"""One decoder layer, H^k: queries attend to each other, then to the memory. Paper: section 3.1, fig. 1(b)."""

from torch import Tensor, nn

from solq_lab.models.attention import Memory, MultiScaleDeformableAttention, SelfAttention
from solq_lab.models.encoder import FeedForward


class DecoderLayer(nn.Module):
    """Self-attention among queries, deformable cross-attention, feed-forward; each normalises after adding.

    Args:
        width: C.
        heads: M.
        levels: L.
        points: P per head and level.
        feedforward: hidden features of the feed-forward block.
        dropout: share of features and of self-attention weights that training drops.
        activation: "relu", "gelu" or "silu".
    """

    def __init__(
        self, width: int, heads: int, *, levels: int, points: int, feedforward: int, dropout: float, activation: str
    ) -> None:
        super().__init__()
        self.self_attention = SelfAttention(width, heads, dropout)
        self.self_norm = nn.LayerNorm(width)
        self.cross_attention = MultiScaleDeformableAttention(width, heads, levels, points)
        self.cross_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.feedforward = FeedForward(width, feedforward, dropout, activation)

    def forward(
        self, queries: Tensor, query_pos: Tensor, reference: Tensor, memory: Memory, visible: Tensor | None = None
    ) -> Tensor:
        """The queries (B, J, C) after this layer.

        Args:
            queries: (B, J, C) content.
            query_pos: (B, J, C) position, added to queries and keys.
            reference: (B, J, 2) points or (B, J, 4) boxes (cx, cy, w, h), normalised image.
            memory: the encoder's tokens.
            visible: (B, 1, J, J) bool, which queries each attends to; None: all.
        """
        queries = self.self_norm(queries + self.dropout(self.self_attention(queries, query_pos, visible)))
        attended = self.cross_attention(queries + query_pos, memory.to_levels(reference), memory)
        queries = self.cross_norm(queries + self.dropout(attended))
        return self.feedforward(queries)
