r"""The forward process in closed form.

:math:`z_t = \alpha_t x + \sigma_t \epsilon`; s < t throughout. With
:math:`c = 1 - \mathrm{SNR}_t / \mathrm{SNR}_s = -\mathrm{expm1}(\lambda_t - \lambda_s)`:

    marginal     q(z_t | x)        Luo (70)
    transition   q(z_t | z_s)      Luo (31), in its variance-preserving form
    posterior    q(z_s | z_t, x)   Luo (84)

Times are numbers, scalars or one per example, (b,). Of s > t there is no step, and ValueError says
so (on the CPU: elsewhere looking would stall).
"""

from __future__ import annotations

import torch
from torch import Tensor

from genfw.amplitudes import broadcast
from genfw.distributions import Normal
from genfw.schedule import NoiseSchedule
from genfw.types import Data, Time


def marginal(x: Data, t: Time | float, schedule: NoiseSchedule) -> Normal:
    r"""One-step noising: :math:`q(z_t \mid x) = \mathcal{N}(\alpha_t x, \sigma_t^2 I)`. Luo
    (70)."""
    t = _time(t, x)
    return Normal(broadcast(schedule.alpha(t), x) * x, broadcast(schedule.sigma(t), x))


def transition(z_s: Data, s: Time | float, t: Time | float, schedule: NoiseSchedule) -> Normal:
    r"""One step of the encoder: :math:`q(z_t \mid z_s) = \mathcal{N}(\alpha_{ts} z_s,
    \sigma_{ts}^2 I)`.

    :math:`\alpha_{ts} = \alpha_t/\alpha_s, \; \sigma_{ts}^2 = \sigma_t^2 - \alpha_{ts}^2
    \sigma_s^2 = c\,\sigma_t^2`.
    """
    s, t = _time(s, z_s), _time(t, z_s)
    alpha_ts = schedule.alpha(t) / schedule.alpha(s)
    sigma_ts = schedule.sigma(t) * lost_snr(s, t, schedule).sqrt()
    return Normal(broadcast(alpha_ts, z_s) * z_s, broadcast(sigma_ts, z_s))


def posterior(
    z_t: Data, x: Data, s: Time | float, t: Time | float, schedule: NoiseSchedule
) -> Normal:
    r"""The reverse of one step when the data are known. Luo (84).

    .. math:: q(z_s \mid z_t, x) = \mathcal{N}(\alpha_s (c\, x + (1 - c)\, z_t / \alpha_t),
        \; c\, \sigma_s^2 I)
    """
    s, t = _time(s, z_t), _time(t, z_t)
    c = lost_snr(s, t, schedule)
    alpha_s, sigma_s = schedule.alpha(s), schedule.sigma(s)
    kept = alpha_s * (1 - c) / schedule.alpha(t)
    mean = broadcast(alpha_s * c, x) * x + broadcast(kept, z_t) * z_t
    return Normal(mean, broadcast(sigma_s * c.sqrt(), mean))


def lost_snr(s: Time, t: Time, schedule: NoiseSchedule) -> Tensor:
    r"""c, the share of the signal-to-noise ratio lost from s to t, in (0, 1); accurate for short
    steps.

    Raises:
        ValueError: s > t somewhere.
    """
    if s.device.type == t.device.type == "cpu" and bool((s > t).any()):
        first, second = (each[s > t][0] for each in torch.broadcast_tensors(s, t))
        raise ValueError(
            f"expected s <= t, got s={first:g}, t={second:g}: noise is added from s to t"
        )
    return -(schedule.log_snr(t) - schedule.log_snr(s)).expm1()


def _time(t: Time | float, like: Data) -> Time:
    """t itself; of a number a scalar in float64."""
    return t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64, device=like.device)
