"""Small convolutional networks: a denoiser at full resolution, and the two halves of a VAE."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from genfw.check import at_least_one, example_shape
from genfw.nets.blocks import Attention, PlainBlock, ResidualBlock, group_norm
from genfw.nets.embedding import Condition, Fourier, LabelEmbedding, Output
from genfw.nets.network import (
    Decoder,
    DenoisingNetwork,
    Encoder,
    Features,
    Level,
    fed,
    multiple,
)
from genfw.types import Labels


class Conv(DenoisingNetwork, name="conv"):
    """Residual blocks at full resolution, as VDM's network has; quick on images of 8x8 to 32x32.

    Args:
        shape: (C, H, W) of the data.
        out_channels: a multiple of C; None is C.
        classes: number of labels; None ignores labels.
        bins: K, the number of values of the data; None leaves Fourier features out.
        fourier: number of Fourier frequencies beside z (`embedding.Fourier`).
        data_std: that of `Edm`, under which the network sees z / r; None: it sees z.
        width: channels of every layer.
        blocks: residual blocks.
        attention: self-attention after the middle block.
        dropout: in every block.

    Raises:
        ValueError: a size out of range.
    """

    def __init__(
        self,
        shape: Sequence[int],
        out_channels: int | None = None,
        classes: int | None = None,
        bins: int | None = None,
        fourier: int = 3,
        data_std: float | None = None,
        width: int = 64,
        blocks: int = 4,
        attention: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.shape, self.classes = example_shape(shape, rank=3), classes
        channels = self.shape[0]
        outputs = multiple(out_channels, channels)
        self.out_channels = outputs * channels
        self.condition = Condition(width, classes)
        self.fourier = Fourier(bins, fourier, data_std)
        self.enter = nn.Conv2d(self.fourier.channels(channels), width, 3, padding=1)
        self.blocks = nn.ModuleList(
            ResidualBlock(width, width, width, dropout)
            for _ in range(at_least_one("blocks", blocks))
        )
        self.attention = Attention(width) if attention else nn.Identity()
        self.leave = nn.Sequential(group_norm(width), nn.SiLU())
        self.output = Output(nn.Conv2d(width, self.out_channels, 3, padding=1), width, outputs)

    def forward(self, z: Features, level: Level, y: Labels | None = None) -> Features:
        condition = self.condition(level, y)
        h = self.enter(self.fourier(z, level))
        for i, block in enumerate(self.blocks):
            h = block(h, condition)
            if i == len(self.blocks) // 2:
                h = self.attention(h)
        return self.output(self.leave(h), z, condition)


class ConvEncoder(Encoder, name="conv_encoder"):
    """A residual block per resolution, halved in between, then one linear layer.

    Args:
        shape: (C, H, W) of the data, or of the latents of the level below.
        latents: size of z, or its shape (channels first).
        classes: number of labels; None ignores labels.
        channels: of each resolution, from the finest.
        dropout: in every block.

    Raises:
        ValueError: a size out of range, or more resolutions than the image can be halved.
    """

    def __init__(
        self,
        shape: Sequence[int],
        latents: int | Sequence[int],
        classes: int | None = None,
        channels: Sequence[int] = (32, 64),
        dropout: float = 0.0,
    ):
        super().__init__()
        self.shape, self.latents = example_shape(shape, 3), example_shape(latents, name="latents")
        self.classes = classes
        sizes = halvings(self.shape, [at_least_one("channels", each) for each in channels])
        self.label = None if classes is None else LabelEmbedding(classes, channels[-1])
        self.enter = nn.Conv2d(self.shape[0], channels[0], 3, padding=1)
        layers: list[nn.Module] = [PlainBlock(channels[0], dropout)]
        for fine, coarse in pairwise(channels):
            layers += [nn.Conv2d(fine, coarse, 3, stride=2, padding=1)]
            layers += [PlainBlock(coarse, dropout)]
        self.layers = nn.Sequential(*layers)
        self.leave = nn.Sequential(group_norm(channels[-1]), nn.SiLU(), nn.Flatten())
        size = 2 * math.prod(self.latents)
        self.output = nn.Linear(channels[-1] * math.prod(sizes[-1]), size)

    def forward(self, x: Features, y: Labels | None = None) -> Features:
        h = self.layers(self.enter(fed(self, x, self.shape)))
        if self.label is not None:
            h = h + self.label(y, len(x))[..., None, None]
        out = self.output(self.leave(h))
        return out.reshape(len(x), 2 * self.latents[0], *self.latents[1:])


class ConvDecoder(Decoder, name="conv_decoder"):
    """`ConvEncoder` backwards: a linear layer, a residual block per resolution, doubled between.

    Args:
        shape: (C, H, W) of the data, or of the latents of the level below.
        latents: size of z, or its shape (channels first).
        outputs: numbers per channel of the data that the likelihood reads: K for categorical,
            1 for Bernoulli, 2 for a Gaussian and for latents (mean, log std).
        classes: number of labels; None ignores labels.
        channels: of each resolution, from the finest.
        dropout: in every block.

    Raises:
        ValueError: a size out of range, or more resolutions than the image can be halved.
    """

    def __init__(
        self,
        shape: Sequence[int],
        latents: int | Sequence[int],
        outputs: int,
        classes: int | None = None,
        channels: Sequence[int] = (32, 64),
        dropout: float = 0.0,
    ):
        super().__init__()
        self.shape, self.latents = example_shape(shape, 3), example_shape(latents, name="latents")
        self.classes = classes
        self.outputs = outputs
        sizes = halvings(self.shape, [at_least_one("channels", each) for each in channels])
        size = math.prod(self.latents)
        self.label = None if classes is None else LabelEmbedding(classes, size)
        self.enter = nn.Linear(size, channels[-1] * math.prod(sizes[-1]))
        layers: list[nn.Module] = [nn.Unflatten(1, (channels[-1], *sizes[-1]))]
        layers += [PlainBlock(channels[-1], dropout)]
        finer = zip(channels[-2::-1], channels[:0:-1], sizes[-2::-1])
        for fine, coarse, size in finer:
            layers += [nn.Upsample(size), nn.Conv2d(coarse, fine, 3, padding=1)]
            layers += [PlainBlock(fine, dropout)]
        layers += [group_norm(channels[0]), nn.SiLU()]
        self.layers = nn.Sequential(*layers)
        self.output = nn.Conv2d(channels[0], outputs * self.shape[0], 3, padding=1)

    def forward(self, z: Features, y: Labels | None = None) -> Features:
        h = fed(self, z, self.latents).flatten(1)
        if self.label is not None:
            h = h + self.label(y, len(z))
        return self.output(self.layers(self.enter(h)))


def halvings(
    shape: tuple[int, ...], resolutions: Sequence[int], name: str = "channels"
) -> list[tuple[int, int]]:
    """The image's size at each resolution, odd sizes rounded up.

    Args:
        shape: (C, H, W).
        resolutions: something for each; only their number counts.
        name: of the argument that gave them.

    Raises:
        ValueError: no resolution, or more than the image can be halved.

    Example:
        >>> halvings((1, 28, 28), [32, 64, 64])
        [(28, 28), (14, 14), (7, 7)]
    """
    n = len(resolutions)
    if n == 0 or min(shape[1:]) <= 2 ** (n - 1) // 2:
        raise ValueError(
            f"{name}: {n} resolutions do not fit an image of {shape[1]}x{shape[2]}: sides are "
            "halved between them, give fewer"
        )
    return [(math.ceil(shape[1] / 2**i), math.ceil(shape[2] / 2**i)) for i in range(n)]
