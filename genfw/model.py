r"""Latent-variable models and the one bound they share.

A Markovian hierarchy (MHVAE) is a chain of latents x = z_0 -> z_1 -> ... -> z_T. It answers for
three conditionals,

    prior(n)            p(z_T), to draw from; where z_T is known, prior_of(z)
    encode(z, t, y)     q(z_t | z_{t-1}),   t = 1..T,  z_0 = x
    decode(z, t, y)     p(z_{t-1} | z_t),   t = 1..T,  t = 1 is the likelihood p(x | z_1)

and the bound, the importance weights and the ancestral sampler follow here, once, for every model:
a VAE is the chain of one level, a diffusion model the chain whose encoder is fixed.

Luo (19) for one level.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from genfw.check import at_least, at_least_one
from genfw.distributions import Distribution, Normal, divergence, precision
from genfw.elbo import ELBO
from genfw.noise import Draws, draws
from genfw.registry import Registered
from genfw.types import Image, Labels, Nats
from genfw.values import check_labels


class LatentModel(Registered, nn.Module, ABC, group="model"):
    """A model of data with latent variables, judged by a lower bound on log p(x).

    Attributes:
        classes: a conditional model's number of labels: it is one of p(x | y), y in 0..classes-1,
            and judged by a lower bound on log p(x | y). `y=None`, or the label `classes`: no label,
            which means something where labels were dropped in training. `classes=None`: an
            unconditional model, which ignores labels.
    """

    classes: int | None = None

    @property
    def of_density(self) -> bool:
        """Whether p(x) is a density of real numbers, which has no bits per dimension, and not a
        mass of integers: what `likelihood` says, where there is one. A model whose likelihood is
        elsewhere says `of_density = True` in its class."""
        return getattr(getattr(self, "likelihood", None), "density", False) is True

    @abstractmethod
    def elbo(self, x: Image, y: Labels | None = None, *, noise: Draws | None = None) -> ELBO:
        """An unbiased draw of the evidence lower bound: log p(x) >= E[elbo.total].

        Args:
            x: (b, *shape) integers 0..K-1; real numbers of a model `of_density`.
            y: (b,) labels, or None; the bound is then one on log p(x | y), where the model has
                `classes`.
            noise: where the random draws come from; None is torch's global generator.
        """

    @abstractmethod
    def sample(self, n: int, y: Labels | None = None, *, noise: Draws | None = None) -> Image:
        """n images from the model, (n, *shape), numbers of the kind that `elbo` takes."""

    def for_evaluation(self) -> LatentModel:
        """The same model, read so that its bound has little variance; itself unless it knows
        better."""
        return self

    def told(self, y: Labels | None) -> Labels | None:
        """The labels that networks are given: none, where the model has no `classes`.

        Raises:
            ValueError: labels outside 0..classes, see `check_labels`.
        """
        if self.classes is None or y is None:
            return None
        check_labels(y, self.classes)
        return y

    @property
    def _said_labels(self) -> str:
        """What is printed of them after a model's mathematics."""
        return "" if self.classes is None else f", all given y in 0..{self.classes - 1}"

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """What latents and likelihoods are computed in: that of the parameters, never below
        torch's default nor float32."""
        least = precision()
        return next((torch.promote_types(p.dtype, least) for p in self.parameters()), least)


def as_read(network: nn.Module, z: Tensor) -> Tensor:
    """z in the precision of the network's weights; as it is, where there are none."""
    weights = (p.dtype for p in network.parameters() if p.is_floating_point())
    return z.to(next(weights, z.dtype))


@runtime_checkable
class Labelled(Protocol):
    """A network that says how many labels it knows, as those of `genfw.nets` do; None: it takes
    labels and ignores them."""

    classes: int | None


def agreed(classes: int | None, *networks: nn.Module) -> int | None:
    """`classes` itself: checks that all networks were built for it.

    classes=None: any networks; they are told no labels. Otherwise at least one knows labels (some
    may do without, as q(z | x)) and none knows another number of them: the label `classes` means
    "no label", and must not be a class to a network.

    Raises:
        ValueError: it is below 1, a network knows another number of labels, or none knows any.
    """
    if classes is None:
        return None
    classes = at_least_one("classes", classes)
    said = [each.classes if isinstance(each, Labelled) else classes for each in networks]
    for network, known in zip(networks, said, strict=True):
        if known != classes and (known is not None or not any(said)):
            raise ValueError(
                f"classes: the model has {classes}, and its {type(network).__name__} was built "
                f"with classes={known}: build both with the same"
            )
    return classes


def normal_numbers(h: Tensor, shape: Sequence[int], by: str, latent: str) -> Tensor:
    """A network's output (b, 2 C, *dims) itself, which says what a latent of `shape` (C, *dims) is:
    means, then log standard deviations.

    Raises:
        ValueError: it is of another shape; `by` and `latent` say whose, and of what.
    """
    channels, *dims = shape
    if h.shape[1:] != (2 * channels, *dims):
        raise ValueError(
            f"{by} gives {tuple(h.shape[1:])} numbers for {latent} of shape {tuple(shape)}: "
            f"expected {(2 * channels, *dims)}, its means, then its log standard deviations"
        )
    return h


@runtime_checkable
class Weighs(Protocol):
    """A model whose importance weights are known."""

    def log_weight(
        self,
        x: Image,
        y: Labels | None = None,
        *,
        noise: Draws | None = None,
        k: int = 1,
        beta: float | Tensor = 1.0,
    ) -> Tensor:
        """log w = log p(x | z) + beta log p(z) / q(z | x), all latents together, at k draws z from
        q, (b * k,) nats, those of an example side by side: with beta = 1 E[w] = p(x) exactly.

        `noise` is for b * k rows. What q reads of x alone is computed once per example. Only
        objectives with a warm-up ask for another beta than 1; a model may do without it.
        """
        ...


def tempers(model: Weighs) -> bool:
    """Whether its `log_weight` can be asked for another beta than 1, by name or among what it
    passes on."""
    taken = signature(model.log_weight).parameters
    return "beta" in taken or any(each.kind is each.VAR_KEYWORD for each in taken.values())


@runtime_checkable
class Diverges(Protocol):
    """A model whose bound is a reconstruction less divergences in closed form, all diagonal."""

    def divergences(
        self, x: Image, y: Labels | None = None, *, noise: Draws | None = None
    ) -> tuple[Nats, list[tuple[Normal, Normal]]]:
        """log p(x | z) and (q, p) of every z, z_1 first: the bound takes KL(q || p) of each.

        Raises:
            TypeError: this model's bound is of another kind, in a line.
        """
        ...


def sampled(q: Distribution, noise: Draws) -> Tensor:
    """A draw from q, as q makes it."""
    return q.sample(noise)


class MarkovianHierarchy(LatentModel):
    """A chain of latents; see the page above. Subclasses state `levels` and the three
    conditionals.

    Samples begin with a draw from `prior(n)`. Bounds, weights and whatever else knows a z_T ask
    `prior_of(z)` for its density: the same p(z_T), unless a subclass can state it only where z is
    known.
    """

    levels: int

    @property
    def endless(self) -> bool:
        """Whether the chain has no last level, as in continuous time: there is no `levels` then,
        and nothing can be climbed or weighed."""
        return False

    @abstractmethod
    def prior(self, n: int) -> Distribution:
        """p(z_T), for n examples: anything with log_prob and sample. What it costs is known in
        closed form of a Normal, of others at the draw."""

    @abstractmethod
    def encode(self, z: Tensor, t: int, y: Labels | None = None) -> Normal:
        """q(z_t | z_{t-1}) given z = z_{t-1}; t = 1 takes the data themselves."""

    @abstractmethod
    def decode(self, z: Tensor, t: int, y: Labels | None = None) -> Distribution:
        """p(z_{t-1} | z_t) given z = z_t; t = 1 is p(x | z_1), a distribution over integers."""

    def standard_normal(self, n: int, shape: Sequence[int]) -> Normal:
        """N(0, I) over n latents of this shape."""
        zero = torch.zeros((), device=self.device, dtype=self.dtype)
        return Normal(zero.expand(n, *shape), torch.ones_like(zero))

    def prior_of(self, z: Tensor) -> Distribution:
        """p(z_T), for the examples whose z_T are z (b, ...): every density is asked of it."""
        return self.prior(len(z))

    def level(self, t: int) -> int:
        """t itself, if it is a level; `encode` and `decode` of any class call it first. 1 always
        is one: in continuous time a VDM has no last level, but a first.

        Raises:
            ValueError: the chain has no such level.
        """
        if t != 1 and t not in range(1, self.levels + 1):
            raise ValueError(f"t: expected a level, an integer in 1..{self.levels}, got {t}")
        return t

    def climb(
        self,
        x: Image,
        y: Labels | None = None,
        *,
        noise: Draws | None = None,
        k: int = 1,
        draw: Callable[[Normal, Draws], Tensor] = sampled,
    ) -> list[Rung]:
        """Sampled chains, k of each example side by side, level by level from z_1 to z_T.

        Args:
            noise: for b * k rows. If q(z_1 | x) is exactly a `Normal`, it is encoded once per
                example and repeated; a subclass of Normal is encoded again for all rows.
            draw: takes z_t from q(z_t | z_{t-1}).
        """
        return list(self.walk(x, y, noise=noise, k=k, draw=draw))

    def walk(
        self,
        x: Image,
        y: Labels | None = None,
        *,
        noise: Draws | None = None,
        k: int = 1,
        draw: Callable[[Normal, Draws], Tensor] = sampled,
    ) -> Iterator[Rung]:
        """`climb`, one rung at a time: a long chain need not be kept."""
        q = self.encode(x, 1, y)
        if k > 1:
            x, y = repeated(x, k), None if y is None else repeated(y, k)
            q = self.encoded(q, x, y, k)
        noise, below = draws(noise, x), x
        for t in range(1, self.levels + 1):
            q = q if t == 1 else self.encode(below, t, y)
            z = draw(q, noise.fold(f"z{t}"))
            p = self.decode(z, t, y)
            yield Rung(q, z, p, p.log_prob(below))
            below = z

    def encoded(self, q: Normal, x: Image, y: Labels | None, k: int) -> Normal:
        """q(z_1 | x) of examples that stand in x and y k times each, side by side, q being that of
        each once: repeated if it is exactly a `Normal`; a subclass of Normal is encoded again."""
        plain = type(q) is Normal
        return Normal(repeated(q.mean, k), repeated(q.std, k)) if plain else self.encode(x, 1, y)

    def divergences(
        self, x: Image, y: Labels | None = None, *, noise: Draws | None = None
    ) -> tuple[Nats, list[tuple[Normal, Normal]]]:
        """`Diverges`, for one level under a normal prior.

        Raises:
            TypeError: there are more: below the top, q(z_t | z_{t-1}) and p(z_t | z_{t+1}) do not
                stand on the same draws, and a level costs a log ratio at one draw; or the prior is
                no Normal.
        """
        if self.levels != 1:
            raise TypeError(
                f"{type(self).__name__} has {self.levels} levels: below the top one a level costs "
                "a log ratio at a draw, no divergence in closed form"
            )
        (rung,) = self.climb(x, y, noise=noise)
        prior = self.prior_of(rung.z)
        if not isinstance(prior, Normal):
            raise TypeError(
                f"{type(self).__name__} has a prior that is no Normal but a "
                f"{type(prior).__name__}: it costs a log ratio at a draw, no divergence in closed "
                "form"
            )
        return rung.log_below, [(rung.q, prior)]

    def ancestral_elbo(
        self, x: Image, y: Labels | None = None, *, noise: Draws | None = None
    ) -> ELBO:
        """`bound` of one sampled chain."""
        rungs = self.climb(x, y, noise=noise)
        return bound(rungs, self.prior_of(rungs[-1].z))

    def log_weight(
        self,
        x: Image,
        y: Labels | None = None,
        *,
        noise: Draws | None = None,
        k: int = 1,
        beta: float | Tensor = 1.0,
    ) -> Tensor:
        """log w = log p(x | z_1) + beta [log p(z_1..z_T) - log q(z_1..z_T | x)] at k draws from q,
        (b * k,), those of an example side by side: with beta = 1 E[w] = p(x) exactly.

        The top level enters by its log densities at the draw, never by a KL: with the KL, E[w] is
        not p(x). Without gradients no level is kept but the last, however many there are.
        """
        log_w, log_q, top = 0.0, 0.0, x
        for t, rung in enumerate(self.walk(x, y, noise=noise, k=k)):
            ratio = rung.log_below - log_q  # level by level, or large sums would cancel
            log_w = log_w + (beta * ratio if t > 0 else ratio)
            log_q, top = rung.q.log_prob(rung.z), rung.z
        return log_w + beta * (self.prior_of(top).log_prob(top) - log_q)

    def ancestral_sample(
        self, n: int, y: Labels | None = None, *, noise: Draws | None = None
    ) -> Image:
        """Down the chain: z_T from the prior, then every conditional in turn, (n, *shape)
        integers."""
        noise = draws(noise, torch.empty(at_least(0, "n", n), device=self.device))
        z = self.prior(n).sample(noise.fold("prior"))
        for t in range(self.levels, 0, -1):
            z = self.decode(z, t, y).sample(noise.fold(f"z{t - 1}"))
        return z


@dataclass(frozen=True)
class Rung:
    """One level of a sampled chain.

    Attributes:
        q: q(z_t | z_{t-1}).
        z: z_t, its draw.
        p: p(z_{t-1} | z_t).
        log_below: (b,) log p(z_{t-1} | z_t) at the draw below; at t = 1, log p(x | z_1).
    """

    q: Normal
    z: Tensor
    p: Distribution
    log_below: Nats


def repeated(x: Tensor, k: int) -> Tensor:
    """Every row k times, those of a row side by side; of a single row a view, which costs nothing,
    and is not to be written to."""
    return x.unsqueeze(1).expand(-1, k, *x.shape[1:]).flatten(0, 1)


def bound(rungs: Sequence[Rung], prior: Distribution) -> ELBO:
    r"""The joint log ratio on one sampled chain, the top level in closed form where there is one
    (`divergence`).

    .. math:: \log p(x|z_1) - \sum_{t<T} [\log q(z_t|z_{t-1}) - \log p(z_t|z_{t+1})]
        - KL(q(z_T|z_{T-1}) \| p(z_T))

    Both log densities of a level are taken at the SAME draw z_t. An analytic
    KL(q(z_t|z_{t-1}) || p(z_t|z_{t+1})) is not the bound: under q, z_t and z_{t+1} are dependent.
    """
    levels = tuple(rung.q.log_prob(rung.z) - above.log_below for rung, above in pairwise(rungs))
    top = divergence(rungs[-1].q, prior, rungs[-1].z)
    return ELBO(reconstruction=rungs[0].log_below, levels=levels, prior=top)
