r"""Which noise levels a random draw of the bound looks at.

.. math:: \tfrac12 \int \|\epsilon - \hat\epsilon\|^2 d\lambda
    = \tfrac12 E_u\left[-\frac{d\lambda}{du} \|\epsilon - \hat\epsilon\|^2\right],
    \quad u \sim U(0, 1)

for any falling map u -> lambda. The mean is the same for all; the variance is not.

| name        | u                             | lambda                                 |
|-------------|-------------------------------|----------------------------------------|
| uniform     | stratified over the batch     | the schedule's, t = u                  |
| independent | independent                   | the schedule's                         |
| antithetic  | u and 1 - u in pairs          | the schedule's                         |
| log_snr     | stratified                    | uniform between the end points         |
| importance  | stratified                    | where the costs seen so far were large |

In T steps u chooses the step: evenly, under log_snr half so, half by the log SNR that it spans.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.distributed as dist
from torch import Tensor, nn

from genfw.check import at_least_one, positive, share, share_below_one
from genfw.diffusion.denoising import Denoising
from genfw.noise import Draws
from genfw.registry import Registered
from genfw.schedule import NoiseSchedule


class TimeSampler(Registered, nn.Module, ABC, group="times"):
    """Uniform numbers, and a map from them to time."""

    def draw(self, noise: Draws, x: Tensor) -> Tensor:
        """u for the examples x (b, ...): uniform in [0, 1], (b,) float64."""
        return noise.time()

    @abstractmethod
    def forward(self, u: Tensor, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
        """u (b,) to (t, -d log SNR / du), (b,) float64 each."""

    def in_steps(
        self, u: Tensor, steps: int, schedule: NoiseSchedule
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of T even steps s -> t, u (b,) to the end t of the one that it falls on, and to
        expm1(log SNR_s - log SNR_t) / p and 1 / (T p), p being that step's probability; (b,)
        float64 each. Here all are as likely."""
        i = (u * steps).floor().clamp_max(steps - 1) + 1
        t = i / steps
        gained = schedule.log_snr((i - 1) / steps) - schedule.log_snr(t)
        return t, steps * gained.expm1(), torch.ones_like(t)

    def observe(self, denoising: Denoising, schedule: NoiseSchedule) -> None:
        """Told in training what was drawn, and what it cost."""


class UniformTime(TimeSampler, name="uniform"):
    """t = u: the schedule decides which noise levels are seen. For training."""

    def forward(self, u: Tensor, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
        return _through(u, schedule)


class IndependentTime(TimeSampler, name="independent"):
    """As `uniform`, every time for itself: what stratification is measured against."""

    def draw(self, noise: Draws, x: Tensor) -> Tensor:
        return noise.uniform("time", torch.empty(len(x), dtype=torch.float64, device=x.device))

    def forward(self, u: Tensor, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
        return _through(u, schedule)


class AntitheticTime(TimeSampler, name="antithetic"):
    """As `uniform`, in pairs t and 1 - t: what rises or falls evenly with t cancels."""

    def draw(self, noise: Draws, x: Tensor) -> Tensor:
        return noise.antithetic()

    def forward(self, u: Tensor, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
        return _through(u, schedule)


class UniformLogSNR(TimeSampler, name="log_snr"):
    """log SNR uniform between the end points, whatever the schedule. For evaluation."""

    def forward(self, u: Tensor, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
        span = schedule.log_snr_max - schedule.log_snr_min
        return schedule.inverse(schedule.log_snr_max - span * u), span + 0 * u

    def in_steps(
        self, u: Tensor, steps: int, schedule: NoiseSchedule
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Half of the draws fall on each step as often, half in proportion to the log SNR that it
        spans: which is better depends on schedule and model, and no mean square is more than twice
        that of the better one."""
        ends = torch.arange(steps + 1, dtype=torch.float64, device=u.device) / steps
        log_snr = schedule.log_snr(ends)
        fallen = (schedule.log_snr_max - log_snr) / (schedule.log_snr_max - schedule.log_snr_min)
        below = ((ends + fallen) / 2).detach()
        i = torch.searchsorted(below, u.contiguous(), right=True).clamp(1, steps)
        p, gained = below.diff()[i - 1], -log_snr.diff()[i - 1]
        return ends[i], gained.expm1() / p, 1 / (steps * p)


class ImportanceTime(TimeSampler, name="importance"):
    r"""log SNR from a density that follows the cost, piecewise constant over even bins.

    .. math:: p_k = (1 - \text{floor}) \frac{r_k}{\sum_j r_j} + \frac{\text{floor}}{K}, \quad
        r_k^2 = E\left[\tfrac14 \|\epsilon - \hat\epsilon\|^4 \mid \text{bin } k\right]

    With r exact and no floor no density has less variance. Whatever the estimate, the integral is
    unbiased. Uniform until every bin was seen. The sums belong to all ranks together and to the
    checkpoint; they change in training only.

    Args:
        bins: K.
        floor: the share drawn evenly, in (0, 1]: no level is ever given up.
        decay: of the running sums, per batch.

    Raises:
        ValueError: an argument out of its range.

    References:
        Improved Denoising Diffusion Probabilistic Models, Nichol, Dhariwal, 2021,
        https://arxiv.org/abs/2102.09672 (there over T steps).
    """

    count: Tensor
    total: Tensor

    def __init__(self, bins: int = 32, floor: float = 0.1, decay: float = 0.99):
        super().__init__()
        self.bins, self.floor = at_least_one("bins", bins), share("floor", positive("floor", floor))
        self.decay = share_below_one("decay", decay)
        self.register_buffer("count", torch.zeros(bins, dtype=torch.float64))
        self.register_buffer("total", torch.zeros(bins, dtype=torch.float64))

    def density(self) -> Tensor:
        """The probability of each bin, from the data side to the noise side, (K,) float64."""
        count, total = self.count.double(), self.total.double()
        root = (total / count).sqrt()
        known = (count > 0).all() & (total.sum() > 0)
        p = (1 - self.floor) * root / root.sum() + self.floor / self.bins
        return torch.where(known, p, 1 / self.bins)

    def forward(self, u: Tensor, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
        p = self.density()
        below = p.cumsum(0)
        k = torch.searchsorted(below, u.contiguous(), right=True).clamp_max(self.bins - 1)
        position = (k + ((u - below[k]) / p[k] + 1).clamp(0, 1)) / self.bins
        span = schedule.log_snr_max - schedule.log_snr_min
        return schedule.inverse(schedule.log_snr_max - span * position), span / (self.bins * p[k])

    @torch.no_grad()
    def observe(self, denoising: Denoising, schedule: NoiseSchedule) -> None:
        if not self.training:
            return
        span = schedule.log_snr_max - schedule.log_snr_min
        position = (schedule.log_snr_max - denoising.log_snr) / span
        k = (position * self.bins).long().clamp(0, self.bins - 1)
        square = (denoising.eps_error.double() / 2).square()
        seen = torch.zeros(2, self.bins, dtype=torch.float64, device=k.device)
        seen.index_add_(1, k, torch.stack([torch.ones_like(square), square]))
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(seen)
        self.count.mul_(self.decay).add_(seen[0])
        self.total.mul_(self.decay).add_(seen[1])

    def extra_repr(self) -> str:
        return f"bins={self.bins}, floor={self.floor:g}, decay={self.decay:g}"


def _through(u: Tensor, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
    """t = u, and the slope there."""
    t = schedule.still(u)
    return t, schedule.slope(t)
