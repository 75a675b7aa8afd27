"""What the convolutional networks are built of."""

from __future__ import annotations

import math

from torch import nn

from genfw.nets.network import Features


class ResidualBlock(nn.Module):
    """h + conv(dropout(silu(FiLM(norm(conv(silu(norm(h)))))))), FiLM by the condition.

    FiLM is a scale and a shift per channel (Perez et al., 2018, https://arxiv.org/abs/1709.07871).

    Args:
        channels, out_channels: in and out; where they differ a 1x1 convolution carries h over.
        width: of the condition.
        dropout: share of the activations set to zero in training.
    """

    def __init__(self, channels: int, out_channels: int, width: int, dropout: float = 0.0):
        super().__init__()
        self.norm1 = group_norm(channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.film = nn.Linear(width, 2 * out_channels)
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, h: Features, condition: Features) -> Features:
        """(b, channels, H, W) and (b, width) to (b, out_channels, H, W)."""
        film = self.film(nn.functional.silu(condition))[..., None, None]
        scale, shift = film.chunk(2, dim=1)
        out = self.norm2(self.conv1(nn.functional.silu(self.norm1(h)))) * (1 + scale) + shift
        return self.skip(h) + self.conv2(self.dropout(nn.functional.silu(out)))


class PlainBlock(nn.Module):
    """`ResidualBlock` without a condition, (b, channels, H, W) to the same."""

    def __init__(self, channels: int, dropout: float = 0.0):
        super().__init__()
        self.layers = nn.Sequential(
            group_norm(channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            group_norm(channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, h: Features) -> Features:
        return h + self.layers(h)


class Attention(nn.Module):
    """h + self-attention over the positions of the image, (b, channels, H, W) to the same.

    Args:
        heads: a divisor of `channels`.

    Raises:
        ValueError: it does not divide the channels.
    """

    def __init__(self, channels: int, heads: int = 1):
        super().__init__()
        if heads < 1 or channels % heads:
            raise ValueError(f"heads: expected a divisor of {channels} channels, got {heads}")
        self.heads = heads
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, h: Features) -> Features:
        qkv = self.qkv(self.norm(h)).flatten(2).unflatten(1, (3, self.heads, -1))
        q, k, v = qkv.transpose(-1, -2).unbind(1)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        return h + self.out(attended.transpose(-1, -2).reshape(h.shape))


def group_norm(channels: int) -> nn.GroupNorm:
    """Groups of at least 8 channels, 32 groups at most."""
    groups = (
        math.gcd(channels, 32) if channels >= 256 else math.gcd(channels, max(channels // 8, 1))
    )
    return nn.GroupNorm(groups, channels)
