r"""Bounds of many draws, and gradients by the sampled path.

.. math:: \log p(x) \ge E \log \frac1k \sum_{i=1}^k w_i, \quad w = p(x, z_1..z_T) /
    q(z_1..z_T \mid x)

k = 1 is the bound, the top level by its log densities at the draw; it rises with k towards log
p(x). The -log k belongs to it.

**Two gradients.** `Iwae`, `Miwae` and `Ciwae` are differentiated as they stand, z being a function
of the encoder's parameters and of noise. That derivative has two parts: by the path, through the
draws z_t, and by the score, through the parameters of every log q(z_t | z_{t-1}) with all draws
held fixed. `Stl` and `Dreg` drop the score terms, all T of them and nothing else. What is kept:
the slope of log q(z_t | z_{t-1}) in z_{t-1}, which moves its mean and width, belongs to the path.
(For one draw its expectation is zero as well; but only with it does the slope of log w in every z_t
vanish where q is the true posterior, and only then is the gradient free of variance there.)

References:
    Importance Weighted Autoencoders, Burda, Grosse, Salakhutdinov, 2015,
        https://arxiv.org/abs/1509.00519;
    Tighter Variational Bounds are Not Necessarily Better, Rainforth et al., 2018,
        https://arxiv.org/abs/1802.04537;
    Sticking the Landing: Simple, Lower-Variance Gradient Estimators for Variational Inference,
        Roeder, Wu, Duvenaud, 2017, https://arxiv.org/abs/1703.09194;
    Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives, Tucker, Lawson, Gu,
        Maddison, 2018, https://arxiv.org/abs/1810.04152.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from genfw.check import at_least, at_least_one, share
from genfw.distributions import Normal, per_example
from genfw.model import LatentModel, MarkovianHierarchy, Weighs, tempers
from genfw.noise import Draws, draws
from genfw.objective.objective import Objective, told_the_step
from genfw.objective.rate import LinearWarmup
from genfw.types import Image, Labels, Nats


class Tempered(Objective, ABC):
    r"""One of log weights, in which log p(z) / q(z | x) may come to count little by little.

    .. math:: \log w = \log p(x \mid z_1) + \beta \log \frac{p(z_1..z_T)}{q(z_1..z_T \mid x)}

    Args:
        warmup: optimizer steps over which beta rises in a straight line from 0 to 1; then it is the
            bound, and before it is none. 0: beta is 1 from the start.

    References:
        Ladder Variational Autoencoders, Sønderby et al., 2016, https://arxiv.org/abs/1602.02282.
    """

    bound = True

    def __init__(self, warmup: int = 0):
        super().__init__()
        self.warmup = at_least(0, "warmup", warmup)
        if warmup:
            self.bound = False
        self.rising = LinearWarmup(warmup) if warmup else None

    @property
    def title(self) -> str:
        return f"{super().title} with warmup={self.warmup}" if self.warmup else super().title

    def advance(self, step: int) -> None:
        super().advance(step)
        if self.rising is not None:
            self.rising.advance(step)

    def beta(self) -> float | Tensor:
        """Of this step.

        Raises:
            ValueError: there is a warm-up, and `advance` has told no step.
        """
        if self.rising is None:
            return 1.0
        told_the_step(self)
        return self.rising.weight


class OfWeights(Tempered):
    """The negative of a bound made of log weights of several draws, differentiated as it stands."""

    @property
    @abstractmethod
    def draws(self) -> int:
        """How many, per example."""

    @abstractmethod
    def made_of(self, log_w: Tensor) -> Nats:
        """The bound, (b,), of log weights (b, draws)."""

    def check(self, model: LatentModel) -> None:
        _weighing(self, model)

    def forward(
        self, model: LatentModel, x: Image, y: Labels | None = None, *, noise: Draws | None = None
    ) -> Nats:
        k, weights, beta = self.draws, _weighing(self, model).log_weight, self.beta()
        tempered = {"beta": beta} if self.warmup else {}  # a model may know the bound alone
        log_w = weights(x, y, noise=draws(noise, x).each(0, k), k=k, **tempered)
        return -self.made_of(log_w.unflatten(0, (-1, k)))


class Iwae(OfWeights, name="iwae"):
    """The negative importance-weighted bound of k draws.

    Args:
        k: draws per example.
        warmup: see `Tempered`.
    """

    def __init__(self, k: int = 50, warmup: int = 0):
        super().__init__(warmup)
        self.k = at_least_one("k", k)

    @property
    def draws(self) -> int:
        return self.k

    def made_of(self, log_w: Tensor) -> Nats:
        return log_mean_exp(log_w)

    def extra_repr(self) -> str:
        return f"log 1/{self.k} sum w"


class Miwae(OfWeights, name="miwae"):
    """The mean of m importance-weighted bounds of k draws each: m k draws per example.

    A better signal for the encoder than one bound of m k draws.

    Args:
        m: bounds that are averaged.
        k: draws of each.
        warmup: see `Tempered`.
    """

    def __init__(self, m: int = 8, k: int = 8, warmup: int = 0):
        super().__init__(warmup)
        self.m, self.k = at_least_one("m", m), at_least_one("k", k)

    @property
    def draws(self) -> int:
        return self.m * self.k

    def made_of(self, log_w: Tensor) -> Nats:
        return log_mean_exp(log_w.unflatten(1, (self.m, self.k))).mean(1)

    def extra_repr(self) -> str:
        return f"1/{self.m} sum log 1/{self.k} sum w"


class Ciwae(OfWeights, name="ciwae"):
    """weight times the bound plus (1 - weight) times the importance-weighted one, of the same k
    draws.

    Args:
        k: draws per example.
        weight: of the bound, 0..1 (beta in the paper).
        warmup: see `Tempered`.
    """

    def __init__(self, k: int = 50, weight: float = 0.5, warmup: int = 0):
        super().__init__(warmup)
        self.k = at_least_one("k", k)
        self.weight = share("weight", weight)

    @property
    def draws(self) -> int:
        return self.k

    def made_of(self, log_w: Tensor) -> Nats:
        return self.weight * log_w.mean(1) + (1 - self.weight) * log_mean_exp(log_w)

    def extra_repr(self) -> str:
        return f"{self.weight:g} mean log w + {1 - self.weight:g} log 1/{self.k} sum w"


class Stl(Tempered, name="stl"):
    """The negative bound of one draw, its encoder gradient by the path alone: no variance where the
    encoder is the true posterior. The decoder's gradient is the plain one.

    Args:
        warmup: see `Tempered`.
    """

    surrogate = True

    def check(self, model: LatentModel) -> None:
        _chain(self, model)

    def forward(
        self, model: LatentModel, x: Image, y: Labels | None = None, *, noise: Draws | None = None
    ) -> Nats:
        with torch.inference_mode(False), torch.enable_grad():
            beta = self.beta()
            log_w, log_p, path = _apart(_chain(self, model), x, y, noise, 1, beta)
            return _moved(-log_w, -(log_p + path)).squeeze(1)


class Dreg(Tempered, name="dreg"):
    r"""The negative importance-weighted bound of k draws, its encoder gradient doubly
    reparameterized.

    .. math:: \sum_i \tilde w_i^2 \, \frac{\partial \log w_i}{\partial z_i} \frac{d z_i}{d \phi},
        \quad \tilde w_i = w_i / \sum_j w_j

    Unbiased for the encoder's gradient of `Iwae`, and its signal does not drown as k grows. The
    decoder's gradient is `Iwae`'s own. In a warm-up the score counts beta times, so that of the
    same derivation (1 - beta) w~_i + beta w~_i^2 stands for w~_i^2.

    Args:
        k: draws per example; 1 is sticking the landing.
        warmup: see `Tempered`.
    """

    surrogate = True

    def __init__(self, k: int = 50, warmup: int = 0):
        super().__init__(warmup)
        self.k = at_least_one("k", k)

    def check(self, model: LatentModel) -> None:
        _chain(self, model)

    def forward(
        self, model: LatentModel, x: Image, y: Labels | None = None, *, noise: Draws | None = None
    ) -> Nats:
        with torch.inference_mode(False), torch.enable_grad():
            beta = self.beta()
            log_w, log_p, path = _apart(_chain(self, model), x, y, noise, self.k, beta)
            share = log_w.detach().softmax(1)
            by_path = (1 - beta) * share + beta * share.square()
            return _moved(-log_mean_exp(log_w), -(share * log_p + by_path * path).sum(1))

    def extra_repr(self) -> str:
        return f"log 1/{self.k} sum w, encoder by sum of (w / sum w)^2 dlog w/dz dz"


def log_mean_exp(log_w: Tensor) -> Tensor:
    """log 1/k sum_k w over the last axis, of k log weights."""
    return log_w.logsumexp(-1) - math.log(log_w.shape[-1])


def _apart(
    model: MarkovianHierarchy,
    x: Image,
    y: Labels | None,
    noise: Draws | None,
    k: int,
    beta: float | Tensor = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """log w = log p(x | z_1) + beta log p(z) / q(z | x) of k draws in three readings, (b, k) each:
    its value; what has the gradient of its p alone with all draws held fixed; what has the
    gradient of log w by the path alone, d log w / dz * dz / dphi.

    Every density is taken at a copy of its draw that knows no past, so that the slope in each copy
    is the partial one; the chain rule then goes down the levels by hand.
    """
    paths: list[Tensor] = []

    def copied(q: Normal, noise: Draws) -> Tensor:
        paths.append(q.sample(noise))
        return paths[-1].detach().requires_grad_()

    if x.is_inference():  # no graph may hold a tensor of inference mode
        x, y = x.clone(), None if y is None else y.clone()
    rungs = model.climb(x, y, noise=draws(noise, x).each(0, k), k=k, draw=copied)
    z = [rung.z for rung in rungs]
    first, *others = (rung.log_below for rung in rungs)
    log_p = first + beta * sum(others, start=model.prior_of(z[-1]).log_prob(z[-1]))
    log_w = log_p - beta * sum(rung.q.log_prob(rung.z) for rung in rungs)
    path = torch.zeros_like(log_w)
    slopes = torch.autograd.grad(log_w.sum(), z, retain_graph=True)
    moved = torch.zeros_like(z[-1])  # how z_{t+1} passes the slope on to z_t
    for t in reversed(range(len(z))):
        slope = slopes[t] + moved
        path = path + per_example(slope * paths[t])
        if t > 0:
            (moved,) = torch.autograd.grad(
                *(paths[t], z[t - 1], slope),
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
    return log_w.unflatten(0, (-1, k)), log_p.unflatten(0, (-1, k)), path.unflatten(0, (-1, k))


def _moved(value: Tensor, gradient: Tensor) -> Tensor:
    """The value of one and the gradient of the other."""
    return value.detach() + gradient - gradient.detach()


def _weighing(objective: Objective, model: LatentModel) -> Weighs:
    Objective.check(objective, model)
    if not isinstance(model, Weighs):
        raise TypeError(
            f"{objective.title} needs importance weights and {type(model).__name__} has "
            "none: use objective=elbo, or a model with log_weight"
        )
    if isinstance(model, MarkovianHierarchy):
        at_least_one("levels", model.levels)  # in continuous time there is no number of them
    if isinstance(objective, Tempered) and objective.warmup and not tempers(model):
        raise TypeError(
            f"{objective.title} asks for weights of which log p(z)/q(z|x) counts beta times, and "
            f"{type(model).__name__}.log_weight takes no beta: give it one, or take warmup=0"
        )
    return model


def _chain(objective: Objective, model: LatentModel) -> MarkovianHierarchy:
    Objective.check(objective, model)
    if not isinstance(model, MarkovianHierarchy):
        raise TypeError(
            f"{objective.title} follows a chain of latents from x up, which "
            f"{type(model).__name__} is not: use objective=elbo or iwae, or a VAE or MHVAE"
        )
    at_least_one("levels", model.levels)
    return model
