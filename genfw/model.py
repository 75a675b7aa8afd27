r"""Latent-variable models and the one bound they share.

A Markovian hierarchy (MHVAE) is a chain of latents x = z_0 -> z_1 -> ... -> z_T. It answers for
three conditionals,

    prior(n)            p(z_T)
    encode(z, t, y)     q(z_t | z_{t-1}),   t = 1..T,  z_0 = x
    decode(z, t, y)     p(z_{t-1} | z_t),   t = 1..T,  t = 1 is the likelihood p(x | z_1)

and the bound, the importance weights and the ancestral sampler follow here, once, for every model:
a VAE is the chain of one level, a diffusion model the chain whose encoder is fixed.

Luo (19) for one level, (58) for many; sections 1 and 2 of the paper.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from genfw.distributions import Distribution, Normal
from genfw.elbo import ELBO
from genfw.noise import Draws, draws
from genfw.registry import Registered
from genfw.types import Image, Labels, Nats


class LatentModel(Registered, nn.Module, ABC, group="model"):
    """A model of data with latent variables, judged by a lower bound on log p(x)."""

    @abstractmethod
    def elbo(self, x: Image, y: Labels | None = None, *, noise: Draws | None = None) -> ELBO:
        """An unbiased draw of the evidence lower bound: log p(x) >= E[elbo.total].

        Args:
            x: (b, *shape) integers 0..K-1.
            y: (b,) labels, or None.
            noise: where the random draws come from; None is torch's global generator.
        """

    @abstractmethod
    def sample(self, n: int, y: Labels | None = None, *, noise: Draws | None = None) -> Image:
        """n images from the model, (n, *shape) integers."""

    def for_evaluation(self) -> LatentModel:
        """The same model, read so that its bound has the least variance known; itself unless it
        knows better."""
        return self

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """What latents and likelihoods are computed in: that of the parameters, never below
        torch's default."""
        default = torch.get_default_dtype()
        return next((torch.promote_types(p.dtype, default) for p in self.parameters()), default)


@runtime_checkable
class Weighs(Protocol):
    """A model whose importance weights are known."""

    def log_weight(self, x: Image, y: Labels | None = None, *, noise: Draws | None = None) -> Nats:
        """log w = log p(x, z) - log q(z | x), all latents together, at one draw z from q, (b,)
        nats: E[w] = p(x) exactly."""
        ...


class MarkovianHierarchy(LatentModel):
    """A chain of latents; see the page above. Subclasses state `levels` and the three
    conditionals."""

    levels: int

    @abstractmethod
    def prior(self, n: int) -> Normal:
        """p(z_T), for n examples."""

    @abstractmethod
    def encode(self, z: Tensor, t: int, y: Labels | None = None) -> Normal:
        """q(z_t | z_{t-1}) given z = z_{t-1}; t = 1 takes the data themselves."""

    @abstractmethod
    def decode(self, z: Tensor, t: int, y: Labels | None = None) -> Distribution:
        """p(z_{t-1} | z_t) given z = z_t; t = 1 is p(x | z_1), a distribution over integers."""

    def _climb(self, x: Image, y: Labels | None, noise: Draws) -> Iterator[_Rung]:
        """One sampled chain, level by level: q(z_t | .), its draw, and p(. | z_t) of the level
        below."""
        below: Tensor = x
        for t in range(1, self.levels + 1):
            q = self.encode(below, t, y)
            z = q.sample(noise.fold(f"z{t}"))
            yield _Rung(q, z, self.decode(z, t, y).log_prob(below))
            below = z

    def ancestral_elbo(
        self, x: Image, y: Labels | None = None, *, noise: Draws | None = None
    ) -> ELBO:
        r"""The joint log ratio on one sampled chain, the top level in closed form.

        .. math:: \log p(x|z_1) - \sum_{t<T} [\log q(z_t|z_{t-1}) - \log p(z_t|z_{t+1})]
            - KL(q(z_T|z_{T-1}) \| p(z_T))

        Both log densities of a level are taken at the SAME draw z_t. An analytic
        KL(q(z_t|z_{t-1}) || p(z_t|z_{t+1})) is not the bound: under q, z_t and z_{t+1} are
        dependent.
        """
        rungs = list(self._climb(x, y, draws(noise, x)))
        levels = tuple(rung.q.log_prob(rung.z) - above.log_below for rung, above in pairwise(rungs))
        top = rungs[-1].q.kl(self.prior(len(x)))
        return ELBO(reconstruction=rungs[0].log_below, levels=levels, prior=top)

    def log_weight(self, x: Image, y: Labels | None = None, *, noise: Draws | None = None) -> Nats:
        """log w = log p(x, z_1..z_T) - log q(z_1..z_T | x) at a draw from q: E[w] = p(x) exactly.

        The top level enters by its log densities at the draw, never by a KL: with the KL, E[w] is
        not p(x).
        """
        rungs = list(self._climb(x, y, draws(noise, x)))
        log_p = self.prior(len(x)).log_prob(rungs[-1].z) + sum(rung.log_below for rung in rungs)
        return log_p - sum(rung.q.log_prob(rung.z) for rung in rungs)

    def ancestral_sample(
        self, n: int, y: Labels | None = None, *, noise: Draws | None = None
    ) -> Image:
        """Down the chain: z_T from the prior, then every conditional in turn, (n, *shape)
        integers."""
        prior = self.prior(n)
        noise = draws(noise, prior.mean)
        z = prior.sample(noise.fold(f"z{self.levels}"))
        for t in range(self.levels, 0, -1):
            z = self.decode(z, t, y).sample(noise.fold(f"z{t - 1}"))
        return z


class _Rung:
    """One level of a sampled chain."""

    def __init__(self, q: Normal, z: Tensor, log_below: Nats):
        self.q, self.z, self.log_below = q, z, log_below
