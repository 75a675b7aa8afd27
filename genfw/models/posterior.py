r"""What the posterior of a top-down hierarchy says relative to its prior, z by z.

Both stand on the same draws of all z above. The network gives two numbers per latent dimension
from what it saw of x; a `Posterior` reads them as q(z_t | z_{>t}, x) beside the prior

.. math:: p(z_t | z_{>t}) = \mathcal{N}(\mu, \sigma^2).

Neither loses generality, any normal can be written either way: they differ in what is easy to
learn.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from genfw.distributions import Normal
from genfw.registry import Registered

BOUND = 5.0
"""Log standard deviations, and the posterior's change of them, stay in (-BOUND, BOUND)."""


class Posterior(Registered, nn.Module, ABC, group="posterior"):
    """A reading of the posterior's numbers. Zeros are to be N(0, I) where the prior is: networks
    start there."""

    @abstractmethod
    def forward(self, h: Tensor, p: Normal) -> Normal:
        """q(z_t | z_{>t}, x).

        Args:
            h: (n, 2 C, ...): what the mean is made of, then the log standard deviation.
            p: the prior, over (n, C, ...).
        """


class ResidualPosterior(Posterior, name="residual"):
    r"""q relative to p, as in NVAE:

    .. math:: q = \mathcal{N}(\mu + \sigma \Delta\mu, (\sigma \Delta\sigma)^2)

    A posterior that says nothing costs nothing, and the KL does not depend on the prior's scale.

    References:
        NVAE: A Deep Hierarchical Variational Autoencoder, Vahdat, Kautz, 2020,
            https://arxiv.org/abs/2007.03898.
    """

    def forward(self, h: Tensor, p: Normal) -> Normal:
        change, log_change = h.chunk(2, dim=1)
        return Normal(p.mean + p.std * change, p.std * bounded(log_change).exp())


class FullPosterior(Posterior, name="full"):
    r"""q by itself, as in VDVAE: :math:`q = \mathcal{N}(\mu_q, \sigma_q^2)`, whatever the prior
    says.

    Where the prior moves in training, the posterior stays.

    References:
        Very Deep VAEs Generalize Autoregressive Models and Can Outperform Them on Images, Child,
            2020, https://arxiv.org/abs/2011.10650.
    """

    def forward(self, h: Tensor, p: Normal) -> Normal:
        mean, log_std = h.chunk(2, dim=1)
        return Normal(mean, bounded(log_std).exp())


def bounded(log_std: Tensor) -> Tensor:
    """Nearly the identity around 0, never beyond +-BOUND: no gradient dies as a clamp's does."""
    return BOUND * (log_std / BOUND).tanh()
