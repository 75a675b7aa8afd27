r"""Other prices for the latents. The bound is reconstruction - rate; here the rate is weighed,
warmed up or floored, or the reconstruction replaced.

.. math:: -E_q[\log p(x \mid z_1)] + \beta \cdot \text{rate}

None of these is a likelihood, except `beta` at 1, which is the bound.
"""

from __future__ import annotations

from abc import abstractmethod
from enum import Enum

import torch
from torch import Tensor

from genfw.check import at_least_one, not_negative, positive, share
from genfw.diffusion.denoising import Denoises
from genfw.distributions import Distribution, Normal, per_example
from genfw.likelihood import Likelihood
from genfw.model import Diverges, LatentModel, MarkovianHierarchy, bound
from genfw.noise import Draws, Noise
from genfw.objective.objective import Objective, fixed_schedule, told_the_step
from genfw.types import Image, Labels, Nats


class Beta(Objective, name="beta"):
    """The negative bound with `beta` times the rate.

    Args:
        beta: 1 is the bound; more makes latents dearer.

    References:
        beta-VAE: Learning Basic Visual Concepts with a Constrained Variational Framework, Higgins
            et al., 2017, https://openreview.net/forum?id=Sy2fzU9gl.
    """

    def __init__(self, beta: float = 4.0):
        super().__init__()
        self.beta = not_negative("beta", beta)

    def forward(
        self, model: LatentModel, x: Image, y: Labels | None = None, *, noise: Draws | None = None
    ) -> Nats:
        """`beta` times the rate, less the reconstruction, (b,).

        Raises:
            ValueError: a schedule that learns.
        """
        fixed_schedule(self, model)
        return _weighted(model, x, y, noise, self.beta)

    def extra_repr(self) -> str:
        return f"reconstruction - {self.beta:g} rate"


class Warmup(Objective):
    """The negative bound with beta times the rate, beta a function of the optimizer step.

    Attributes:
        weight: beta of the step that `advance` told, (): always the same tensor, so that a step
            recorded once (a CUDA graph) goes on to see it.
    """

    weight: Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.zeros(()), persistent=False)

    @abstractmethod
    def beta_at(self, step: int) -> float:
        """Beta of the optimizer step number `step`, counted from 0."""

    def advance(self, step: int) -> None:
        super().advance(step)
        self.weight.fill_(self.beta_at(step))

    def forward(
        self, model: LatentModel, x: Image, y: Labels | None = None, *, noise: Draws | None = None
    ) -> Nats:
        """Beta at this step times the rate, less the reconstruction, (b,).

        Raises:
            ValueError: `advance` has told no step, or a schedule that learns.
        """
        fixed_schedule(self, model)
        told_the_step(self)
        return _weighted(model, x, y, noise, self.weight)


class LinearWarmup(Warmup, name="warmup"):
    """Beta rises from `start` to `beta` over `steps` optimizer steps, and stays.

    Args:
        steps: optimizer steps until beta is reached.
        start: beta of the first step.
        beta: of the steps from `steps` on; 1 is the bound.

    References:
        Generating Sentences from a Continuous Space, Bowman et al., 2015,
            https://arxiv.org/abs/1511.06349;
        Ladder Variational Autoencoders, Sønderby et al., 2016, https://arxiv.org/abs/1602.02282.
    """

    def __init__(self, steps: int = 1000, start: float = 0.0, beta: float = 1.0):
        super().__init__()
        self.steps = at_least_one("steps", steps)
        self.start, self.beta = not_negative("start", start), not_negative("beta", beta)

    def beta_at(self, step: int) -> float:
        return self.start + (self.beta - self.start) * min(1.0, step / self.steps)

    def extra_repr(self) -> str:
        return f"reconstruction - beta rate, {self.start:g} -> {self.beta:g} in {self.steps} steps"


class CyclicWarmup(Warmup, name="cyclic"):
    """Beta rises from 0 to `beta` and starts again, `cycles` times; then it stays at `beta`.

    Args:
        period: optimizer steps of a cycle.
        cycles: how many.
        ramp: the part of a cycle in which beta rises, in (0, 1]; in the rest it stays.
        beta: the top; 1 is the bound.

    References:
        Cyclical Annealing Schedule: A Simple Approach to Mitigating KL Vanishing, Fu et al., 2019,
            https://arxiv.org/abs/1903.10145.
    """

    def __init__(self, period: int = 1000, cycles: int = 4, ramp: float = 0.5, beta: float = 1.0):
        super().__init__()
        self.period, self.cycles = at_least_one("period", period), at_least_one("cycles", cycles)
        self.ramp = share("ramp", positive("ramp", ramp))
        self.beta = not_negative("beta", beta)

    def beta_at(self, step: int) -> float:
        if step >= self.period * self.cycles:
            return self.beta
        return self.beta * min(1.0, step % self.period / self.period / self.ramp)

    def extra_repr(self) -> str:
        return (
            f"reconstruction - beta rate, 0 -> {self.beta:g} in {self.ramp:g} of "
            f"{self.period} steps, {self.cycles} times"
        )


class Floor(Enum):
    """What a floor under the rate may be laid under."""

    EXAMPLE_LEVEL = "example_level"
    """Each level of each example: sum over levels of max(KL, nats)."""

    BATCH_LEVEL = "batch_level"
    """Each level's mean over the batch: sum over levels of max(mean KL, nats)."""

    EXAMPLE_DIMENSION = "example_dimension"
    """Each latent dimension of each example."""

    BATCH_DIMENSION = "batch_dimension"
    """Each latent dimension's mean over the batch."""


class FreeBits(Objective, name="free_bits"):
    """The negative bound, in which no level (or dimension) gains by costing less than `nats`.

    Below the floor the cost counts as `nats` and has no gradient. "Free bits" names four different
    objectives in the literature: `per` says which. The paper's is `batch_level`, its levels being
    groups of latents.

    Args:
        nats: the floor, for each level or dimension; the default is one for levels.
        per: what the floor is laid under, a `Floor` or its value.

    The batch is what `forward` is given: one micro-batch of one rank. Levels are the terms of the
    model's `ELBO`: closed-form KLs where it has them; elsewhere (below the top of a Markovian
    hierarchy) log ratios at one draw, noisy and of either sign, so that floors per example are
    taken of noise: prefer `batch_level` there. Per dimension needs divergences in closed form
    (`genfw.model.Diverges`): the one level of a VAE, or every level of a top-down hierarchy.

    Raises:
        TypeError: a model whose latents are noise, or, per dimension, a chain of several levels.

    References:
        Improving Variational Inference with Inverse Autoregressive Flow, Kingma, Salimans, et al.,
            2016, https://arxiv.org/abs/1606.04934.
    """

    def __init__(self, nats: float = 2.0, per: Floor | str = Floor.BATCH_LEVEL):
        super().__init__()
        self.nats = not_negative("nats", nats)
        values = [each.value for each in Floor]
        if per not in [*Floor, *values]:
            raise ValueError(f"per: expected one of {', '.join(values)}, got {per!r}")
        self.per = Floor(per)
        self.batchwise = self.per in (Floor.BATCH_LEVEL, Floor.BATCH_DIMENSION)

    def check(self, model: LatentModel) -> None:
        self._has_levels(model)
        if self._by_dimension and isinstance(model, MarkovianHierarchy):
            with torch.no_grad():
                _normal(self, model, model.prior_of(_one_z(model)))

    def _has_levels(self, model: LatentModel) -> None:
        """Refuses a model whose latents are not learned, or not known as `per` needs them."""
        if isinstance(model, Denoises):
            raise TypeError(
                "objective=free_bits lays a floor under what learned latents cost, and those of "
                f"{type(model).__name__} are fixed noise: use objective=elbo"
            )
        if self._by_dimension:
            _diverging(self, model)

    def forward(
        self, model: LatentModel, x: Image, y: Labels | None = None, *, noise: Draws | None = None
    ) -> Nats:
        self._has_levels(model)
        if self._by_dimension:
            assert isinstance(model, Diverges)  # as was just seen to
            try:
                reconstruction, pairs = model.divergences(x, y, noise=noise)
                costs = torch.cat([q.kl_by_dimension(p) for q, p in pairs], 1)
            except TypeError as error:
                self.check(model)  # says what to do instead
                raise TypeError(
                    f"objective=free_bits, per={self.per.value}: {error}: use per=batch_level"
                ) from error
        else:
            elbo = model.elbo(x, y, noise=noise)
            reconstruction, costs = elbo.reconstruction, torch.stack((*elbo.levels, elbo.prior), 1)
        judged = costs.mean(0, keepdim=True) if self.batchwise else costs
        return torch.where(judged > self.nats, costs, self.nats).sum(1) - reconstruction

    @property
    def _by_dimension(self) -> bool:
        return self.per in (Floor.EXAMPLE_DIMENSION, Floor.BATCH_DIMENSION)

    def extra_repr(self) -> str:
        return f"at least {self.nats:g} nats per {self.per.value.replace('_', ' and ')}"


class L2(Objective, name="l2"):
    r"""Squared error plus rate, as in many tutorials. NOT a likelihood: it trains, nothing more.

    .. math:: \|\text{normalize}(x) - \text{normalize}(E[x \mid z_1])\|^2 + \text{rate} \cdot
        (\text{what the latents cost})

    Summed over dimensions, on the scale (-1, 1) of normalized data. As a likelihood it would lack
    its variance and its constant, and be a density besides; its value compares with no NLL. Of
    what the likelihood says only the mean is trained.

    Args:
        rate: weight of the rate; 2 s^2 stands for a normal decoder of standard deviation s.
    """

    def __init__(self, rate: float = 1.0):
        super().__init__()
        self.rate = not_negative("rate", rate)

    def check(self, model: LatentModel) -> None:
        _decoding(model)

    def forward(
        self, model: LatentModel, x: Image, y: Labels | None = None, *, noise: Draws | None = None
    ) -> Nats:
        chain, likelihood = _decoding(model)
        rungs = chain.climb(x, y, noise=noise)
        mean = rungs[0].p.mean
        error = likelihood.normalize(x).to(mean) - _normalized(mean, likelihood)
        rate = bound(rungs, chain.prior_of(rungs[-1].z)).rate
        return per_example(error.square()) + self.rate * rate

    def extra_repr(self) -> str:
        return f"||x - E[x|z]||^2 + {self.rate:g} rate: no likelihood"


def _diverging(objective: FreeBits, model: LatentModel) -> None:
    """Refuses a model without the divergences that `per` a dimension needs.

    Raises:
        TypeError: what its levels cost is not known in closed form.
    """
    chain = isinstance(model, MarkovianHierarchy)
    several = chain and model.levels > 1
    if several or not isinstance(model, Diverges):
        raise TypeError(
            f"objective=free_bits with per={objective.per.value} needs divergences in closed form, "
            "and below the top of a chain a level costs a log ratio at one draw: use "
            f"per=batch_level, got {type(model).__name__}"
        )


def _normal(objective: FreeBits, model: LatentModel, p: Distribution) -> None:
    """Refuses a p(z) whose divergences are not known in closed form."""
    if not isinstance(p, Normal):
        raise TypeError(
            f"objective=free_bits with per={objective.per.value} needs divergences in closed form, "
            f"and {type(model).__name__}'s prior is no Normal: use per=batch_level"
        )


def _one_z(model: MarkovianHierarchy) -> Tensor:
    """A z_T, (1, ...)."""
    return model.prior(1).sample(Noise(0, torch.zeros(1, dtype=torch.int64, device=model.device)))


def _decoding(model: LatentModel) -> tuple[MarkovianHierarchy, Likelihood]:
    likelihood = getattr(model, "likelihood", None)
    if (
        not isinstance(model, MarkovianHierarchy)
        or isinstance(model, Denoises)
        or not isinstance(likelihood, Likelihood)
    ):
        raise TypeError(
            "objective=l2 compares data with what a learned decoder means, and "
            f"{type(model).__name__} is no chain with one: use objective=elbo, or a VAE"
        )
    return model, likelihood


def _weighted(
    model: LatentModel, x: Image, y: Labels | None, noise: Draws | None, beta: float | Tensor
) -> Nats:
    elbo = model.elbo(x, y, noise=noise)
    return -(elbo.reconstruction - beta * elbo.rate)


def _normalized(mean: Tensor, likelihood: Likelihood) -> Tensor:
    """An expected integer on the scale of normalized data, which is an affine map; a density's mean
    as it is."""
    if likelihood.bins is None:
        return mean
    first, second = likelihood.centres()[:2].tolist()
    return first + (second - first) * mean
