r"""The top-down hierarchical variational autoencoder (ladder, NVAE, VDVAE).

.. math:: p(x, z_{1:T}) = p(z_T) \prod_{t<T} p(z_t | z_{>t}) \, p(x | z_{1:T}), \quad
    q(z_{1:T} | x) = q(z_T | x) \prod_{t<T} q(z_t | z_{>t}, x)

Both sides go down the same path, z_T first, so that both condition on the same draws and every term
of the bound is a divergence in closed form:

.. math:: \log p(x) \ge E_q \Big[ \log p(x | z_{1:T})
    - \sum_{t<T} KL(q(z_t | z_{>t}, x) \| p(z_t | z_{>t})) \Big] - KL(q(z_T | x) \| p(z_T))

This is no Markovian hierarchy, whose q goes up and for which these divergences are no bound
(`genfw.model`). z_t sees all z above it, not the next one alone. How a network's numbers become
q(z_t | z_{>t}, x) is a `Posterior`.

References:
    Ladder Variational Autoencoders, Soenderby et al., 2016, https://arxiv.org/abs/1602.02282;
    NVAE: A Deep Hierarchical Variational Autoencoder, Vahdat, Kautz, 2020,
        https://arxiv.org/abs/2007.03898;
    Very Deep VAEs Generalize Autoregressive Models and Can Outperform Them on Images, Child, 2020,
        https://arxiv.org/abs/2011.10650.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from genfw.check import at_least
from genfw.distributions import Distribution, Normal, divergence, divergence_by_dimension
from genfw.elbo import ELBO
from genfw.likelihood import Likelihood
from genfw.model import LatentModel, agreed, as_read, normal_numbers
from genfw.models.posterior import Posterior, ResidualPosterior, bounded
from genfw.noise import Draws, draws
from genfw.types import Data, Image, Labels, Nats


@runtime_checkable
class TopDown(Protocol):
    """What an HVAE asks of its network; `genfw.nets.Ladder` is one.

    Attributes:
        shapes: of z_1 .. z_T.
    """

    shapes: Sequence[tuple[int, ...]]

    def read(self, x: Data, y: Labels | None = None) -> Sequence[Tensor]:
        """What the posteriors are told of normalized x, (b, ...) each."""
        ...

    def __call__(
        self,
        draw: Callable[[Tensor, Tensor | None], Tensor],
        n: int,
        y: Labels | None = None,
        seen: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """What the likelihood reads, for n examples. Calls `draw(prior, posterior)`, which gives
        z_t, for t = T .. 1: the prior is mean and log standard deviation of p(z_t | z_{>t}), (n,
        2 C, ...); the posterior what a `Posterior` makes q of, of the same shape, None where `seen`
        is."""
        ...


class HVAE(LatentModel, name="hvae"):
    """A top-down hierarchy. Log standard deviations are bounded smoothly.

    Args:
        ladder: the network (`TopDown`).
        likelihood: p(x | z), from a network's output.
        classes: labels 0..classes-1 are known to the ladder: p(x | y); None: it knows none.
        posterior: how q is told, beside the prior; None: relative to it (`ResidualPosterior`).

    Raises:
        TypeError: the ladder is not a `TopDown`.
        ValueError: the ladder knows another number of labels; when called, it gives latents of
            another shape than it says.
    """

    def __init__(
        self,
        ladder: nn.Module,
        likelihood: Likelihood,
        classes: int | None = None,
        posterior: Posterior | None = None,
    ):
        super().__init__()
        self.classes = agreed(classes, ladder)
        if not isinstance(ladder, TopDown):
            raise TypeError(
                f"ladder: expected a network with `read` and `shapes` (genfw.models.hvae.TopDown), "
                f"got {type(ladder).__name__}"
            )
        self.ladder, self.likelihood = ladder, likelihood
        self.posterior = posterior or ResidualPosterior()

    @property
    def levels(self) -> int:
        """T, the number of latents."""
        return len(self.ladder.shapes)

    def elbo(self, x: Image, y: Labels | None = None, *, noise: Draws | None = None) -> ELBO:
        """The bound of the page above; `levels[t - 1]` is z_t's divergence, z_T's is `prior`."""
        p_x, steps = self._descend(x, y, draws(noise, x))
        *levels, prior = (divergence(step.q, step.p, step.z) for step in reversed(steps))
        return ELBO(reconstruction=p_x.log_prob(x), levels=tuple(levels), prior=prior)

    def divergences(
        self, x: Image, y: Labels | None = None, *, noise: Draws | None = None
    ) -> tuple[Nats, list[tuple[Normal, Normal]]]:
        """log p(x | z) and (q, p) of every z, z_1 first: the bound takes KL(q || p) of each."""
        p_x, steps = self._descend(x, y, draws(noise, x))
        return p_x.log_prob(x), [(step.q, step.p) for step in reversed(steps)]

    def log_weight(
        self,
        x: Image,
        y: Labels | None = None,
        *,
        noise: Draws | None = None,
        k: int = 1,
        beta: float | Tensor = 1.0,
    ) -> Tensor:
        """log w = log p(x | z) + beta [log p(z_1..z_T) - log q(z_1..z_T | x)] at k draws from q,
        (b * k,), those of an example side by side: with beta = 1 E[w] = p(x) exactly.

        `noise` is for b * k rows. The way up is walked once per example.
        """
        rows = x.repeat_interleave(k, 0)
        p_x, steps = self._descend(x, y, draws(noise, rows), k)
        ratios = (step.p.log_prob(step.z) - step.q.log_prob(step.z) for step in steps)
        return sum((beta * ratio for ratio in ratios), start=p_x.log_prob(rows))

    def sample(
        self,
        n: int,
        y: Labels | None = None,
        *,
        noise: Draws | None = None,
        temperature: float | Sequence[float] = 1.0,
    ) -> Image:
        """All z from their priors, z_T first, then x, (n, *shape) integers.

        Args:
            temperature: a factor of every prior's standard deviation, or one for each of z_1 ..
                z_T; 0 takes the means. x itself is drawn from p(x | z) as it is.

        Raises:
            ValueError: another number of temperatures than levels, a negative one, or nan.
        """
        factors = self.temperatures(temperature)
        noise = draws(noise, torch.empty(at_least(0, "n", n), device=self.device))
        t = self.levels

        def draw(prior: Tensor, _: Tensor | None) -> Tensor:
            nonlocal t
            p = self._prior(prior, t)
            z = Normal(p.mean, factors[t - 1] * p.std).sample(noise.fold(f"z{t}"))
            t -= 1
            return as_read(self.ladder, z)

        h = self.ladder(draw, n, self.told(y))
        return self.likelihood(h.to(self.dtype)).sample(noise.fold("z0"))

    def temperatures(self, given: float | Sequence[float]) -> list[float]:
        """One for each of z_1 .. z_T.

        Raises:
            ValueError: another number of them than levels, a negative one, or nan.
        """
        several = [given] * self.levels if isinstance(given, (int, float)) else given
        factors = [float(each) for each in several]
        if len(factors) != self.levels or not all(0 <= each < math.inf for each in factors):
            raise ValueError(
                f"temperature: expected one number >= 0, or one for each of {self.levels} levels, "
                f"got {given}"
            )
        return factors

    def posteriors(
        self, x: Image, y: Labels | None = None, *, noise: Draws | None = None
    ) -> list[tuple[Normal, Tensor]]:
        """q(z_t | z_{>t}, x) on one sampled way down, and the draw of z_t, from z_1 to z_T."""
        _, steps = self._descend(x, y, draws(noise, x))
        return [(step.q, step.z) for step in reversed(steps)]

    def costs(
        self, x: Image, y: Labels | None = None, *, noise: Draws | None = None
    ) -> list[Tensor]:
        """KL(q || p) of every unit of z_1 .. z_T on one sampled way down, (b, units) nats each:
        their sums over units are the terms of the bound."""
        _, pairs = self.divergences(x, y, noise=noise)
        return [divergence_by_dimension(q, p) for q, p in pairs]

    def expected(self, above: Sequence[Tensor], y: Labels | None = None) -> Tensor:
        """E[x | z_1 .. z_T], (b, ...), where z_t .. z_T are given, as `above`, and the others are
        the means of their priors."""
        given = list(above)

        def draw(prior: Tensor, _: Tensor | None) -> Tensor:
            z = given.pop() if given else prior.chunk(2, dim=1)[0]
            return as_read(self.ladder, z)

        h = self.ladder(draw, len(above[0]), self.told(y))
        return self.likelihood(h.to(self.dtype)).mean

    def _descend(
        self, x: Image, y: Labels | None, noise: Draws, k: int = 1
    ) -> tuple[Distribution, list[_Step]]:
        """k ways down for every example: p(x | z) and the steps, z_T's first."""
        y = self.told(y)
        seen = self.ladder.read(as_read(self.ladder, self.likelihood.normalize(x)), y)
        if k > 1:
            seen = [each.repeat_interleave(k, 0) for each in seen]
            y = None if y is None else y.repeat_interleave(k, 0)
        steps: list[_Step] = []

        def draw(prior: Tensor, posterior: Tensor | None) -> Tensor:
            t = self.levels - len(steps)
            p = self._prior(prior, t)
            assert posterior is not None
            q = self.posterior(posterior.to(self.dtype), p)
            steps.append(_Step(p, q, q.sample(noise.fold(f"z{t}"))))
            return as_read(self.ladder, steps[-1].z)

        h = self.ladder(draw, len(x) * k, y, seen)
        return self.likelihood(h.to(self.dtype)), steps

    def _prior(self, head: Tensor, t: int) -> Normal:
        """p(z_t | z_{>t})."""
        head = normal_numbers(head, self.ladder.shapes[t - 1], "the ladder", f"z_{t}")
        mean, log_std = head.to(self.dtype).chunk(2, dim=1)
        return Normal(mean, bounded(log_std).exp())

    def extra_repr(self) -> str:
        bound = "log p(x) >= E log p(x|z) - sum_t KL(q(z_t|z_>t, x) || p(z_t|z_>t))"
        return f"{bound}, T = {self.levels}{self._said_labels}"


@dataclass(frozen=True)
class _Step:
    """One latent of a sampled way down: p(z_t | z_{>t}), q(z_t | z_{>t}, x) and z_t from q."""

    p: Normal
    q: Normal
    z: Tensor
