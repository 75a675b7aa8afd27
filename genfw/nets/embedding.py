r"""What a denoiser is told beside z: its noise level, its label, the fine structure of the data.

Levels are log SNR normalized to [0, 1]. Discrete data leave a comb in z near the data end, with
teeth one bin apart, which Fourier features of those periods show to a network (VDM, 2021).
In noisier z the same features are pure noise, so each fades where the noise covers its period.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from genfw.check import at_least_one
from genfw.nets.network import Features, Level
from genfw.types import Labels
from genfw.values import check_labels


def sinusoidal(level: Level, width: int) -> Features:
    r"""sin and cos of 1000 level at `width` / 2 frequencies each from 1 to 1/10000, (b, width).

    .. math:: \omega_i = 10000^{-i / (n - 1)}, \quad i = 0 \ldots n - 1, \; n = \text{width} / 2

    References:
        Denoising Diffusion Probabilistic Models, Ho, Jain, Abbeel, 2020, https://arxiv.org/abs/2006.11239
    """
    n = width // 2
    frequency = torch.logspace(0, -4, n, dtype=level.dtype, device=level.device)
    angle = 1000 * level[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class Condition(nn.Module):
    """The level and, where there are classes, the label as one vector: (b,) and (b,) to (b, width).

    Args:
        width: an even number.
        classes: None ignores labels; label `classes` stands for none.

    Raises:
        ValueError: `width` is odd or below 4, or `classes` is below 1.
    """

    def __init__(self, width: int, classes: int | None = None):
        super().__init__()
        if width < 4 or width % 2:
            raise ValueError(
                f"width of the level embedding: expected an even number >= 4, got {width}"
            )
        self.width = width
        self.linear1 = nn.Linear(width, width)
        self.linear2 = nn.Linear(width, width)
        self.label = None if classes is None else LabelEmbedding(classes, width)

    def forward(self, level: Level, y: Labels | None = None) -> Features:
        features = sinusoidal(level, self.width).to(self.linear1.weight.dtype)
        embedding = self.linear2(nn.functional.silu(self.linear1(features)))
        return embedding if self.label is None else embedding + self.label(y, len(level))


class LabelEmbedding(nn.Module):
    """A vector per class, and one more for "no label": (b,) or None to (b, width)."""

    def __init__(self, classes: int, width: int):
        super().__init__()
        vectors = torch.randn(at_least_one("classes", classes) + 1, width)
        self.vectors = nn.Parameter(vectors * width**-0.5)

    def forward(self, y: Labels | None, size: int) -> Features:
        """The vectors of `size` examples, (size, width).

        Raises:
            TypeError: labels that are no integers.
            ValueError: not one for each of `size` examples, or outside 0..classes.
        """
        if y is None:
            return self.vectors[-1].expand(size, -1)
        if y.is_floating_point() or y.dtype == torch.bool:
            raise TypeError(f"labels: expected integers, got {y.dtype}")
        if y.shape != (size,):
            raise ValueError(f"labels: expected one for each of {size} examples, got {(*y.shape,)}")
        check_labels(y, len(self.vectors) - 1)
        return self.vectors[y.long()]  # bytes would be read as a mask


class Fourier(nn.Module):
    r"""z with sines and cosines of periods 1, 2, 4, ... bins beside it, each faded by the noise.

    .. math:: e^{-(\omega_n \sigma)^2 / 2} \, \{\sin, \cos\}(\omega_n z),
        \quad \omega_n = \pi K 2^{-n}, \; n = 0 \ldots \text{count} - 1

    The factor is E[sin(omega z) | x] / sin(omega alpha x): the share of the signal that the noise
    leaves. A bin is 2 / K wide. For K = 256 and count = 2 the frequencies are VDM's.

    Args:
        bins: K, the number of values of the data; None passes z on alone.
        count: number of frequencies; 0 passes z on alone.
        data_std: s_d where what comes is z / r, r^2 = sigma^2 + alpha^2 s_d^2 (param `edm`): the
            features are those of z all the same, or they would have periods of s_d bins.
        log_snr_min, log_snr_max: what levels 0 and 1 stand for; by default the end points of the
            schedules here, -10 and 2 log(3.02 K). Being a little off moves the fading, no more.

    Raises:
        ValueError: `bins` is below 2 or `count` below 0.

    References:
        Variational Diffusion Models, Kingma, Salimans, Poole, Ho, 2021, https://arxiv.org/abs/2107.00630
    """

    def __init__(
        self,
        bins: int | None,
        count: int,
        data_std: float | None = None,
        *,
        log_snr_min: float = -10.0,
        log_snr_max: float | None = None,
    ):
        super().__init__()
        if count < 0:
            raise ValueError(f"fourier: expected a number of frequencies >= 0, got {count}")
        if bins is not None and bins < 2:
            raise ValueError(f"bins: expected at least 2 values, got {bins}")
        bins, count = (1, 0) if bins is None else (bins, count)
        self.bins, self.count, self.data_std = bins, count, data_std
        self.frequencies = [math.pi * bins * 2.0**-n for n in range(count)]
        self.log_snr_min = log_snr_min
        self.log_snr_max = 2 * math.log(3.02 * bins) if log_snr_max is None else log_snr_max

    def channels(self, channels: int) -> int:
        """How many come out for `channels` of z."""
        return channels * (1 + 2 * self.count)

    def forward(self, z: Features, level: Level) -> Features:
        """(b, C, *dims) and (b,) to (b, C * (1 + 2 count), *dims)."""
        if not self.count:
            return z
        log_snr = self.log_snr_min + (self.log_snr_max - self.log_snr_min) * level
        variance = _behind(torch.sigmoid(-log_snr), z.ndim - 1)
        features, teeth = [z], z
        if self.data_std is not None:
            teeth = z * (variance + (1 - variance) * self.data_std**2).sqrt().to(z.dtype)
        for omega in self.frequencies:
            left = torch.exp(-0.5 * omega**2 * variance).to(z.dtype)
            features += [left * torch.sin(omega * teeth), left * torch.cos(omega * teeth)]
        return torch.cat(features, dim=1)

    def extra_repr(self) -> str:
        periods = ", ".join(str(2**n) for n in range(self.count))
        return f"periods of {periods} bins, {self.bins} bins" if self.count else "none"


class Output(nn.Module):
    """The last step of a denoiser: raw output + gain(level) z, both zero before training.

    The gain is what a linear denoiser would do, and it passes z on at its true scale, which
    normalization inside the network loses: near pure noise eps is z itself.

    Args:
        layer: the last layer; its weights are set to zero.
        width: of the condition.
        multiple: outputs per channel of z.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, width: int, multiple: int):
        super().__init__()
        self.layer = layer
        self.gain = nn.Linear(width, multiple)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, h: Features, z: Features, condition: Features) -> Features:
        gain = _behind(self.gain(nn.functional.silu(condition)), z.ndim - 1)
        raw = self.layer(h).reshape(len(z), gain.shape[1], *z.shape[1:])
        return torch.addcmul(raw, gain, z[:, None]).flatten(1, 2)  # one tensor, not a product too


def _behind(values: Tensor, dims: int) -> Tensor:
    """`values` with `dims` ones behind its shape."""
    return values.reshape(*values.shape, *[1] * dims)
