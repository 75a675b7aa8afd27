r"""log p(x) of a diffusion model by its probability flow: the density that a deterministic ODE
carries from N(0, I) at t = 1 to the first latent z_0.

With lambda = log SNR, D dimensions and the model's score,

.. math:: \frac{dz}{d\lambda} = v(z, \lambda) = \tfrac12 \sigma^2 (z + \mathrm{score}), \qquad
    \frac{d \log p(z(\lambda))}{d\lambda} = -\nabla \cdot v
    = -\tfrac12 \sigma^2 (D + \mathrm{tr}\, \partial\, \mathrm{score} / \partial z),

    \log p_{ode}(z_0) = \log \mathcal{N}(z_1; 0, I)
    - \int_{\lambda_{min}}^{\lambda_{max}} \nabla \cdot v \, d\lambda

The trace is exact where D is small, and otherwise Hutchinson's e^T (dv/dz) e with one e for the
whole solve: unbiased, and still an ODE.

p_ode(z_0) is a density of the first latent, not the probability of the image. What lies between is
paid for by z_0 ~ q(z_0 | x):

.. math:: \log p(x) \ge E_q[\log p(x | z_0) + \log p_{ode}(z_0) - \log q(z_0 | x)]

References:
    Score-Based Generative Modeling through Stochastic Differential Equations, Song et al., 2021,
    https://arxiv.org/abs/2011.13456; FFJORD, Grathwohl et al., 2019,
    https://arxiv.org/abs/1810.01367 (the trace); Improved Techniques for Maximum Likelihood
    Estimation for Diffusion ODEs, Zheng et al., 2023, https://arxiv.org/abs/2305.03935.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from genfw.amplitudes import amplitudes, broadcast
from genfw.check import at_least, at_least_one, positive
from genfw.diffusion.denoiser import Denoiser
from genfw.distributions import Normal, per_example
from genfw.elbo import ELBO
from genfw.estimators.dormand_prince import adaptive, fixed
from genfw.estimators.estimator import Estimate, Estimator, keyed, undisturbed
from genfw.estimators.importance import alternatives, chunks
from genfw.estimators.weights import log_mean
from genfw.model import LatentModel
from genfw.models.vdm import VDM
from genfw.noise import Noise
from genfw.types import Data, Image, Labels, Nats


class ProbabilityFlow(Estimator, name="ode"):
    r"""The bound by the probability flow of a diffusion model, in continuous time whatever its
    `steps`.

    Args:
        draws: independent sets of k draws of z_0 (and of the probe) per image; the variance is
            measured between them, and nan for one.
        dequantization: q(z_0 | x), and with it p(x | z_0): "decoder", "uniform" or
            "truncated_normal" (`DEQUANTIZATIONS`).
        tolerance: what the ODE may be off in all, nats per dimension, as far as its steps can tell.
            Each image has its own.
        steps: None, or a number of equal steps in log SNR instead, whatever their error.
        exact_dims: the largest D whose trace is exact (D backward passes a call); above, one probe.
        probe: "rademacher" or "gaussian" (`PROBES`).
        k: importance weights per set, log 1/k sum w in place of log w: tighter by the gap between
            q(z_0 | x) and the posterior. With an exact trace only.
        chunk: (image, draw) pairs at once. It sets memory and speed, never the number.

    Terms, for k = 1: reconstruction log p(x | z_0) - log q(z_0 | x), levels the integral of the
    divergence, prior -log N(z_1; 0, I). Their sum is a bound; none of them is a KL.

    Diagnostics: `ode_error`, what the ODE is believed to be off, in nats: the sum of the steps'
    embedded errors, those of z counted by the change of log p that they could cause at most where
    the score is of size 1/sigma. The truth is usually below, of single images at times a few times
    as much. `ode_calls`, network calls.

    The state is float64 whatever the network's precision. An image whose ODE cannot be solved to
    the tolerance has nan: a float32 network that predicts x, whose error near t = 0 enters as
    error / sigma, cannot do 1e-7.

    Raises:
        ValueError: a number out of range, an unknown name, k > 1 without an exact trace, bins asked
            of a density.
        TypeError: the model is no VDM.
    """

    continuous = True
    diagnostics = ("ode_error", "ode_calls")

    def __init__(
        self,
        draws: int = 2,
        dequantization: str = "decoder",
        tolerance: float = 1e-3,
        steps: int | None = None,
        exact_dims: int = 1024,
        probe: str = "rademacher",
        k: int = 1,
        chunk: int = 1000,
    ):
        super().__init__()
        self.sets, self.k = at_least_one("draws", draws), at_least_one("k", k)
        self.draws = self.sets * self.k
        self.dequantization = _one_of("dequantization", dequantization, DEQUANTIZATIONS)
        self.tolerance = positive("tolerance", tolerance)
        self.steps = None if steps is None else at_least_one("steps", steps)
        solved = "to a tolerance" if steps is None else f"in {steps} fixed steps"
        self.kind = f"upper bound on -log p(x), by an ODE {solved}"
        self.exact_dims = at_least(0, "exact_dims", exact_dims)
        self.probe = _one_of("probe", probe, PROBES)
        self.chunk = at_least_one("chunk", chunk)

    def check(self, model: LatentModel) -> None:
        _diffusion(model)

    def forward(
        self, model: LatentModel, x: Image, y: Labels | None = None, *, noise: Noise | None = None
    ) -> Estimate:
        vdm = _diffusion(model)
        if self.k > 1 and not self._exact(x):
            raise ValueError(
                f"k={self.k}: the mean of weights is a bound only where log p_ode is exact, and "
                f"D={math.prod(x.shape[1:])} is above exact_dims={self.exact_dims}: use k=1"
            )
        noise, parts = keyed(noise, x), []
        for rows, ranges in chunks(len(x), self.draws, self.chunk):
            of = noise.of(rows)
            solved = [self._weigh(vdm, x, y, rows, of, i, j) for i, j in ranges]
            parts.append(torch.cat(solved, 2))
        log_w, error, calls, reconstruction, prior = torch.cat(parts, 1)
        reconstruction, prior = reconstruction.mean(1), prior.mean(1)
        values = -log_mean(log_w.view(-1, self.k)).view(-1, self.sets)
        nats = values.mean(1)
        terms = ELBO(reconstruction, (nats + reconstruction - prior,), prior)
        return Estimate(
            nats=nats,
            variance=values.var(1) / self.sets if self.sets > 1 else torch.nan * values[:, 0],
            elbo=terms if self.k == 1 else None,
            diagnostics={"ode_error": error.mean(1), "ode_calls": calls.mean(1)},
        )

    def log_density(
        self, vdm: VDM, z_0: Data, y: Labels | None = None, *, noise: Noise | None = None
    ) -> FlowDensity:
        """log p_ode at the first latent z_0 (b, *shape). `noise` keys the probes."""
        with torch.inference_mode(False), undisturbed(vdm):
            exact = self._exact(z_0)
            z = z_0.clone().double()
            probe = None if exact else PROBES[self.probe](keyed(noise, z), z)
            given = None if (y := vdm.told(y)) is None else y.clone()
            flow = Flow(vdm.denoiser, given, z.shape[1:], probe, vdm.dtype)
            u = torch.cat([z.flatten(1), torch.zeros_like(z.flatten(1)[:, :1])], 1)
            if self.steps is None:
                solution = adaptive(flow, u, flow.size, self.tolerance)
            else:
                solution = fixed(flow, u, flow.size, self.steps)
            z_1, volume = solution.u[:, :-1], solution.u[:, -1]
            log_p = Normal(torch.zeros_like(z_1), torch.ones_like(z_1)).log_prob(z_1)
            error = solution.error * z_1.shape[1]
            return FlowDensity(log_p + volume, error, solution.calls, log_p)

    def _weigh(
        self, vdm: VDM, x: Image, y: Labels | None, rows: slice, noise: Noise, i: int, j: int
    ) -> Tensor:
        """log w, the believed error, the calls, reconstruction and prior of draws i..j - 1 of some
        images, (5, images, j - i)."""
        x = x[rows].clone().repeat_interleave(j - i, 0)
        y = None if y is None else y[rows].clone().repeat_interleave(j - i, 0)
        noise = noise.each(i, j)
        z_0, log_ratio = DEQUANTIZATIONS[self.dequantization](vdm, x, y, noise)
        density = self.log_density(vdm, z_0, y, noise=noise)
        log_w = density.log_prob + log_ratio
        found = [log_w, density.error, density.calls, log_ratio, -density.at_end]
        return torch.stack(found).unflatten(1, (-1, j - i))

    def _exact(self, x: Tensor) -> bool:
        return math.prod(x.shape[1:]) <= self.exact_dims

    def extra_repr(self) -> str:
        solver = f"tolerance={self.tolerance:g}" if self.steps is None else f"steps={self.steps}"
        weights = f", k={self.k}" if self.k > 1 else ""
        trace = f"{self.probe} above D={self.exact_dims}"
        return f"{self.dequantization}, {solver}, {trace}, draws={self.sets}{weights}"


@dataclass(frozen=True)
class FlowDensity:
    """log p_ode(z_0), (b,) float64 nats; what it is believed to be off; the network calls it took;
    and log N(z_1; 0, I), the part of it at the end."""

    log_prob: Nats
    error: Nats
    calls: Tensor
    at_end: Nats


@dataclass(frozen=True)
class Flow:
    """The ODE of (z, log volume), (n, D + 1), from lambda_max at s = 0 to lambda_min at s = 1.

    Attributes:
        denoiser, y: as the model has them; y for all rows of the batch.
        shape: of z.
        probe: (b, *shape) Hutchinson's e of every row; None for the exact trace.
        dtype: what the denoiser is asked in.
    """

    denoiser: Denoiser
    y: Labels | None
    shape: torch.Size
    probe: Tensor | None
    dtype: torch.dtype

    def __call__(self, s: Tensor, u: Tensor, rows: Tensor) -> Tensor:
        """d(z, log volume)/ds."""
        schedule = self.denoiser.schedule
        with torch.enable_grad():
            z = u[:, :-1].unflatten(1, self.shape).detach().requires_grad_()
            v = self.velocity(z, self._log_snr(s), None if self.y is None else self.y[rows])
        divergence = trace(v, z) if self.probe is None else probed(v, z, self.probe[rows])
        slope = torch.cat([v.detach().flatten(1), divergence[:, None]], 1)
        return (schedule.log_snr_min - schedule.log_snr_max) * slope

    def velocity(self, z: Data, log_snr: Tensor, y: Labels | None) -> Data:
        r"""dz/dlambda = 1/2 sigma^2 (z + score)."""
        t = self.denoiser.schedule.inverse(log_snr)
        score = self.denoiser(z.to(self.dtype), t, y).score
        return 0.5 * broadcast((-log_snr).sigmoid(), z) * (z + score)

    def size(self, error: Tensor, s: Tensor) -> Tensor:
        """Nats per dimension, (n,): an error of z moves log p by error x score, and the score is of
        size 1/sigma."""
        _, sigma = amplitudes(self._log_snr(s))
        of_z, of_volume = error[:, :-1], error[:, -1]
        return of_z.square().mean(1).sqrt() / sigma + of_volume.abs() / of_z.shape[1]

    def _log_snr(self, s: Tensor) -> Tensor:
        first, last = self.denoiser.schedule.log_snr_max, self.denoiser.schedule.log_snr_min
        return first + (last - first) * s


def trace(v: Data, z: Data) -> Tensor:
    """The sum of dv_i/dz_i, (n,), by a backward pass for each i."""
    basis = torch.eye(z[0].numel(), dtype=z.dtype, device=z.device)
    total = torch.zeros_like(z.flatten(1)[:, 0])
    for i, e in enumerate(basis):
        e = e.view(z.shape[1:]).expand_as(z)
        (row,) = torch.autograd.grad(v, z, e, retain_graph=True)
        total = total + row.flatten(1)[:, i]
    return total


def probed(v: Data, z: Data, e: Data) -> Tensor:
    """Hutchinson's e^T (dv/dz) e, (n,)."""
    (row,) = torch.autograd.grad(v, z, e)
    return per_example(row * e)


PROBES: dict[str, Callable[[Noise, Data], Data]] = {
    "rademacher": lambda noise, z: (noise.uniform("probe", z) - 0.5).sign(),
    "gaussian": lambda noise, z: noise.normal("probe", z),
}
"""e with E[e e^T] = I. Rademacher's has the smaller variance: none where dv/dz is diagonal."""


def decoder(vdm: VDM, x: Image, y: Labels | None, noise: Noise) -> tuple[Data, Nats]:
    r"""The model's own: q(z_0 | x) = N(alpha_0 x, sigma_0^2), and p(x | z_0) its likelihood."""
    q = vdm.encode(x, 1, y)
    z_0 = q.sample(noise.fold("z1"))
    log_q = Normal(q.mean.double(), q.std.double()).log_prob(z_0.double())
    return z_0.double(), vdm.decode(z_0, 1, y).log_prob(x).double() - log_q


def uniform(vdm: VDM, x: Image, y: Labels | None, noise: Noise) -> tuple[Data, Nats]:
    r"""z_0 / alpha_0 anywhere in the bin of x, and p(x | z_0) = 1 there:

    .. math:: \log p(x) \ge E_u[\log p_{ode}(\alpha_0 (x + u))] + D \log(2 \alpha_0 / K)

    A model of discrete data has its density within a few sigma_0 of the bin centres: this bound is
    loose where bins are wider than that.
    """
    centre, alpha, _, bins = _bins(vdm, x)
    z_0 = alpha * (centre + (2 * noise.uniform("bin", centre) - 1) / bins)
    return z_0, per_example((2 * alpha / bins).log().expand_as(z_0))


def truncated_normal(vdm: VDM, x: Image, y: Labels | None, noise: Noise) -> tuple[Data, Nats]:
    r"""The model's own noise N(0, sigma_0^2 / alpha_0^2), cut off at the edges of the bin, and
    p(x | z_0) = 1 within. With eps in (-tau, tau), tau = alpha_0 / (K sigma_0):

    .. math:: \log p(x) \ge E_\epsilon[\log p_{ode}(\alpha_0 x + \sigma_0 \epsilon)
        - \log \mathcal{N}(\epsilon; 0, I)] + D \log \sigma_0 + D \log(2 \Phi(\tau) - 1)

    Zheng et al. (2023).
    """
    centre, alpha, sigma, bins = _bins(vdm, x)
    tail = torch.special.ndtr(-alpha / (bins * sigma))
    eps = torch.special.ndtri(tail + (1 - 2 * tail) * noise.uniform("bin", centre))
    log_q = -0.5 * eps.square() - 0.5 * math.log(2 * math.pi) - sigma.log() - (-2 * tail).log1p()
    return alpha * centre + sigma * eps, -per_example(log_q)


DEQUANTIZATIONS: dict[str, Callable[[VDM, Image, Labels | None, Noise], tuple[Data, Nats]]] = {
    "decoder": decoder,
    "uniform": uniform,
    "truncated_normal": truncated_normal,
}
"""Each gives z_0 ~ q(z_0 | x) and log p(x | z_0) - log q(z_0 | x), float64."""


def _bins(vdm: VDM, x: Image) -> tuple[Data, Tensor, Tensor, int]:
    """Centres of the bins of x, (b, *shape); alpha_0, sigma_0; K. float64."""
    bins = vdm.likelihood.bins
    if bins is None:
        raise ValueError(
            f"{type(vdm.likelihood).__name__} is a density of real numbers, which have no bins: "
            "use dequantization=decoder"
        )
    start = torch.zeros((), dtype=torch.float64, device=x.device)
    alpha, sigma = vdm.schedule.alpha(start), vdm.schedule.sigma(start)
    return vdm.likelihood.normalize(vdm.checked(x)).double(), alpha, sigma, bins


def _diffusion(model: LatentModel) -> VDM:
    if not isinstance(model, VDM):
        raise TypeError(
            f"estimator=ode follows the probability flow of a diffusion model, and "
            f"{type(model).__name__} has none: use {alternatives(model)}"
        )
    return model


def _one_of(name: str, value: str, known: dict[str, Callable]) -> str:
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
    return value
