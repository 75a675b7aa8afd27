r"""The variational autoencoder: the chain of one level.

.. math:: \log p(x) \ge E_{q(z|x)}[\log p(x|z)] - KL(q(z|x) \| p(z)), \quad p(z) = \mathcal{N}(0,
I)    \text{Luo (19)}

References:
    Auto-Encoding Variational Bayes, Kingma, Welling, 2013, https://arxiv.org/abs/1312.6114.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from genfw.distributions import Distribution, Normal, normal_head
from genfw.elbo import ELBO
from genfw.likelihood import Likelihood
from genfw.model import MarkovianHierarchy
from genfw.noise import Draws
from genfw.types import Image, Labels


class VAE(MarkovianHierarchy, name="vae"):
    """One latent, Gaussian, with a learned encoder.

    Args:
        encoder: (normalized x (b, *shape), y) -> (b, 2 * latents, ...): mean and log standard
            deviation of q(z|x).
        decoder: (z (b, latents, ...), y) -> what the likelihood reads, (b, likelihood.outputs * C,
            ...).
        likelihood: p(x|z), from a network's output.
        latents: size of z, or its shape (channels first).
    """

    levels = 1

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        likelihood: Likelihood,
        latents: int | Sequence[int],
    ):
        super().__init__()
        self.encoder, self.decoder, self.likelihood = encoder, decoder, likelihood
        self.latents = (latents,) if isinstance(latents, int) else tuple(latents)

    def prior(self, n: int) -> Normal:
        zero = torch.zeros(n, *self.latents, device=self.device, dtype=self.dtype)
        return Normal(zero, torch.ones_like(zero))

    def encode(self, z: Tensor, t: int, y: Labels | None = None) -> Normal:
        q = normal_head(self.encoder(self.likelihood.normalize(z).to(self.dtype), y))
        if q.mean.shape[1:] != self.latents:
            raise ValueError(
                f"the encoder gives latents of shape {tuple(q.mean.shape[1:])}, the model has "
                f"latents={self.latents}: let it output twice that many channels (mean, log std)"
            )
        return q

    def decode(self, z: Tensor, t: int, y: Labels | None = None) -> Distribution:
        return self.likelihood(self.decoder(z, y))

    def elbo(self, x: Image, y: Labels | None = None, *, noise: Draws | None = None) -> ELBO:
        return self.ancestral_elbo(x, y, noise=noise)

    def sample(self, n: int, y: Labels | None = None, *, noise: Draws | None = None) -> Image:
        return self.ancestral_sample(n, y, noise=noise)

    def extra_repr(self) -> str:
        return f"log p(x) >= E log p(x|z) - KL(q(z|x) || N(0, I)), z in R^{list(self.latents)}"
