r"""Exponential integrators: the linear part of the flow exactly, the prediction by a polynomial
through those made before.

With l = log(alpha / sigma), half of log SNR, and h = l_s - l_t, the probability flow is

.. math:: z_s = \frac{\sigma_s}{\sigma_t} z_t + \sigma_s \int_{l_t}^{l_s} e^{l}\, \hat x(l)\, dl

* x_hat constant: DDIM(0), :math:`z_s = \alpha_s \hat x + \sigma_s (z_t - \alpha_t \hat x) /
  \sigma_t`
* DPM-Solver++ (2M): the same at x_hat extrapolated to the middle of the step,

  .. math:: \bar x = \hat x_t + \frac{h}{2 h_{prev}} (\hat x_t - \hat x_{prev})

* its SDE variant: the ancestral step at that same point
* UniPC: the polynomial's integral; and once the prediction at s is there, which the next step
  needs anyway, z_s again with it among the points

Steps without a past are of order 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genfw.amplitudes import broadcast
from genfw.diffusion.denoiser import Denoiser
from genfw.diffusion.grid import TimeGrid
from genfw.diffusion.process import posterior
from genfw.diffusion.sampler.sampler import Sampler
from genfw.noise import Draws
from genfw.parameterization import Prediction
from genfw.schedule import NoiseSchedule
from genfw.types import Data, Labels


class DPMSolver(Sampler, name="dpm_solver"):
    """DPM-Solver++ (2M): deterministic, order 2, one call a step, the last step too: it ends at a
    finite log SNR (diffusers' `lower_order_final=False`).

    References:
        DPM-Solver++, Lu, Zhou, Bao, Chen, Li, Zhu, 2022, https://arxiv.org/abs/2211.01095.
    """

    remembers = 1

    def __init__(self, steps: int = 20, grid: TimeGrid | None = None):
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
        schedule = denoiser.schedule
        x = in_the_middle(prediction, past, s, t, schedule)
        alpha_t, alpha_s = broadcast(schedule.alpha(t), z), broadcast(schedule.alpha(s), z)
        shrink = broadcast(schedule.sigma(s) / schedule.sigma(t), z)
        return alpha_s * x + shrink * (z - alpha_t * x), prediction


class DPMSolverSDE(Sampler, name="dpm_solver_sde"):
    """SDE-DPM-Solver++ (2M): `ancestral` with the guess extrapolated to the middle of the step.

    References:
        DPM-Solver++, Lu, Zhou, Bao, Chen, Li, Zhu, 2022, https://arxiv.org/abs/2211.01095.
    """

    remembers = 1

    def __init__(self, steps: int = 20, grid: TimeGrid | None = None):
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
        x = in_the_middle(prediction, past, s, t, denoiser.schedule)
        return posterior(z, x, s, t, denoiser.schedule).sample(noise), prediction


class UniPC(Sampler, name="unipc"):
    r"""Predictor and corrector in one, without a call of its own: order p + 1, one call a step.

    Both solve the paper's order conditions exactly (its free function B(h) then cancels): they
    integrate the polynomial through the last p predictions, the corrector's through the new one as
    well. The last step has no new one and stays uncorrected, and is of order p like the others
    (diffusers' `lower_order_final=False`).

    Args:
        order: p, of the predictor, 1 to 3.

    Raises:
        ValueError: another order.

    References:
        UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models, Zhao,
        Bai, Rao, Zhou, Lu, 2023, https://arxiv.org/abs/2302.04867.
    """

    def __init__(self, steps: int = 20, order: int = 2, grid: TimeGrid | None = None):
        super().__init__(steps, grid)
        if order not in (1, 2, 3):
            raise ValueError(f"order: expected 1, 2 or 3, got {order}")
        self.order = self.remembers = order

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
        schedule, prediction = denoiser.schedule, denoiser(z, t, y)
        here, before = half_log_snr(t, schedule), past[-self.order :]
        if before:  # z came from `before`: what the corrector makes of it, less what they made
            start = level(before[-1])
            corrected = integral((*before, prediction), start, here, like=z)
            predicted = integral(before, start, here, like=z)
            z = z + broadcast(schedule.alpha(t), z) * (corrected - predicted)
        points = (*before, prediction)[-self.order :]
        gained = integral(points, here, half_log_snr(s, schedule), like=z)
        shrink = broadcast(schedule.sigma(s) / schedule.sigma(t), z)
        return shrink * z + broadcast(schedule.alpha(s), z) * gained, prediction

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, order={self.order}"


def half_log_snr(t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """l = log(alpha / sigma), float64."""
    return schedule.log_snr(t) / 2


def level(prediction: Prediction) -> Tensor:
    """The l at which it was made; one for the batch, nan for an empty one."""
    alpha, sigma = (each.flatten()[:1].sum() for each in (prediction.alpha, prediction.sigma))
    return (alpha / sigma).double().log()


def in_the_middle(
    prediction: Prediction,
    past: tuple[Prediction, ...],
    s: Tensor,
    t: Tensor,
    schedule: NoiseSchedule,
) -> Data:
    """x_hat extrapolated to the middle of the step from t to s, along the line through the last
    two."""
    if not past:
        return prediction.x
    here = half_log_snr(t, schedule)
    share = (half_log_snr(s, schedule) - here) / (2 * (here - level(past[-1])))
    return prediction.x + broadcast(share, prediction.x) * (prediction.x - past[-1].x)


def integral(points: tuple[Prediction, ...], start: Tensor, stop: Tensor, like: Data) -> Data:
    r""":math:`\int_{start}^{stop} e^{l - stop}\, \hat x(l)\, dl` of the polynomial in l through
    these predictions."""
    h = stop - start
    nodes = torch.stack([(level(each) - start) / h for each in points])
    weights = polynomial_weights(nodes, h)
    return sum((broadcast(w, like) * each.x for w, each in zip(weights, points)), 0 * like)


def polynomial_weights(nodes: Tensor, h: Tensor) -> Tensor:
    r"""w_j, (m,), exact for every polynomial f of degree below m:

    .. math:: \sum_j w_j f(\tau_j) = h \int_0^1 e^{(\tau - 1) h} f(\tau)\, d\tau

    The moments of f = tau^k: I_0 = 1 - e^-h, I_k = 1 - (k / h) I_{k-1}.
    """
    moments = [-(-h).expm1()]
    for k in range(1, len(nodes)):
        moments.append(1 - k / h * moments[-1])
    powers = nodes ** torch.arange(len(nodes), device=nodes.device)[:, None]
    return torch.linalg.solve(powers, torch.stack(moments))
