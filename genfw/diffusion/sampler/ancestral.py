r"""Samplers whose step is a normal around the guess: the model's own chain, and its kin with less
noise.

.. math:: z_s \sim \mathcal{N}(\alpha_s \hat x + \sqrt{\sigma_s^2 - \tilde\sigma^2}\,
    \hat\epsilon, \; \tilde\sigma^2 I), \quad \tilde\sigma^2 = \eta^2 c\, \sigma_s^2,
    \quad c = 1 - \mathrm{SNR}_t / \mathrm{SNR}_s

has the marginals q(z_s | x) for every eta. With eta = 1 it is the posterior, Luo (84), with the
data replaced by the guess.
"""

from __future__ import annotations

from torch import Tensor

from genfw.amplitudes import broadcast
from genfw.check import share
from genfw.diffusion.denoiser import Denoiser
from genfw.diffusion.grid import TimeGrid
from genfw.diffusion.process import lost_snr, posterior
from genfw.diffusion.sampler.sampler import Sampler
from genfw.distributions import Normal
from genfw.noise import Draws
from genfw.parameterization import Prediction
from genfw.types import Data, Labels


class Ancestral(Sampler, name="ancestral"):
    """The model's own chain: z_s from p(z_s | z_t) = q(z_s | z_t, x = x_hat). Luo (94)."""

    def __init__(self, steps: int = 64, grid: TimeGrid | None = None):
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
        return posterior(z, prediction.x, s, t, denoiser.schedule).sample(noise), prediction


class DDIM(Sampler, name="ddim"):
    """The family above, from no noise to the model's own.

    Args:
        eta: 0 is deterministic: the probability flow by Euler steps in (z / alpha, sigma / alpha);
            1 is `ancestral`.

    Raises:
        ValueError: eta outside [0, 1].

    References:
        Denoising Diffusion Implicit Models, Song, Meng, Ermon, 2020,
        https://arxiv.org/abs/2010.02502.
    """

    def __init__(self, steps: int = 50, eta: float = 0.0, grid: TimeGrid | None = None):
        super().__init__(steps, grid)
        self.eta = share("eta", eta)

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
        schedule = denoiser.schedule
        alpha, sigma, share = schedule.alpha(s), schedule.sigma(s), lost_snr(s, t, schedule)
        kept = sigma * (1 - self.eta**2 * share).sqrt()
        drawn = self.eta * sigma * share.sqrt()
        mean = broadcast(alpha, z) * prediction.x + broadcast(kept, z) * prediction.eps
        return Normal(mean, broadcast(drawn, z)).sample(noise), prediction

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, eta={self.eta:g}"
