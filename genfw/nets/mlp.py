"""Fully connected networks: a denoiser for data of any shape, and the two halves of a VAE."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from genfw.check import at_least_one, example_shape
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

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "tanh": nn.Tanh,
}


class MLP(DenoisingNetwork, name="mlp"):
    """Residual blocks on the flattened data, the level added in each.

    Args:
        shape: (D,) or (C, *dims) of the data.
        out_channels: a multiple of the first entry of `shape`; None is that entry.
        classes: number of labels; None ignores labels.
        bins: K, the number of values of the data; None leaves Fourier features out.
        fourier: number of Fourier frequencies beside z (`embedding.Fourier`).
        data_std: that of `Edm`, under which the network sees z / r; None: it sees z.
        width: of every layer.
        blocks: residual blocks.
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
        width: int = 256,
        blocks: int = 3,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.shape, self.classes = example_shape(shape), classes
        channels, dims = self.shape[0], math.prod(self.shape[1:])
        outputs = multiple(out_channels, channels)
        self.out_channels = outputs * channels
        self.condition = Condition(width, classes)
        self.fourier = Fourier(bins, fourier, data_std)
        self.enter = nn.Linear(self.fourier.channels(channels) * dims, width)
        self.blocks = nn.ModuleList(
            Block(width, dropout) for _ in range(at_least_one("blocks", blocks))
        )
        self.leave = nn.Sequential(nn.LayerNorm(width), nn.SiLU())
        self.output = Output(nn.Linear(width, self.out_channels * dims), width, outputs)

    def forward(self, z: Features, level: Level, y: Labels | None = None) -> Features:
        condition = self.condition(level, y)
        h = self.enter(self.fourier(z, level).flatten(1))
        for block in self.blocks:
            h = block(h, condition)
        return self.output(self.leave(h), z, condition)


class Block(nn.Module):
    """h + linear(dropout(silu(FiLM(linear(silu(norm(h))))))), (b, width) to the same."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, width)
        self.film = nn.Linear(width, 2 * width)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(width, width)

    def forward(self, h: Features, condition: Features) -> Features:
        scale, shift = self.film(nn.functional.silu(condition)).chunk(2, dim=1)
        out = self.linear1(nn.functional.silu(self.norm(h))) * (1 + scale) + shift
        return h + self.linear2(self.dropout(nn.functional.silu(out)))


class MLPEncoder(Encoder, name="mlp_encoder"):
    """Linear layers with activations between, (b, *shape) to (b, 2 * latents).

    Args:
        shape: of the data, or of the latents of the level below.
        latents: size of z, or its shape (channels first).
        classes: number of labels; None ignores labels.
        hidden: widths of the layers between.
        activation: one of silu, gelu, relu, leaky_relu, elu, tanh.
        dropout: after every activation.

    Raises:
        ValueError: a size out of range, an unknown activation.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        latents: int | Sequence[int],
        classes: int | None = None,
        hidden: Sequence[int] = (256, 256),
        activation: str = "silu",
        dropout: float = 0.0,
    ):
        super().__init__()
        self.shape, self.latents = example_shape(shape), example_shape(latents, name="latents")
        self.classes = classes
        dims = math.prod(self.shape)
        self.label = None if classes is None else LabelEmbedding(classes, dims)
        self.layers = layers([dims, *hidden, 2 * math.prod(self.latents)], activation, dropout)

    def forward(self, x: Features, y: Labels | None = None) -> Features:
        h = fed(self, x, self.shape).flatten(1)
        out = self.layers(h if self.label is None else h + self.label(y, len(x)))
        return out.reshape(len(x), 2 * self.latents[0], *self.latents[1:])


class MLPDecoder(Decoder, name="mlp_decoder"):
    """Linear layers with activations between, (b, latents) to (b, outputs * C, *dims).

    Args:
        shape: (C, *dims) of the data, or of the latents of the level below.
        latents: size of z, or its shape (channels first).
        outputs: numbers per channel of the data that the likelihood reads: K for categorical,
            1 for Bernoulli, 2 for a Gaussian and for latents (mean, log std).
        classes: number of labels; None ignores labels.
        hidden: widths of the layers between.
        activation: one of silu, gelu, relu, leaky_relu, elu, tanh.
        dropout: after every activation.
        output_bias: where the bias of the last layer starts (`start_at`).

    Raises:
        ValueError: a size out of range, an unknown activation.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        latents: int | Sequence[int],
        outputs: int,
        classes: int | None = None,
        hidden: Sequence[int] = (256, 256),
        activation: str = "silu",
        dropout: float = 0.0,
        output_bias: float | Sequence[float] | None = None,
    ):
        super().__init__()
        self.shape, self.latents = example_shape(shape), example_shape(latents, name="latents")
        self.classes = classes
        self.outputs = outputs
        size, dims = math.prod(self.latents), outputs * math.prod(self.shape)
        self.label = None if classes is None else LabelEmbedding(classes, size)
        self.layers = layers([size, *hidden, dims], activation, dropout)
        if output_bias is not None:
            self.start_at(torch.as_tensor(output_bias))

    def start_at(self, bias: torch.Tensor) -> None:
        """Sets the bias of the last layer: the output before anything is learned of z. For
        Bernoulli the logits of the mean image spare the first steps.

        Args:
            bias: one number, or the outputs in the order of the output, (outputs * C, *dims).

        Raises:
            ValueError: another number of them.
        """
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        if bias.numel() not in (1, last.bias.numel()):
            raise ValueError(
                f"output_bias: expected 1 number or {last.bias.numel()}, got {bias.numel()}"
            )
        with torch.no_grad():
            last.bias.copy_(bias.flatten().to(last.bias))

    def forward(self, z: Features, y: Labels | None = None) -> Features:
        h = fed(self, z, self.latents).flatten(1)
        out = self.layers(h if self.label is None else h + self.label(y, len(z)))
        return out.reshape(len(z), self.outputs * self.shape[0], *self.shape[1:])


def layers(widths: Sequence[int], activation: str, dropout: float) -> nn.Sequential:
    """Linear layers of these widths, activation and dropout between them.

    Raises:
        ValueError: a width below 1, or an unknown activation.
    """
    if min(widths) < 1:
        raise ValueError(f"widths of the layers: expected positive numbers, got {list(widths)}")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}"
        )
    stack: list[nn.Module] = []
    for before, after in pairwise(widths):
        stack += [nn.Linear(before, after), ACTIVATIONS[activation](), nn.Dropout(dropout)]
    return nn.Sequential(*stack[:-2])
