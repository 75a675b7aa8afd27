r"""The learned schedule: log SNR a monotone network of time.

.. math:: \lambda(t) = \lambda_{max} - (\lambda_{max} - \lambda_{min})\, n(t), \quad
    n(t) = \frac{m(t) - m(0)}{m(1) - m(0)}, \quad
    m(t) = w\, t + \sum_j a_j\, \mathrm{sigmoid}(k_j (t - c_j)), \quad w, a_j, k_j > 0

The end points are two scalars and belong to the model: the bound depends on them, and they follow
its gradient. The interior n does not change the continuous bound L = E_t[l], only the variance of
its estimator l, whose mean square it follows. l depends on n in two ways: by the noise level that t
falls on, and by the slope there. Written as an integral over the noise levels only one is left,

.. math:: E_t[l^2] = \int \frac{f(\lambda)^2}{p_n(\lambda)}\, d\lambda, \quad l = f / p_n, \quad
    p_n = 1 / (-\lambda'(t)), \qquad \nabla_n E[l^2] = E[-l^2\, \nabla_n \log p_n(\lambda)],

log SNR held where it is: nothing has to be differentiated through the denoiser, and no gradient
passes between it and the interior. `NoiseSchedule.still` holds log SNR; `genfw.diffusion.denoising`
puts the gradients together, in one backward pass, and divides this one by the batch's own mean of
l^2: the gradient of log E[l^2] is of order one from the first step to the last, so clipping the
norm of all gradients together takes nothing from the network. Kingma et al. hold t instead, and
multiply the gradient that comes through the denoiser by 2 l: but for the scale the same in the mean
over large batches.

In small ones the mean of l^2 grows with the l^2 that it divides, and less is left: measured along
the gradient of large batches 0.98 of 64 examples, 0.93 of 16, 0.78 of 4, 0.55 of 2. Of one nothing
is, l^2 / l^2 being 1, but noise, and the interior learns nothing; a micro-batch counts by itself,
however many make a step.

References:
    Variational Diffusion Models, Kingma, Salimans, Poole, Ho, 2021,
    https://arxiv.org/abs/2107.00630 (the network, and the appendix on variance minimization).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from genfw.check import at_least_one
from genfw.schedule.schedule import NoiseSchedule, bisect
from genfw.types import Time


class Learned(NoiseSchedule, name="learned"):
    """Begins near `loglinear`; trained by a bound: `objective=elbo`, and in T steps those of
    weights too (`iwae` and the like), whose gradient in a schedule is plain.

    Args:
        log_snr_max, log_snr_min: the end points that training starts from.
        hidden: units of the monotone network (Kingma et al.: 1024; the curve is smooth).
        learn_ends: False, the end points stay.
    """

    def __init__(
        self, log_snr_max: float, log_snr_min: float, hidden: int = 64, learn_ends: bool = True
    ):
        super().__init__(log_snr_max, log_snr_min)
        self.interior = Monotone(hidden)
        # Where the ends went from where they began: weight decay draws them there, not to zero.
        self.moved = nn.Parameter(torch.zeros(2), requires_grad=learn_ends)

    @property
    def log_snr_max(self) -> Tensor:
        return super().log_snr_max + self.moved[0].double()

    @property
    def log_snr_min(self) -> Tensor:
        return super().log_snr_min + self.moved[1].double()

    def log_snr(self, t: Time) -> Tensor:
        return self.log_snr_max - (self.log_snr_max - self.log_snr_min) * self.interior(t)

    def curve_slope(self, u: Tensor) -> Tensor:
        return (self.log_snr_max - self.log_snr_min) * self.interior.slope(u)

    def curve_inverse(self, log_snr: Tensor) -> Tensor:
        """By Newton's method, whose last step carries the implicit gradient in log SNR and in all
        parameters."""
        n = (self.log_snr_max - log_snr) / (self.log_snr_max - self.log_snr_min)
        with torch.no_grad():
            u = self.interior.inverse(n)
            slope = self.interior.slope(u)
        return u + (n - self.interior(u)) / slope

    def piece(self) -> tuple[float, float]:
        return 0.0, 1.0


class Monotone(nn.Module):
    """n(t), rising from 0 to 1, smooth; float64."""

    def __init__(self, hidden: int):
        super().__init__()
        at_least_one("hidden", hidden)
        self.log_line = nn.Parameter(torch.zeros(1))  # with an axis: sharding cuts along one
        self.log_height = nn.Parameter(torch.full((hidden,), -math.log(hidden)))
        self.log_steepness = nn.Parameter(torch.full((hidden,), math.log(4 + hidden / 4)))
        self.center = nn.Parameter((torch.arange(hidden) + 0.5) / hidden)

    def forward(self, t: Tensor) -> Tensor:
        """n(t), of t's shape."""
        start, stop = self._ends()
        return (self._rise(t) - start) / (stop - start)

    def slope(self, t: Tensor) -> Tensor:
        """dn/dt, positive."""
        start, stop = self._ends()
        s = self._units(t)
        rates = (self.log_height.double() + self.log_steepness.double()).exp()
        return (self._line() + (s * (1 - s)) @ rates) / (stop - start)

    def inverse(self, n: Tensor) -> Tensor:
        """t in [0, 1] where n(t) = n, without gradients: by Newton's method from a few halvings; by
        halvings alone where a curve that has become steep somewhere misleads it."""
        low, high = torch.zeros_like(n), torch.ones_like(n)
        t = bisect(lambda t: -self(t), -n, low, high, steps=6)
        for _ in range(4):
            t = (t + (n - self(t)) / self.slope(t)).clamp(0, 1)
        if bool(((self(t) - n).abs() > 1e-9).any()):
            t = bisect(lambda t: -self(t), -n, low, high, steps=40)
        return t

    def _ends(self) -> Tensor:
        """m at 0 and 1."""
        return self._rise(torch.tensor([0.0, 1.0], device=self.center.device).double())

    def _rise(self, t: Tensor) -> Tensor:
        """m(t)."""
        return self._line() * t + self._units(t) @ self.log_height.double().exp()

    def _line(self) -> Tensor:
        """w."""
        return self.log_line.double().exp().squeeze()

    def _units(self, t: Tensor) -> Tensor:
        """sigmoid(k_j (t - c_j)), (..., hidden)."""
        steepness = self.log_steepness.double().exp()
        return (steepness * (t.unsqueeze(-1) - self.center.double())).sigmoid()
