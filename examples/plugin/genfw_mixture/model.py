r"""A variational autoencoder whose prior is a learned mixture of normals.

.. math:: \log p(x) \ge E_{q(z|x)}[\log p(x|z) + \log p(z) - \log q(z|x)], \qquad
    p(z) = \sum_k \pi_k\, \mathcal{N}(z; m_k, s_k^2 I)

A mixture has no divergence in closed form: the second and third term are taken at the draw.

References:
    VAE with a VampPrior, Tomczak, Welling, 2017, https://arxiv.org/abs/1705.07120.
"""

import torch
from torch import Tensor, nn

from genfw import ELBO, Draws, LatentModel, Likelihood, Normal
from genfw.distributions import normal_head
from genfw.noise import draws


class MixtureVAE(LatentModel, name="mixture_vae"):
    """`VAE` with another prior, and without labels.

    Args:
        encoder: (normalized x (b, *shape), y) -> (b, 2 * latents): mean and log standard deviation
            of q(z|x).
        decoder: (z (b, latents), y) -> what the likelihood reads.
        likelihood: p(x|z), from a network's output.
        latents: size of z.
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
        components: int = 10,
    ):
        super().__init__()
        if components < 1:
            raise ValueError(f"components: expected at least 1, got {components}")
        self.encoder, self.decoder, self.likelihood = encoder, decoder, likelihood
        self.logits = nn.Parameter(torch.zeros(components))
        self.means = nn.Parameter(torch.randn(components, latents))
        self.log_std = nn.Parameter(torch.zeros(components, 1))

    def elbo(self, x: Tensor, y: Tensor | None = None, *, noise: Draws | None = None) -> ELBO:
        q = normal_head(self.encoder(self.likelihood.normalize(x).to(self.dtype), y))
        z = q.sample(noise, "z")
        return ELBO(
            reconstruction=self.likelihood(self.decoder(z, y)).log_prob(x),
            levels=(),
            prior=q.log_prob(z) - self.log_prior(z),
        )

    def log_prior(self, z: Tensor) -> Tensor:
        """log p(z), (b,) nats."""
        of_each = [
            Normal(mean.expand_as(z), std.exp()).log_prob(z)
            for mean, std in zip(self.means, self.log_std, strict=True)
        ]
        return torch.logsumexp(torch.stack(of_each, 1) + self.logits.log_softmax(0), 1)

    def sample(self, n: int, y: Tensor | None = None, *, noise: Draws | None = None) -> Tensor:
        noise = draws(noise, self.means.new_zeros(n, 1))
        chosen = noise.uniform("component", self.means.new_zeros(n, 1))
        k = (chosen > self.logits.softmax(0).cumsum(0)[:-1]).sum(1)
        z = Normal(self.means[k], self.log_std[k].exp()).sample(noise, "prior")
        return self.likelihood(self.decoder(z, y)).sample(noise, "x")

    def extra_repr(self) -> str:
        k, d = self.means.shape
        return f"log p(x) >= E[log p(x|z) + log p(z) - log q(z|x)], {k} normals, z in R^{d}"
