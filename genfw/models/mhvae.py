r"""The Markovian hierarchical variational autoencoder: any number of learned levels.

.. math:: q(z_{1:T} | x) = q(z_1 | x) \prod_{t=2}^T q(z_t | z_{t-1}), \quad
    p(x, z_{1:T}) = p(z_T) \, p(x | z_1) \prod_{t=2}^T p(z_{t-1} | z_t), \quad p(z_T) =
    \mathcal{N}(0, I)

Every conditional has a network of its own, with as many deterministic layers as it likes; nothing
but z_t passes from one level to the next. Level t stands at index t - 1 of the three lists. The
bound is the joint log ratio of one sampled chain, E_q[log p(x, z_{1:T}) - log q(z_{1:T} | x)], with
z_T in closed form (`MarkovianHierarchy.ancestral_elbo`). `VAE` is the case T = 1.

References:
    Understanding Diffusion Models: A Unified Perspective, Luo, 2022, section 2,
        https://arxiv.org/abs/2208.11970;
    Importance Weighted Autoencoders, Burda, Grosse, Salakhutdinov, 2015,
        https://arxiv.org/abs/1509.00519 (two such levels on MNIST).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from genfw.check import example_shape
from genfw.distributions import Distribution, Normal, normal_head
from genfw.elbo import ELBO
from genfw.likelihood import Likelihood
from genfw.model import MarkovianHierarchy, agreed, as_read, normal_numbers
from genfw.noise import Draws
from genfw.types import Image, Labels


class MHVAE(MarkovianHierarchy, name="mhvae"):
    """A chain of Gaussian latents, learned in both directions.

    Args:
        encoders: (what is below, y) -> (b, 2 * latents[t - 1], ...): mean and log standard
            deviation of q(z_t | z_{t-1}). The first reads normalized x, (b, *shape).
        decoders: (z_t, y) -> what is below. The first gives what the likelihood reads, (b,
            likelihood.outputs * C, ...); each other mean and log standard deviation of
            p(z_{t-1} | z_t).
        likelihood: p(x | z_1), from a network's output.
        latents: size of each z_t, or its shape (channels first), from z_1 to z_T.
        classes: labels 0..classes-1 are known to the networks: p(x | y); None: they know none.

    Raises:
        ValueError: the three lists are empty or of different lengths, a size is not positive, or a
            network knows another number of labels; when called, a network gives latents of another
            shape than `latents`.
    """

    def __init__(
        self,
        encoders: Sequence[nn.Module],
        decoders: Sequence[nn.Module],
        likelihood: Likelihood,
        latents: Sequence[int | Sequence[int]],
        classes: int | None = None,
    ):
        super().__init__()
        self.classes = agreed(classes, *encoders, *decoders)
        if not len(encoders) == len(decoders) == len(latents) > 0:
            raise ValueError(
                "expected one encoder, one decoder and one size of latents per level, got "
                f"{len(encoders)}, {len(decoders)} and {len(latents)}"
            )
        self.encoders, self.decoders = nn.ModuleList(encoders), nn.ModuleList(decoders)
        self.likelihood = likelihood
        self.latents = tuple(example_shape(z, name="latents") for z in latents)
        self.levels = len(self.latents)

    def prior(self, n: int) -> Distribution:
        return self.standard_normal(n, self.latents[-1])

    def encode(self, z: Tensor, t: int, y: Labels | None = None) -> Normal:
        network = self.encoders[self.level(t) - 1]
        below = self.likelihood.normalize(z).to(self.dtype) if t == 1 else z
        return self._latent(
            network(as_read(network, below), self.told(y)).to(self.dtype), t, f"encoder {t}"
        )

    def decode(self, z: Tensor, t: int, y: Labels | None = None) -> Distribution:
        network = self.decoders[self.level(t) - 1]
        h = network(as_read(network, z), self.told(y)).to(self.dtype)
        return self.likelihood(h) if t == 1 else self._latent(h, t - 1, f"decoder {t}")

    def elbo(self, x: Image, y: Labels | None = None, *, noise: Draws | None = None) -> ELBO:
        return self.ancestral_elbo(x, y, noise=noise)

    def sample(self, n: int, y: Labels | None = None, *, noise: Draws | None = None) -> Image:
        return self.ancestral_sample(n, y, noise=noise)

    def _latent(self, h: Tensor, t: int, network: str) -> Normal:
        """A network's output as a normal over z_t."""
        return normal_head(normal_numbers(h, self.latents[t - 1], network, f"z_{t}"))

    def extra_repr(self) -> str:
        chain = " -> ".join(f"z_{t} in R^{list(z)}" for t, z in enumerate(self.latents, 1))
        return f"q: x -> {chain}; p: {self._said_prior} and back{self._said_labels}"

    @property
    def _said_prior(self) -> str:
        """What is known of p(z_T): its name, where a subclass has one of its own."""
        top = "z" if self.levels == 1 else f"z_{self.levels}"
        told = (type(self).prior, type(self).prior_of)
        return "N(0, I)" if told == (MHVAE.prior, MHVAE.prior_of) else f"p({top})"
