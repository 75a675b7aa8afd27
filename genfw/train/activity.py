r"""What the latents of a learned hierarchy do: what each level costs, and each of its units, and
which of them follow the data.

A unit u of z_t is active (Burda et al.) where its posterior mean moves with the data,

.. math:: A_u = \mathrm{Var}_x \, E_{q(z_t | x)}[u] > 0.01.

Where z_t depends on other latents the inner expectation is a mean over k draws, whose own variance,
Var[mean] = E_x Var_q[m | x] / k with m the mean of z_t given the draws, is subtracted.

q and p are products over units, so what a level costs is a sum over units:

.. math:: KL_u = E_x E_q \log \frac{q(u | \cdot)}{p(u | \cdot)}, \quad
    \text{kl}_t = \sum_{u \in z_t} KL_u.

A unit is informative where it is active and costs more than 0.1 nat. At the top KL_u is the mutual
information of u and what q reads (x, or z_{T-1} in a chain) plus KL(q(u) || p(u)) (Hoffman,
Johnson), and so an upper bound on what u tells of x. A unit may cost and not move, where all its
posteriors are alike and not the prior, or move and cost nothing, where they are too wide: hence
both.

References:
    ELBO surgery, Hoffman, Johnson, 2016,
        http://approximateinference.org/accepted/HoffmanJohnson2016.pdf;
    Importance Weighted Autoencoders, Burda, Grosse, Salakhutdinov, 2015,
        https://arxiv.org/abs/1509.00519
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from genfw.model import LatentModel
from genfw.noise import Noise
from genfw.train.latents import latents_of
from genfw.types import Image, Labels

ACTIVE = 0.01
"""A_u above which a unit is active (Burda et al., 2015)."""

COLLAPSED = 0.1
"""Nats per image that a level must cost, and a unit to be informative: less carries nothing."""


@dataclass(frozen=True)
class Findings:
    """Means over images.

    Attributes:
        kl: KL_u of every unit, (units,) nats for each level, z_1's first.
        activity: A_u of every unit, (units,) for each level; estimates, which may be negative.
    """

    kl: list[Tensor]
    activity: list[Tensor]

    def active(self) -> list[Tensor]:
        """Whether a unit follows the data, (units,) for each level."""
        return [each > ACTIVE for each in self.activity]

    def informative(self) -> list[Tensor]:
        """Whether it also costs enough to tell something, (units,) for each level."""
        pairs = zip(self.active(), self.kl, strict=True)
        return [on & (kl > COLLAPSED) for on, kl in pairs]

    def collapsed(self) -> list[int]:
        """The levels t that carry nothing. A term far below 0 (in a chain) is no collapse."""
        pairs = enumerate(zip(self.kl, self.active(), strict=True), 1)
        return [t for t, (kl, on) in pairs if abs(kl.sum()) < COLLAPSED or not on.any()]

    def table(self) -> str:
        """All units, as CSV."""
        lines = ["level,unit,kl,activity"]
        for t, level in enumerate(zip(self.kl, self.activity, strict=True), 1):
            units = enumerate(torch.stack(level, 1).tolist())
            lines += [f"{t},{u},{kl:.6g},{activity:.6g}" for u, (kl, activity) in units]
        return "\n".join(lines) + "\n"

    def most_active(self, t: int, n: int) -> Tensor:
        """The n units of z_t that move most, or all of them."""
        activity = self.activity[t - 1]
        return activity.topk(min(n, len(activity))).indices


@dataclass(frozen=True)
class Sums:
    """Sums over images, float64, from which findings follow; sums of batches and ranks add up.

    Attributes:
        count: of images.
        units: (4, units) for each level: what it costs, nats, and of m, the mean over draws of a
            posterior mean: m, m squared, and the variance of m that is due to the draws.
    """

    count: Tensor
    units: list[Tensor]

    @classmethod
    def nothing(cls, sizes: Sequence[int], device: torch.device) -> Sums:
        """Of no image, of so many units of each level."""
        zeros = [torch.zeros(4, n, dtype=torch.float64, device=device) for n in sizes]
        return cls(torch.zeros((), dtype=torch.float64, device=device), zeros)

    def __add__(self, other: Sums) -> Sums:
        units = [a + b for a, b in zip(self.units, other.units, strict=True)]
        return Sums(self.count + other.count, units)

    def findings(self) -> Findings:
        """The means over all images."""
        n = self.count
        kl, activity = [], []
        for cost, total, squares, own in self.units:
            spread = (squares - total.square() / n) / (n - 1).clamp_min(1)
            kl.append((cost / n).cpu())
            activity.append((spread - own / n).cpu())
        return Findings(kl, activity)


def look(model: LatentModel, x: Image, y: Labels | None, noise: Noise, draws: int) -> Sums:
    """The sums over one batch, with `draws` draws of every latent for each image.

    Raises:
        TypeError: the model's latents are not learned.
    """
    latents = latents_of(model)
    if latents is None:
        raise TypeError(f"{type(model).__name__} has no learned latents to look at")
    costs, means = [], []
    for j in range(draws):
        drawn = noise.fold(j)
        costs.append([cost.double() for cost in latents.costs(x, y, noise=drawn)])
        posteriors = latents.posteriors(x, y, noise=drawn)
        means.append([q.mean.flatten(1).double() for q, _ in posteriors])
    units = []
    for cost, level in zip(zip(*costs, strict=True), zip(*means, strict=True), strict=True):
        kl, m = torch.stack(cost).mean(0), torch.stack(level)  # (b, units), (draws, b, units)
        mean, own = m.mean(0), m.var(0) / draws
        units.append(torch.stack([kl.sum(0), mean.sum(0), mean.square().sum(0), own.sum(0)]))
    return Sums(torch.tensor(float(len(x)), dtype=torch.float64, device=x.device), units)


def spread(count: int, n: int) -> Tensor:
    """n of the rows 0..count - 1 (or all), ascending: in no order that data could have, and the
    same in every run, so that runs look at the same images."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order[:n].sort().values
