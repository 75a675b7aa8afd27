"""A classifier of noisy data, told how noisy they are: what classifier guidance asks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn

from genfw.check import at_least_one, example_shape
from genfw.nets.blocks import ResidualBlock, group_norm
from genfw.nets.conv import halvings
from genfw.nets.embedding import Condition
from genfw.nets.network import Features, by


class NoisyClassifier(nn.Module):
    """p(y | z): a residual block per resolution, each told log SNR, halved in between.

    It is smooth in z (SiLU, strides, no pooling of maxima): samplers follow its gradient.

    Args:
        shape: (C, H, W) of z.
        classes: how many.
        log_snr_max, log_snr_min: where z is nearly data, and nearly noise: what it is trained
            between. Beyond them it answers as at them.
        channels: of each resolution, from the finest.
        dropout: in every block, and before the last layer.

    Raises:
        ValueError: a size or number out of range.

    References:
        Diffusion Models Beat GANs on Image Synthesis, Dhariwal, Nichol, 2021,
        https://arxiv.org/abs/2105.05233
    """

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        log_snr_max: float,
        log_snr_min: float,
        channels: Sequence[int] = (32, 64),
        dropout: float = 0.2,
    ):
        super().__init__()
        if classes < 2:
            raise ValueError(f"classes: expected at least 2, got {classes}")
        if not log_snr_min < log_snr_max:
            raise ValueError(
                f"log_snr_min: expected less than log_snr_max={log_snr_max}, got {log_snr_min}"
            )
        self.shape, self.classes = example_shape(shape, rank=3), classes
        self.log_snr_max, self.log_snr_min = float(log_snr_max), float(log_snr_min)
        height, width = halvings(self.shape, [at_least_one("channels", n) for n in channels])[-1]
        told = channels[-1]
        self.condition = Condition(told)
        self.enter = nn.Conv2d(self.shape[0], channels[0], 3, padding=1)
        self.blocks = nn.ModuleList(ResidualBlock(n, n, told, dropout) for n in channels)
        self.halve = nn.ModuleList(
            nn.Conv2d(fine, coarse, 3, stride=2, padding=1) for fine, coarse in pairwise(channels)
        )
        self.leave = nn.Sequential(
            group_norm(channels[-1]),
            nn.SiLU(),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(channels[-1] * height * width, classes),
        )

    def forward(self, z: Features, log_snr: Float[Tensor, " b"]) -> Float[Tensor, "b classes"]:
        """Logits of z (b, C, H, W) at log SNR (b,)."""
        level = (log_snr - self.log_snr_min) / (self.log_snr_max - self.log_snr_min)
        condition = self.condition(level.clamp(0, 1))
        h = self.blocks[0](self.enter(z), condition)
        for halve, block in zip(self.halve, self.blocks[1:], strict=True):
            h = block(halve(h), condition)
        return self.leave(h)

    def extra_repr(self) -> str:
        ends = f"log SNR {self.log_snr_max:.3g} to {self.log_snr_min:.3g}"
        return f"z {by(*self.shape)}, {ends} -> {self.classes} classes"
