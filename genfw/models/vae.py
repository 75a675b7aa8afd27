r"""The variational autoencoder: the chain of one level.

.. math:: \log p(x) \ge E_{q(z|x)}[\log p(x|z)] - KL(q(z|x) \| p(z)), \quad
    p(z) = \mathcal{N}(0, I)

Luo (19).

References:
    Auto-Encoding Variational Bayes, Kingma, Welling, 2013, https://arxiv.org/abs/1312.6114.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from genfw.likelihood import Likelihood
from genfw.models.mhvae import MHVAE


class VAE(MHVAE, name="vae"):
    """`MHVAE` with T = 1.

    Args:
        encoder: (normalized x (b, *shape), y) -> (b, 2 * latents, ...): mean and log standard
            deviation of q(z|x).
        decoder: (z (b, latents, ...), y) -> what the likelihood reads, (b, likelihood.outputs * C,
            ...).
        likelihood: p(x|z), from a network's output.
        latents: size of z, or its shape (channels first).
        classes: labels 0..classes-1 are known to both networks: p(x | y); None: they know none.

    Raises:
        ValueError: a size is not positive, or a network knows another number of labels; when
            called, the encoder gives latents of another shape.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        likelihood: Likelihood,
        latents: int | Sequence[int],
        classes: int | None = None,
    ):
        super().__init__([encoder], [decoder], likelihood, [latents], classes)

    @property
    def encoder(self) -> nn.Module:
        """q(z|x)."""
        return self.encoders[0]

    @property
    def decoder(self) -> nn.Module:
        """p(x|z)."""
        return self.decoders[0]

    def extra_repr(self) -> str:
        z = f"z in R^{list(self.latents[0])}"
        bound = f"log p(x) >= E log p(x|z) - KL(q(z|x) || {self._said_prior})"
        return f"{bound}, {z}{self._said_labels}"
