r"""The network of a top-down hierarchy: a deterministic way up, a shared way down.

    up     h = blocks(x), halved between resolutions; what each resolution sees, e_r, is kept
    down   h = a learned constant, at the coarsest resolution; then block by block, finer and finer
               prior(h)           -> mean, log std of p(z | all z above); and a step for h
               posterior(h, e_r)  -> how q(z | all z above, x) differs from it
               h <- h + step + project(z);  h <- residual(h)

A z is reached from the data and from the output by additions only (skip connections), so that depth
costs little to train: the last convolution of every residual block and every projection of z start
at 1/sqrt(N) of their usual size, N blocks in all on the way up or down, which keeps the variance of
h at any depth. The last layers of priors and posteriors start at zero: p = N(0, I) at first, and
q = p.

References:
    Very Deep VAEs Generalize Autoregressive Models and Can Outperform Them on Images, Child, 2020,
        https://arxiv.org/abs/2011.10650;
    Ladder Variational Autoencoders, Soenderby et al., 2016, https://arxiv.org/abs/1602.02282.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from genfw.check import at_least, at_least_one, example_shape
from genfw.nets.blocks import PlainBlock, group_norm
from genfw.nets.conv import halvings
from genfw.nets.embedding import LabelEmbedding
from genfw.nets.network import Features, by, fed
from genfw.types import Labels


class Ladder(nn.Module):
    """A convolutional way up and down.

    Args:
        shape: (C, H, W) of the data.
        outputs: numbers per channel of the data that the likelihood reads: K for categorical,
            1 for Bernoulli, 2 for a Gaussian.
        classes: number of labels; None ignores labels.
        width: channels of every layer.
        latents: channels of every z.
        blocks: how many z at each resolution, from the finest, each half as large as the one
            before; 0 leaves a resolution without.
        encoder_blocks: residual blocks on the way up, per resolution.
        dropout: in every residual block.

    Attributes:
        shapes: of z_1 .. z_T; z_1 is the finest, drawn last.

    Raises:
        ValueError: a size out of range, no z at all, or more resolutions than the image can be
            halved.
    """

    def __init__(
        self,
        shape: Sequence[int],
        outputs: int,
        classes: int | None = None,
        width: int = 32,
        latents: int = 4,
        blocks: Sequence[int] = (2, 2, 1),
        encoder_blocks: int = 1,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.shape, self.outputs, self.classes = example_shape(shape, 3), outputs, classes
        for name, value in (("width", width), ("latents", latents)):
            at_least_one(name, value)
        at_least(0, "encoder_blocks", encoder_blocks)
        if min([0, *blocks]) < 0 or sum(blocks) < 1:
            raise ValueError(
                f"blocks: expected the number of z at each resolution, at least one in all, "
                f"got {list(blocks)}"
            )
        sizes = halvings(self.shape, blocks, "blocks")
        self.shapes = tuple(
            (latents, *size)
            for size, count in zip(sizes, blocks, strict=True)
            for _ in range(count)
        )
        self.enter = nn.Conv2d(self.shape[0], width, 3, padding=1)
        self.up = nn.ModuleList(
            nn.Sequential(
                nn.Identity() if i == 0 else nn.Conv2d(width, width, 3, stride=2, padding=1),
                *(PlainBlock(width, dropout) for _ in range(encoder_blocks)),
            )
            for i in range(len(blocks))
        )
        for block in (each for each in self.up.modules() if isinstance(each, PlainBlock)):
            begin_at(block.layers[-1], (len(blocks) * encoder_blocks) ** -0.5)
        self.label = None if classes is None else LabelEmbedding(classes, width)
        self.starts = nn.ParameterList(torch.zeros(width, *size) for size in sizes)
        self.counts = tuple(blocks)
        self.down = nn.ModuleList(
            TopDownBlock(width, latents, sum(blocks), dropout) for _ in self.shapes
        )
        self.leave = nn.Sequential(
            group_norm(width), nn.SiLU(), nn.Conv2d(width, outputs * self.shape[0], 3, padding=1)
        )

    def read(self, x: Features, y: Labels | None = None) -> list[Features]:
        """What a posterior is told of x at each resolution, from the finest, (b, width, h, w)
        each."""
        h = self.enter(fed(self, x, self.shape))
        if self.label is not None:
            h = h + self.label(y, len(x))[..., None, None]
        seen = []
        for layers in self.up:
            h = layers(h)
            seen.append(h)
        return seen

    def forward(
        self,
        draw: Callable[[Tensor, Tensor | None], Tensor],
        n: int,
        y: Labels | None = None,
        seen: Sequence[Features] | None = None,
    ) -> Features:
        """All the way down, (n, outputs * C, H, W).

        Args:
            draw: (prior (n, 2 * latents, h, w), posterior of the same shape, or None) -> z, called
                for z_T first and z_1 last. The prior is mean and log std, the posterior their
                changes.
            n: examples.
            y: (n,) labels.
            seen: what `read` made of x; None where there is no x: no posterior.
        """
        h = torch.zeros_like(self.starts[-1]).expand(n, *self.starts[-1].shape)
        if self.label is not None:
            h = h + self.label(y, n)[..., None, None]
        blocks = iter(self.down)
        for r in reversed(range(len(self.counts))):
            start = self.starts[r]
            h = nn.functional.interpolate(h, size=start.shape[1:], mode="nearest") + start
            for block in itertools.islice(blocks, self.counts[r]):
                h = block(h, draw, None if seen is None else seen[r])
        return self.leave(h)

    def extra_repr(self) -> str:
        chain = ", ".join(f"z_{t} {by(*shape)}" for t, shape in enumerate(self.shapes, 1))
        return f"{chain} -> {by(self.outputs * self.shape[0], *self.shape[1:])}"


class TopDownBlock(nn.Module):
    """One z on the way down, (b, width, h, w) to the same.

    Args:
        width: channels of h.
        latents: channels of z.
        depth: N, how many such blocks there are.
        dropout: in the residual block.
    """

    def __init__(self, width: int, latents: int, depth: int, dropout: float):
        super().__init__()
        self.prior = Head(width, width, 2 * latents + width)
        self.posterior = Head(2 * width, width, 2 * latents)
        self.project = nn.Conv2d(latents, width, 1)
        self.residual = PlainBlock(width, dropout)
        self.sizes = (2 * latents, width)
        for layer in (self.residual.layers[-1], self.project):
            begin_at(layer, depth**-0.5)
        for head in (self.prior, self.posterior):
            begin_at(head.last, 0.0)

    def forward(
        self,
        h: Features,
        draw: Callable[[Tensor, Tensor | None], Tensor],
        seen: Features | None,
    ) -> Features:
        prior, step = self.prior(h).split(self.sizes, dim=1)
        posterior = None if seen is None else self.posterior(torch.cat([h, seen], dim=1))
        return self.residual(h + step + self.project(draw(prior, posterior)))


class Head(nn.Module):
    """One hidden layer, (b, channels, h, w) to (b, out_channels, h, w)."""

    def __init__(self, channels: int, width: int, out_channels: int):
        super().__init__()
        self.norm1 = group_norm(channels)
        self.conv = nn.Conv2d(channels, width, 3, padding=1)
        self.norm2 = group_norm(width)
        self.last = nn.Conv2d(width, out_channels, 1)

    def forward(self, h: Features) -> Features:
        h = self.conv(nn.functional.silu(self.norm1(h)))
        return self.last(nn.functional.silu(self.norm2(h)))


@torch.no_grad()
def begin_at(layer: nn.Module, part: float) -> None:
    """Multiplies its weights and biases by `part`."""
    for parameter in layer.parameters():
        parameter *= part
