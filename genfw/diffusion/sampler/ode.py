r"""The probability flow, step by step.

In lambda = log SNR it is dz/dlambda = 1/2 sigma^2 (z + score). In the variables

.. math:: u = z / \alpha, \quad n = \sigma / \alpha = e^{-\lambda / 2}: \qquad
    \frac{du}{dn} = \hat\epsilon(z, \lambda)

the same flow has the prediction alone on its right-hand side, of order one at every level and
constant for a point of data. All steps on this page are taken in u, over n.
"""

from __future__ import annotations

import math

from torch import Tensor

from genfw.amplitudes import broadcast
from genfw.check import not_negative, positive
from genfw.diffusion.denoiser import Denoiser
from genfw.diffusion.grid import TimeGrid
from genfw.diffusion.sampler.sampler import Sampler
from genfw.noise import Draws
from genfw.parameterization import Prediction
from genfw.schedule import NoiseSchedule
from genfw.types import Data, Labels


class Euler(Sampler, name="euler"):
    r""":math:`u_s = u_t + (n_s - n_t)\, \hat\epsilon_t`: order 1, and the same as DDIM(0)."""

    def __init__(self, steps: int = 50, grid: TimeGrid | None = None):
        super().__init__(steps, grid)

    def step(
        self,
        denoiser: Denoiser,
        z: Data,
        t: Tensor,
        s: Tensor,
        y: Labels | None,
        *,
        noise: Draws,
        past: tuple[Prediction, ...] = (),
    ) -> tuple[Data, Prediction]:
        prediction = denoiser(z, t, y)
        return along(prediction.eps, z, t, s, denoiser.schedule), prediction


class Heun(Sampler, name="heun"):
    r"""The trapezoid, its far end by Euler: order 2, two calls a step.

    .. math:: u_s = u_t + (n_s - n_t)\, \tfrac12 (\hat\epsilon_t + \hat\epsilon_s)
    """

    calls = 2

    def __init__(self, steps: int = 25, grid: TimeGrid | None = None):
        super().__init__(steps, grid)

    def step(
        self,
        denoiser: Denoiser,
        z: Data,
        t: Tensor,
        s: Tensor,
        y: Labels | None,
        *,
        noise: Draws,
        past: tuple[Prediction, ...] = (),
    ) -> tuple[Data, Prediction]:
        return trapezoid(denoiser, z, t, s, y)


class Churn(Sampler, name="edm"):
    r"""EDM's stochastic sampler: noise is added before every Heun step, which then takes off more.

    .. math:: n_{\hat t} = (1 + \gamma)\, n_t, \qquad
        u_{\hat t} = u_t + s_{noise} \sqrt{n_{\hat t}^2 - n_t^2}\; \epsilon, \qquad
        \gamma = \min(\text{churn} / \text{steps}, \sqrt 2 - 1)

    where low <= n_t <= high, and gamma = 0 elsewhere. The noise never exceeds the schedule's own.

    Args:
        churn: 0 is `heun`; Karras et al. have 40 on ImageNet-64, and 0 on CIFAR-10.
        low, high: the noise levels n = sigma / alpha at which it acts.
        inflation: s_noise; a little over 1 makes up for denoisers that take off too much (1.003
            there). With an exact one it must be 1.

    Raises:
        ValueError: churn negative, inflation not positive, or low above high.

    References:
        Elucidating the Design Space of Diffusion-Based Generative Models, Karras, Aittala, Aila,
        Laine, 2022, https://arxiv.org/abs/2206.00364.
    """

    calls = 2

    def __init__(
        self,
        steps: int = 50,
        churn: float = 40.0,
        low: float = 0.05,
        high: float = 50.0,
        inflation: float = 1.0,
        grid: TimeGrid | None = None,
    ):
        super().__init__(steps, grid)
        if not 0 <= low <= high:
            raise ValueError(f"expected 0 <= low <= high, got {low} and {high}")
        self.low, self.high = low, high
        self.churn, self.inflation = not_negative("churn", churn), positive("inflation", inflation)

    def step(
        self,
        denoiser: Denoiser,
        z: Data,
        t: Tensor,
        s: Tensor,
        y: Labels | None,
        *,
        noise: Draws,
        past: tuple[Prediction, ...] = (),
    ) -> tuple[Data, Prediction]:
        schedule = denoiser.schedule
        n = noise_level(t, schedule)
        acts = (n >= self.low) & (n <= self.high)
        gamma = acts.to(n) * min(self.churn / self.steps, math.sqrt(2) - 1)
        higher = schedule.inverse(-2 * (n * (1 + gamma)).log()).to(t.device).clamp_min(t)
        added = (noise_level(higher, schedule) ** 2 - n**2).clamp_min(0).sqrt()
        u = z / broadcast(schedule.alpha(t), z)
        u = u + broadcast(self.inflation * added, z) * noise.normal("churn", z)
        return trapezoid(denoiser, broadcast(schedule.alpha(higher), z) * u, higher, s, y)

    def extra_repr(self) -> str:
        acts = f"churn={self.churn:g} on [{self.low:g}, {self.high:g}]"
        return f"{super().extra_repr()}, {acts}, inflation={self.inflation:g}"


def noise_level(t: Tensor, schedule: NoiseSchedule) -> Tensor:
    r"""n = sigma / alpha, float64."""
    return (-schedule.log_snr(t) / 2).exp()


def along(slope: Data, z: Data, t: Tensor, s: Tensor, schedule: NoiseSchedule) -> Data:
    """z at time t to time s with du/dn = `slope` all the way."""
    u = z / broadcast(schedule.alpha(t), z)
    change = broadcast(noise_level(s, schedule) - noise_level(t, schedule), z)
    return broadcast(schedule.alpha(s), z) * (u + change * slope)


def trapezoid(
    denoiser: Denoiser, z: Data, t: Tensor, s: Tensor, y: Labels | None
) -> tuple[Data, Prediction]:
    """A Heun step, and what was predicted at its start."""
    start = denoiser(z, t, y)
    end = denoiser(along(start.eps, z, t, s, denoiser.schedule), s, y)
    return along((start.eps + end.eps) / 2, z, t, s, denoiser.schedule), start
