r"""A variational autoencoder whose prior is a learned mixture of normals.

.. math:: p(z) = \sum_k \pi_k\, \mathcal{N}(z; m_k, s_k^2 I)

A prior is all that a hierarchy must be told to have another one: bound, importance weights,
samples and pictures follow from its `log_prob` and `sample`. A mixture has no divergence in closed
form, so the bound pays log q(z|x) - log p(z) at the draw.

References:
    VAE with a VampPrior, Tomczak, Welling, 2017, https://arxiv.org/abs/1705.07120.
"""

import torch
from torch import Tensor, nn

from genfw import VAE, Distribution, Draws, Likelihood, Normal, draws


class Mixture(Distribution):
    """The same mixture for each of n examples: logits (K,), means (K, d), std (K, 1)."""

    def __init__(self, logits: Tensor, means: Tensor, std: Tensor, n: int):
        self.weights, self.means, self.std, self.n = logits.log_softmax(0), means, std, n

    @property
    def mean(self) -> Tensor:
        return (self.weights.exp() @ self.means).expand(self.n, -1)

    def log_prob(self, value: Tensor) -> Tensor:
        each = zip(self.means, self.std, strict=True)
        of = [Normal(mean.expand_as(value), std).log_prob(value) for mean, std in each]
        return torch.logsumexp(torch.stack(of, 1) + self.weights, 1)

    def sample(self, noise: Draws | None = None, purpose: str = "sample") -> Tensor:
        noise = draws(noise, self.mean)
        chosen = noise.uniform("component", self.mean[:, :1])
        k = (chosen > self.weights.exp().cumsum(0)[:-1]).sum(1)
        return Normal(self.means[k], self.std[k]).sample(noise, purpose)


class MixtureVAE(VAE, name="mixture_vae"):
    """`VAE` with another prior.

    Args:
        encoder, decoder, likelihood, latents, classes: as of `VAE`; z is (b, latents).
        components: K, of the mixture.

    Raises:
        ValueError: there is no component.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        likelihood: Likelihood,
        latents: int,
        classes: int | None = None,
        components: int = 10,
    ):
        super().__init__(encoder, decoder, likelihood, latents, classes)
        if components < 1:
            raise ValueError(f"components: expected at least 1, got {components}")
        self.logits = nn.Parameter(torch.zeros(components))
        self.means = nn.Parameter(torch.randn(components, latents))
        self.log_std = nn.Parameter(torch.zeros(components, 1))

    def prior(self, n: int) -> Mixture:
        return Mixture(self.logits, self.means, self.log_std.exp(), n)

    def extra_repr(self) -> str:
        k, d = self.means.shape
        return f"log p(x) >= E[log p(x|z) + log p(z) - log q(z|x)], {k} normals, z in R^{d}"
