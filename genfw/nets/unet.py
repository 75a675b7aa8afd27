"""The U-Net of denoising diffusion: down through coarser images and up again, nothing forgotten.

References:
    Denoising Diffusion Probabilistic Models, Ho, Jain, Abbeel, 2020, https://arxiv.org/abs/2006.11239
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from genfw.check import at_least, at_least_one, example_shape
from genfw.nets.blocks import Attention, ResidualBlock, group_norm
from genfw.nets.embedding import Condition, Fourier, Output
from genfw.nets.network import DenoisingNetwork, Features, Level, multiple
from genfw.types import Labels


class UNet(DenoisingNetwork, name="unet"):
    """Residual blocks on a pyramid of resolutions, each half the one before.

    Args:
        shape: (C, H, W) of the data; H and W are divisible by 2^(len(multipliers) - 1).
        out_channels: a multiple of C; None is C.
        classes: number of labels; None ignores labels.
        bins: K, the number of values of the data; None leaves Fourier features out.
        fourier: number of Fourier frequencies beside z (`embedding.Fourier`).
        data_std: that of `Edm`, under which the network sees z / r; None: it sees z.
        width: channels at full resolution.
        multipliers: of `width` at each resolution, from the finest. (1,) keeps full resolution,
            as VDM does.
        blocks: residual blocks per resolution on the way down; one more on the way up.
        attention: self-attention where the image is at most this high and wide; 0 for nowhere
            but the middle.
        heads: of the attention.
        dropout: in every block.

    Raises:
        ValueError: a size out of range, an image that cannot be halved so often.
    """

    def __init__(
        self,
        shape: Sequence[int],
        out_channels: int | None = None,
        classes: int | None = None,
        bins: int | None = None,
        fourier: int = 3,
        data_std: float | None = None,
        width: int = 32,
        multipliers: Sequence[int] = (1, 2, 2),
        blocks: int = 1,
        attention: int = 0,
        heads: int = 1,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.shape, self.classes = example_shape(shape, rank=3), classes
        channels, height, wide = self.shape
        for name, value in (("width", width), ("blocks", blocks), ("heads", heads)):
            at_least_one(name, value)
        for multiplier in multipliers:
            at_least_one("multipliers", multiplier)
        at_least(0, "attention", attention)
        factor = 2 ** (len(multipliers) - 1)
        if not multipliers or height % factor or wide % factor:
            raise ValueError(
                f"multipliers: {len(multipliers)} resolutions need an image divisible by "
                f"{factor:g}, got {height}x{wide}; take fewer, or net=conv for any size"
            )
        outputs = multiple(out_channels, channels)
        self.out_channels = outputs * channels
        condition = 4 * width
        self.condition = Condition(condition, classes)
        self.fourier = Fourier(bins, fourier, data_std)

        def stage(c_in: int, c_out: int, depth: int) -> Stage:
            attends = max(height, wide) >> depth <= attention
            return Stage(c_in, c_out, condition, dropout, heads if attends else 0)

        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        self.enter = nn.Conv2d(self.fourier.channels(channels), width, 3, padding=1)
        c, kept = width, [width]
        for depth, multiplier in enumerate(multipliers):
            if depth:
                self.down.append(Halve(c))
                kept.append(c)
            for _ in range(blocks):
                self.down.append(stage(c, width * multiplier, depth))
                c = width * multiplier
                kept.append(c)
        self.middle = nn.ModuleList(
            [Stage(c, c, condition, dropout, heads), Stage(c, c, condition, dropout, 0)]
        )
        for depth, multiplier in reversed(list(enumerate(multipliers))):
            for _ in range(blocks + 1):
                self.up.append(stage(c + kept.pop(), width * multiplier, depth))
                c = width * multiplier
            if depth:
                self.up.append(Double(c))
        self.leave = nn.Sequential(group_norm(c), nn.SiLU())
        self.output = Output(nn.Conv2d(c, self.out_channels, 3, padding=1), condition, outputs)

    def forward(self, z: Features, level: Level, y: Labels | None = None) -> Features:
        condition = self.condition(level, y)
        h = self.enter(self.fourier(z, level))
        kept = [h]
        for layer in self.down:
            h = layer(h, condition)
            kept.append(h)
        for layer in self.middle:
            h = layer(h, condition)
        for layer in self.up:
            if isinstance(layer, Stage):
                h = torch.cat([h, kept.pop()], dim=1)
            h = layer(h, condition)
        return self.output(self.leave(h), z, condition)


class Stage(nn.Module):
    """A residual block, followed by attention where heads > 0."""

    def __init__(self, channels: int, out_channels: int, width: int, dropout: float, heads: int):
        super().__init__()
        self.block = ResidualBlock(channels, out_channels, width, dropout)
        self.attention = Attention(out_channels, heads) if heads else nn.Identity()

    def forward(self, h: Features, condition: Features) -> Features:
        return self.attention(self.block(h, condition))


class Halve(nn.Module):
    """(b, channels, H, W) to (b, channels, H / 2, W / 2)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, h: Features, condition: Features) -> Features:
        return self.conv(h)


class Double(nn.Module):
    """(b, channels, H, W) to (b, channels, 2 H, 2 W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, h: Features, condition: Features) -> Features:
        return self.conv(nn.functional.interpolate(h, scale_factor=2.0))
