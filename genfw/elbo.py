r"""The evidence lower bound, taken apart.

.. math:: \log p(x) \ge \underbrace{E_q \log p(x \mid z_1)}_{\text{reconstruction}}
    - \sum_t \underbrace{\ldots}_{\text{levels}} - \underbrace{KL(q(z_T \mid \cdot)
    \| p(z_T))}_{\text{prior}}

An `ELBO` is never weighted, clipped or averaged over examples. What is minimised is an
`Objective`, another type. Luo (19) for one level.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from genfw.check import at_least_one
from genfw.types import Nats


@dataclass(frozen=True)
class ELBO:
    """A lower bound on log p(x), in nats, one value per example: log p(x) >= total.

    Attributes:
        reconstruction: (b,) log p(x | z_1) at a draw from q.
        levels: what each level between costs, (b,) each; () for a VAE; one entry for a diffusion
            model (an unbiased estimate of their sum).
        prior: (b,) KL(q(z_T | .) || p(z_T)); under a prior that is no Normal an unbiased draw of
            it.
    """

    reconstruction: Nats
    levels: tuple[Nats, ...]
    prior: Nats

    @property
    def rate(self) -> Nats:
        """What the latents cost: the levels and the prior, (b,) nats."""
        return sum(self.levels, start=self.prior)

    @property
    def total(self) -> Nats:
        """The bound itself, (b,) nats."""
        return self.reconstruction - self.rate


def bits_per_dim(nats: Tensor, dims: int) -> Tensor:
    """Nats per example as bits per dimension; `dims` = C * H * W. The one place where this is done.

    Raises:
        ValueError: dims below 1.

    Example:
        >>> import torch
        >>> bits_per_dim(torch.tensor(64 * math.log(2.0)), 64)
        tensor(1.)
    """
    return nats / (at_least_one("dims", dims) * math.log(2.0))
