"""One encoder layer: every token attends to points around itself on all levels. Paper: section 3.1, fig. 1(b)."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from solq_lab.models.attention import Memory, MultiScaleDeformableAttention

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


class FeedForward(nn.Module):
    """Two linear layers per token with a residual connection and a layer norm.

    `hidden` features lie between the two; training drops a share `dropout` of the features after each.
    """

    def __init__(self, width: int, hidden: int, dropout: float, activation: str) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation {activation!r} is unknown; allowed are {', '.join(ACTIVATIONS)}")
        self.activate = ACTIVATIONS[activation]
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        changed = self.linear2(self.dropout(self.activate(self.linear1(tokens))))
        return self.norm(tokens + self.dropout(changed))


class EncoderLayer(nn.Module):
    """Deformable self-attention of the tokens, then a feed-forward block; both normalise after adding.

    Args: as `DecoderLayer`'s.
    """

    def __init__(
        self, width: int, heads: int, *, levels: int, points: int, feedforward: int, dropout: float, activation: str
    ) -> None:
        super().__init__()
        self.attention = MultiScaleDeformableAttention(width, heads, levels, points)
        self.attention_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.feedforward = FeedForward(width, feedforward, dropout, activation)

    def forward(self, memory: Memory) -> Memory:
        """The memory with refined tokens."""
        reference = memory.to_levels(memory.centers)
        attended = self.attention(memory.tokens + memory.positions, reference, memory)
        tokens = self.attention_norm(memory.tokens + self.dropout(attended))
        return Memory(self.feedforward(tokens), *memory[1:])  # torch 2.11 compiles _replace to an empty tuple
