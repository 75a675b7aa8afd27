r"""log p(x) by annealed importance sampling: how loose the other estimates are.

A chain of T Hamiltonian Monte Carlo steps leads from a start p_0 (the prior, or the encoder) to the
posterior of a one-level model, through

.. math:: f_t(z) = p_0(z)^{1 - \beta_t} \, p(x, z)^{\beta_t}, \qquad 0 = \beta_0 < \dots < \beta_T =
    1, \qquad w = \prod_{t=1}^T \frac{f_t(z_{t-1})}{f_{t-1}(z_{t-1})}, \qquad E[w] = p(x)

so log w is a lower bound on log p(x) in the mean. Where x was simulated from the model, the z that
made it is an exact draw from its posterior; a chain back from there has E[1/w] = 1/p(x), an upper
bound. The truth lies between: bidirectional Monte Carlo.

Both hold for steps that do not look at the chain they move. Step sizes are therefore found per
example and temperature on pilot chains with random numbers of their own, and then kept.

References:
    Annealed Importance Sampling, Neal, 2001, https://arxiv.org/abs/physics/9803008;
    On the Quantitative Analysis of Decoder-Based Generative Models, Wu, Burda, Salakhutdinov,
    Grosse, 2017, https://arxiv.org/abs/1611.04273.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from genfw.amplitudes import broadcast
from genfw.check import at_least_one, positive
from genfw.distributions import Normal, per_example
from genfw.estimators.estimator import Estimate, Estimator, keyed, undisturbed
from genfw.estimators.importance import alternatives, chunks
from genfw.estimators.weights import effective_sample_size, log_mean, log_mean_variance
from genfw.model import LatentModel, MarkovianHierarchy
from genfw.noise import Noise
from genfw.types import Image, Labels, Nats

PILOTS = 4  # chains per example that step sizes are found on
ACCEPTED = 0.65  # of the proposals, where Hamiltonian Monte Carlo moves farthest per gradient
RATE = 0.1  # by which a pilot's log step size follows its acceptance


@dataclass(frozen=True)
class Sandwich:
    """Simulated images and bounds on their log p(x), which hold in the mean over images.

    Attributes:
        x: (n, *shape) drawn from the model.
        lower: (n,) nats, by chains from the start to the posterior.
        upper: (n,) nats, by chains from the z that made x back to the start.
    """

    x: Image
    lower: Nats
    upper: Nats


class Annealed(Estimator, name="annealed"):
    """Annealed importance sampling for models of one level. Costs about `temperatures` x `chains` x
    `leapfrog` gradients of the decoder per example, and as much again for the pilots of few chains.

    Args:
        temperatures: T.
        chains: independent ones per example, their weights averaged.
        leapfrog: gradients per step.
        step: the pilots' first step size.
        from_encoder: chains start at q(z|x) instead of the prior.
        chunk: (example, chain) pairs moved at once. It sets memory and speed, never the number.

    Diagnostics: `ess` of the chains' weights; `acceptance`, the mean over steps and chains.
    Variance by the jackknife over chains; nan for one chain.

    Raises:
        ValueError: a count below 1, or a step that is not positive.
    """

    kind = "upper bound on -log p(x)"
    diagnostics = ("ess", "acceptance")

    def __init__(
        self,
        temperatures: int = 1000,
        chains: int = 16,
        leapfrog: int = 10,
        step: float = 0.1,
        from_encoder: bool = False,
        chunk: int = 1000,
    ):
        super().__init__()
        self.temperatures = at_least_one("temperatures", temperatures)
        self.chains = self.draws = at_least_one("chains", chains)
        self.leapfrog = at_least_one("leapfrog", leapfrog)
        self.step, self.from_encoder = positive("step", step), from_encoder
        self.chunk = at_least_one("chunk", chunk)

    def check(self, model: LatentModel) -> None:
        _one_level(model)

    def forward(
        self, model: LatentModel, x: Image, y: Labels | None = None, *, noise: Noise | None = None
    ) -> Estimate:
        model = _one_level(model)
        noise, log_w, accepted = keyed(noise, x), [], []
        for bridge, of, ranges in self._groups(model, x, y, noise):
            steps = self._pilot(bridge, of)
            runs = [self._up(bridge.repeat(j - i), steps, of, i, j) for i, j in ranges]
            log_w.append(torch.cat([run[0] for run in runs], 1))
            accepted.append(torch.cat([run[1] for run in runs], 1).mean(1))
        weights = torch.cat(log_w)
        return Estimate(
            nats=-log_mean(weights),
            variance=log_mean_variance(weights),
            diagnostics={
                "ess": effective_sample_size(weights),
                "acceptance": torch.cat(accepted),
            },
        )

    def bidirectional(
        self, model: LatentModel, n: int, y: Labels | None = None, *, noise: Noise | None = None
    ) -> Sandwich:
        """Bounds on log p(x) from both sides, on n images simulated from the model."""
        model = _one_level(model)
        with torch.inference_mode(False), undisturbed(model):
            noise = keyed(noise, torch.empty(n, device=model.device))
            z = model.prior(n).sample(noise.fold("simulated z"))
            x = model.decode(z, 1, y).sample(noise.fold("simulated x"))
            lower, upper, done = [], [], 0
            for bridge, of, ranges in self._groups(model, x, y, noise):
                mine = z[done : done + len(bridge.x)]
                done += len(bridge.x)
                steps = self._pilot(bridge, of)
                up = [self._up(bridge.repeat(j - i), steps, of, i, j)[0] for i, j in ranges]
                down = [self._down(bridge.repeat(j - i), mine, steps, of, i, j) for i, j in ranges]
                lower.append(log_mean(torch.cat(up, 1)))
                upper.append(-log_mean(-torch.cat(down, 1)))
            return Sandwich(x, torch.cat(lower), torch.cat(upper))

    def _groups(
        self, model: MarkovianHierarchy, x: Image, y: Labels | None, noise: Noise
    ) -> Iterator[tuple[_Bridge, Noise, list[tuple[int, int]]]]:
        """The bridges of a few examples at a time, their noise, and the ranges of chains."""
        for rows, ranges in chunks(len(x), self.chains, self.chunk):
            given = None if y is None else y[rows].clone()
            here = x[rows].clone()
            q = model.encode(here, 1, given) if self.from_encoder else None
            yield _Bridge(model, here, given, q), noise.of(rows), ranges

    def _betas(self) -> Tensor:
        """(T + 1,) from 0 to 1: a sigmoid between -4 and 4, slow at both ends (Wu et al.)."""
        s = torch.linspace(-4, 4, self.temperatures + 1, dtype=torch.float64).sigmoid()
        return (s - s[0]) / (s[-1] - s[0])

    def _pilot(self, bridge: _Bridge, noise: Noise) -> Tensor:
        """(T, b) step sizes, steered so that a share `ACCEPTED` of the pilots' proposals is
        accepted."""
        bridge, noise = bridge.repeat(PILOTS), noise.fold("pilot").each(0, PILOTS)
        z, steps = bridge.begin(noise.fold("start")), []
        log_step = (
            torch.full((len(z) // PILOTS,), self.step, dtype=torch.float64).log().to(z.device)
        )
        for t, beta in enumerate(self._betas()[1:].tolist(), 1):
            steps.append(log_step.exp())
            size = steps[-1].repeat_interleave(PILOTS)
            z, accepted = self._move(bridge, z, beta, size, noise.fold("step", t))
            log_step = log_step + RATE * (accepted.view(-1, PILOTS).mean(1) - ACCEPTED)
        return torch.stack(steps)

    def _up(
        self, bridge: _Bridge, steps: Tensor, noise: Noise, first: int, last: int
    ) -> tuple[Tensor, Tensor]:
        """log w and the mean acceptance of chains first..last - 1 from the start to the posterior,
        (b, chains) each."""
        noise, betas = noise.fold("up").each(first, last), self._betas().tolist()
        z = bridge.begin(noise.fold("start"))
        log_w = accepted = torch.zeros(len(z), dtype=torch.float64, device=z.device)
        for t in range(1, self.temperatures + 1):
            log_w = log_w + (betas[t] - betas[t - 1]) * bridge.log_ratio(z)
            size = steps[t - 1].repeat_interleave(last - first)
            z, a = self._move(bridge, z, betas[t], size, noise.fold("step", t))
            accepted = accepted + a / self.temperatures
        return log_w.view(-1, last - first), accepted.view(-1, last - first)

    def _down(
        self, bridge: _Bridge, z: Tensor, steps: Tensor, noise: Noise, first: int, last: int
    ) -> Tensor:
        """log w of chains from exact posterior draws z back to the start, (b, chains)."""
        noise, betas = noise.fold("down").each(first, last), self._betas().tolist()
        z = z.repeat_interleave(last - first, 0)
        log_w = torch.zeros(len(z), dtype=torch.float64, device=z.device)
        for t in range(self.temperatures, 0, -1):
            size = steps[t - 1].repeat_interleave(last - first)
            z, _ = self._move(bridge, z, betas[t], size, noise.fold("step", t))
            log_w = log_w + (betas[t] - betas[t - 1]) * bridge.log_ratio(z)
        return log_w.view(-1, last - first)

    def _move(
        self, bridge: _Bridge, z: Tensor, beta: float, step: Tensor, noise: Noise
    ) -> tuple[Tensor, Tensor]:
        """One Hamiltonian Monte Carlo step that leaves f_beta alone, and the probability with which
        each proposal was accepted."""
        # A fifth more or less, or a chain may come back to where it was (a Gaussian's period).
        jitter = 0.8 + 0.4 * noise.uniform("jitter", step)
        eps = broadcast(jitter * step, z)
        momentum = noise.normal("momentum", z)
        start, gradient = bridge.slope(z, beta)
        proposal, p, log_f = z, momentum, start
        for _ in range(self.leapfrog):
            p = p + eps / 2 * gradient
            proposal = proposal + eps * p
            log_f, gradient = bridge.slope(proposal, beta)
            p = p + eps / 2 * gradient
        kinetic = (per_example(momentum.square()) - per_example(p.square())) / 2
        chance = (log_f - start + kinetic.double()).exp().clamp_max(1).nan_to_num(0.0)
        taken = noise.uniform("accept", chance) < chance
        return torch.where(taken.view(-1, *(1,) * (z.ndim - 1)), proposal, z), chance

    def extra_repr(self) -> str:
        start = ", from_encoder=True" if self.from_encoder else ""
        ladder = f"temperatures={self.temperatures}, chains={self.chains}"
        return f"{ladder}, leapfrog={self.leapfrog}, step={self.step:g}{start}"


@dataclass(frozen=True)
class _Bridge:
    """The densities between the start (q where it is given, else the prior) and the posterior, for
    a batch of examples."""

    model: MarkovianHierarchy
    x: Image
    y: Labels | None
    q: Normal | None

    def begin(self, noise: Noise) -> Tensor:
        """z from the start."""
        start = self.model.prior(len(self.x)) if self.q is None else self.q
        return start.sample(noise)

    def log_start(self, z: Tensor) -> Nats:
        """log p_0(z), (b,) float64."""
        start = self.model.prior_of(z) if self.q is None else self.q
        return start.log_prob(z).double()

    def repeat(self, k: int) -> _Bridge:
        """Every example k times, side by side."""
        x, y, q = self.x.repeat_interleave(k, 0), self.y, self.q
        y = None if y is None else y.repeat_interleave(k, 0)
        q = None if q is None else self.model.encoded(q, x, y, k)
        return _Bridge(self.model, x, y, q)

    def log_ratio(self, z: Tensor) -> Nats:
        """log p(x, z) - log p_0(z), (b,) float64."""
        log_p = self.model.decode(z, 1, self.y).log_prob(self.x).double()
        prior = self.model.prior_of(z).log_prob(z).double()
        return log_p + prior - self.log_start(z)

    def slope(self, z: Tensor, beta: float) -> tuple[Nats, Tensor]:
        """log f_beta(z), (b,) float64, and its gradient."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            log_f = self.log_start(z) + beta * self.log_ratio(z)
            (gradient,) = torch.autograd.grad(log_f.sum(), z)
        return log_f.detach(), gradient


def _one_level(model: LatentModel) -> MarkovianHierarchy:
    if isinstance(model, MarkovianHierarchy) and not model.endless and model.levels == 1:
        return model
    raise ValueError(
        f"estimator=annealed moves one latent, and {type(model).__name__} is not a hierarchy "
        f"of one level: use {alternatives(model)}"
    )
