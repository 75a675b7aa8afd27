"""What a model may ask of a network, and nothing about how it answers.

Three kinds share the registry `net`: a denoiser's network, and the two halves of a VAE. None knows
what its output means: a parameterization, a posterior or a likelihood reads it. None mixes the
examples of a batch. A network without classes takes labels and ignores them, so that every model
can be called in one way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor, nn

from genfw.registry import Registered
from genfw.types import Labels

Features = Float[Tensor, "b ..."]
"""Whatever flows through a network: a row, or channels and an image, per example."""

Level = Float[Tensor, " b"]
"""log SNR normalized to [0, 1]: 0 is pure noise, 1 the data end."""


class Network(Registered, nn.Module, ABC, group="net"):
    """Base of all networks.

    Attributes:
        shape: of one example of the data, batch left out.
        classes: number of labels it knows, that of its model; None: it ignores them, as some
            networks of a model may. One that does not say so is not asked.
    """

    shape: tuple[int, ...]
    classes: int | None

    def __repr__(self) -> str:
        count = sum(parameter.numel() for parameter in self.parameters())
        return f"{type(self).__name__}({self.extra_repr()}, {count:,} parameters)"


class DenoisingNetwork(Network, ABC):
    """Sees a noisy z and its noise level. Its output is zero before training."""

    out_channels: int

    def extra_repr(self) -> str:
        return f"z {by(*self.shape)}, level -> {by(self.out_channels, *self.shape[1:])}"

    @abstractmethod
    def forward(self, z: Features, level: Level, y: Labels | None = None) -> Features:
        """The raw output, (b, out_channels, *dims).

        Args:
            z: (b, C, *dims).
            level: (b,) log SNR normalized to [0, 1]: 0 is pure noise, 1 the data end.
            y: (b,) labels; `classes` itself, like None, means no label.
        """


class Encoder(Network, ABC):
    """The half of a VAE that reads the data; between two levels of latents, those below."""

    latents: tuple[int, ...]

    def extra_repr(self) -> str:
        channels, *dims = self.latents
        return f"x {by(*self.shape)} -> {by(2 * channels, *dims)}"

    @abstractmethod
    def forward(self, x: Features, y: Labels | None = None) -> Features:
        """(b, *shape) to (b, 2 * latents[0], *latents[1:])."""


class Decoder(Network, ABC):
    """The half of a VAE that writes the data; between two levels, the latents below (outputs=2)."""

    latents: tuple[int, ...]
    outputs: int

    def extra_repr(self) -> str:
        channels, *dims = self.shape
        return f"z {by(*self.latents)} -> {by(self.outputs * channels, *dims)}"

    @abstractmethod
    def forward(self, z: Features, y: Labels | None = None) -> Features:
        """(b, *latents) to (b, outputs * C, *dims)."""


def by(*sizes: int) -> str:
    """(1, 8, 8) as 1x8x8."""
    return "x".join(map(str, sizes))


def fed(network: nn.Module, given: Features, expected: tuple[int, ...]) -> Features:
    """`given`, an input of `network`, of the shape it was made for.

    Raises:
        ValueError: another one.
    """
    if given.shape[1:] != expected:
        raise ValueError(
            f"{type(network).__name__} reads {by(*expected)} per example, got "
            f"{by(*given.shape[1:])}: build it for the shape of your data or, between levels, of "
            "the latents that come"
        )
    return given


def multiple(out_channels: int | None, channels: int) -> int:
    """How many outputs there are per channel of the data.

    Raises:
        ValueError: the outputs cannot be shared out evenly.
    """
    if out_channels is None:
        return 1
    if out_channels < 1 or out_channels % channels:
        raise ValueError(
            f"out_channels: expected a multiple of the {channels} channels of the data, "
            f"got {out_channels}"
        )
    return out_channels // channels
