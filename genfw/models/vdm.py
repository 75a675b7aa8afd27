r"""The variational diffusion model: a Markovian hierarchy whose encoder is fixed.

The encoder adds noise, q(z_t | z_s) in closed form; the decoder is the posterior with the data
replaced by a guess, p(z_s | z_t) = q(z_s | z_t, x = x_hat(z_t, t)), Luo (94). The bound, Luo (58),
in T steps (s = (i-1)/T, t = i/T):

    reconstruction   E_q(z_0|x) log p(x | z_0)
    prior            KL(q(z_1 | x) || N(0, I))
    denoising        sum_i E 1/2 expm1(lambda_s - lambda_t) ||eps - eps_hat||^2          Luo (92)
                     -> 1/2 E_t[-lambda'(t) ||eps - eps_hat||^2]   as T -> infinity

estimated with one random step (or time) per example. `steps=None` is the limit; `vdm.at(steps=T)`
is the same model read as a hierarchy of T + 1 latents, latent j being z at time (j - 1) / T.

References:
    Variational Diffusion Models, Kingma, Salimans, Poole, Ho, 2021,
    https://arxiv.org/abs/2107.00630;
    Understanding Diffusion Models: A Unified Perspective, Luo, 2022,
        https://arxiv.org/abs/2208.11970.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from genfw.amplitudes import amplitudes, broadcast
from genfw.check import at_least, at_least_one, example_shape, positive, share
from genfw.diffusion.denoiser import Denoiser, NetworkDenoiser, Unlabelled
from genfw.diffusion.denoising import Denoising, lowering_variance
from genfw.diffusion.guidance import Guidance, Guide, Unguided
from genfw.diffusion.process import marginal, posterior, transition
from genfw.diffusion.sampler import Ancestral, Sampler, Step
from genfw.diffusion.times import TimeSampler, UniformLogSNR, UniformTime
from genfw.distributions import Distribution, Normal, per_example
from genfw.elbo import ELBO
from genfw.likelihood import Likelihood
from genfw.model import MarkovianHierarchy, agreed
from genfw.noise import Draws, draws
from genfw.schedule import NoiseSchedule
from genfw.types import Data, Image, Labels, Nats

ONE_EXAMPLE = (
    "a learned schedule expects at least 2 examples in a micro-batch, got 1, of which its shape "
    "learns nothing: use data.batch_size=16 or more, and accumulate fewer, or a fixed schedule"
)


class VDM(MarkovianHierarchy, name="vdm"):
    """A diffusion model judged by its bound.

    Args:
        denoiser: says what z_t is made of; owns the schedule.
        likelihood: p(x | z_0), given (z_0 / alpha_0, sigma_0 / alpha_0), or where it takes no
            pair, `denoiser.posterior` at t = 0.
        steps: T, or None for continuous time.
        shape: of the data, (C, H, W) or (D,): images of another are refused; needed to sample.
            None: images of any shape that the denoiser takes.
        sampler: how `sample` goes from z_1 to z_0; default Ancestral, in T or 64 steps.
        times: which noise levels, or which of T steps, `elbo` and the objectives look at; default
            uniform in t, each step as often.
        classes: labels 0..classes-1 are known to the denoiser: p(x | y); None: it knows none.
        guidance: what is put around the denoiser to sample, and only then.
        decoder_share: of the examples, in (0, 1]: so many of them, by lot, show `elbo` what their
            decoder says, counted for all. The mean is the same; where the network itself decodes
            (param=categorical), a step takes less time and memory. `for_evaluation` asks all, and
            so does `log_weight`.

    Raises:
        TypeError: a denoiser that is guided already.
        ValueError: `steps` below 1, a share outside (0, 1], or a network that knows another number
            of labels; when asked about images, they are of another shape; when it samples, guidance
            that needs labels which the model does not know.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        likelihood: Likelihood,
        steps: int | None = None,
        *,
        shape: Sequence[int] | None = None,
        sampler: Sampler | None = None,
        times: TimeSampler | None = None,
        classes: int | None = None,
        guidance: Guide = Unguided,
        decoder_share: float = 1.0,
    ):
        super().__init__()
        if isinstance(denoiser, Guidance):
            raise TypeError(
                "denoiser: expected the bare one, of which a likelihood is; samples are guided by "
                f"VDM(..., guidance=...), got {type(denoiser).__name__}"
            )
        self.steps = None if steps is None else at_least_one("steps", steps)
        self.denoiser, self.likelihood = denoiser, likelihood
        self.shape = None if shape is None else example_shape(shape)
        self.sampler = Ancestral(steps or 64) if sampler is None else sampler
        self.times = UniformTime() if times is None else times
        network = denoiser.network if isinstance(denoiser, NetworkDenoiser) else denoiser
        self.classes, self.guidance = agreed(classes, network), guidance
        self.decoder_share = share("decoder_share", positive("decoder_share", decoder_share))

    @property
    def schedule(self) -> NoiseSchedule:
        """The denoiser's."""
        return self.denoiser.schedule

    def at(self, steps: int | None = None) -> VDM:
        """The same denoiser and likelihood read at T steps, with a sampler of T ancestral ones; or
        in continuous time, with the sampler as it is."""
        sampler = self.sampler if steps is None else Ancestral(steps)
        return self._read(steps, sampler, self.times)

    def for_evaluation(self) -> VDM:
        """Looks at all log SNR alike: in continuous time the bound depends on the schedule's end
        points only, its variance on more. Of T steps, at half of them so: those that span much cost
        much. Every example is decoded."""
        read = self._read(self.steps, self.sampler, UniformLogSNR())
        read.decoder_share = 1.0
        return read

    # The bound, by one random time per example.

    def elbo(self, x: Image, y: Labels | None = None, *, noise: Draws | None = None) -> ELBO:
        """Reconstruction, one entry of levels (a random denoising term, by how seldom it is
        looked at), prior. Luo (58)."""
        noise = draws(noise, x)
        return ELBO(
            reconstruction=self._reconstruction(x, y, noise),
            levels=(self.denoising(x, y, noise=noise).cost,),
            prior=self._at_end(x).kl(self.prior_of(x)),
        )

    def _reconstruction(self, x: Image, y: Labels | None, noise: Draws) -> Nats:
        """log p(x | z_0) at a draw of it; of a share of the examples, for all."""
        z_0 = self.encode(x, 1, y).sample(noise.fold("z1"))
        if self.decoder_share == 1:
            return self.decode(z_0, 1, y).log_prob(x)
        chosen, each = noise.fold("decoder").lot(self.decoder_share)
        chosen = chosen.to(x.device)
        told = None if y is None else y[chosen]
        nats = self.decode(z_0[chosen], 1, told).log_prob(x[chosen])
        return nats.new_zeros(len(x)).index_copy(0, chosen, each * nats)

    def denoising(
        self, x: Image, y: Labels | None = None, *, noise: Draws | None = None
    ) -> Denoising:
        """The denoiser's error at one random time per example, stratified; every diffusion
        objective starts here."""
        noise = draws(noise, x)
        data = self._normalize(x)
        u = self.times.draw(noise, data).to(data.device)
        if self.steps is not None:
            t, measure, dt = self.times.in_steps(u, self.steps, self.schedule)
            log_snr, error = self._looked_at(data, t, y, noise)
            return Denoising(t, log_snr, error, measure, dt)
        t, measure = self.times(u, self.schedule)
        log_snr, error = self._looked_at(data, t, y, noise)
        dt = measure / self.schedule.slope(t)
        measure = lowering_variance(measure, error, self.schedule)
        denoising = Denoising(t, log_snr, error, measure, dt)
        if self.training and torch.is_grad_enabled():
            self.times.observe(denoising, self.schedule)
            if len(data) == 1 and self.schedule.learns:
                warnings.warn(ONE_EXAMPLE, stacklevel=2)
        return denoising

    def _looked_at(
        self, data: Data, t: Tensor, y: Labels | None, noise: Draws
    ) -> tuple[Tensor, Nats]:
        """log SNR at t, and ||eps - eps_hat||^2 there, (b,) each."""
        eps = noise.normal("eps", data)
        log_snr = self.schedule.log_snr(t)
        alpha, sigma = (broadcast(each, data) for each in amplitudes(log_snr))
        prediction = self.denoiser(alpha * data + sigma * eps, t, self.told(y))
        return log_snr, per_example((eps - prediction.eps).square())

    # The three conditionals of a hierarchy of T + 1 latents.

    @property
    def endless(self) -> bool:
        return self.steps is None

    @property
    def levels(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        if self.steps is None:
            raise ValueError(
                "in continuous time the hierarchy is infinite: read the model with vdm.at(steps=T)"
            )
        return self.steps + 1

    def prior(self, n: int, shape: Sequence[int] | None = None) -> Normal:
        shape = self.shape if shape is None else shape
        if shape is None:
            raise ValueError("to sample, a VDM must know its data: VDM(..., shape=(C, H, W))")
        return self.standard_normal(n, shape)

    def prior_of(self, z: Tensor) -> Normal:
        return self.prior(len(z), z.shape[1:])

    def encode(self, z: Tensor, t: int, y: Labels | None = None) -> Normal:
        if self.level(t) == 1:
            return marginal(self._normalize(z), self._time(1), self.schedule)
        return transition(z, self._time(t - 1), self._time(t), self.schedule)

    def decode(self, z: Tensor, t: int, y: Labels | None = None) -> Distribution:
        if self.level(t) == 1 and not self.likelihood.takes_pair:
            # the network's own masses, one more call
            return self.likelihood(self.denoiser.posterior(z, self._time(1), self.told(y)))
        if t == 1:
            alpha, sigma = self.schedule.alpha(self._time(1)), self.schedule.sigma(self._time(1))
            return self.likelihood((z / broadcast(alpha, z), broadcast(sigma / alpha, z)))
        prediction = self.denoiser(z, self._time(t), self.told(y))
        return posterior(z, prediction.x, self._time(t - 1), self._time(t), self.schedule)

    def guided(self) -> Guidance:
        """The denoiser that samples are drawn with; bounds see the bare one."""
        bare = Unlabelled(self.denoiser) if self.classes is None else self.denoiser
        return self.guidance(bare).to(self.device)

    # The way to a sample, in three parts; each draws its own part of `noise`.

    def sample(self, n: int, y: Labels | None = None, *, noise: Draws | None = None) -> Image:
        """z_1 from the prior, the sampler down to z_0, then x from p(x | z_0)."""
        noise = draws(noise, torch.empty(at_least(0, "n", n), device=self.device))
        z_1, told = self.start(n, noise), self._asked(y)
        return self.finish(self.sampler(self.guided(), z_1, told, noise=noise), y, noise)

    def start(self, n: int, noise: Draws) -> Data:
        """z_1 of n samples, (n, *shape)."""
        return self.prior(n).sample(noise.fold("prior"))

    def path(self, z_1: Data, y: Labels | None = None, *, noise: Draws) -> Iterator[Step]:
        """Every step of the sampler from z_1 (n, *shape) down to z_0, the denoiser `guided`.

        Raises:
            ValueError: labels that the model does not know.
        """
        return self.sampler.path(self.guided(), z_1, self._asked(y), noise=noise)

    def _asked(self, y: Labels | None) -> Labels | None:
        """The labels of samples: a classifier may know some that the model ignores."""
        return y if self.classes is None else self.told(y)

    def finish(self, z_0: Data, y: Labels | None, noise: Draws) -> Image:
        """The images that a way ends in, (n, *shape), from p(x | z_0)."""
        return self.decode(z_0, 1, y).sample(noise.fold("z0"))

    def _read(self, steps: int | None, sampler: Sampler, times: TimeSampler) -> VDM:
        """The same model, of the same modules, read so."""
        read = copy.copy(self)
        read._modules = dict(self._modules)  # or new `times` would be the original's too
        read.steps, read.sampler, read.times = steps, sampler, times
        return read

    def _time(self, level: int) -> Tensor:
        """The time of latent `level`: (level - 1) / T."""
        time = 0.0 if level == 1 else (level - 1) / (self.levels - 1)
        return torch.tensor(time, dtype=torch.float64, device=self.device)

    def checked(self, x: Image) -> Image:
        """x itself.

        Raises:
            ValueError: its images are not of `shape`.
        """
        if self.shape is not None and tuple(x.shape[1:]) != self.shape:
            raise ValueError(
                f"x: expected images of shape {self.shape}, which this VDM was built for, got "
                f"{tuple(x.shape[1:])}: VDM(..., shape=None) takes any"
            )
        return x

    def _normalize(self, x: Image) -> Data:
        data = self.likelihood.normalize(self.checked(x))
        return data.to(torch.promote_types(data.dtype, self.dtype))

    def _at_end(self, x: Image) -> Normal:
        return marginal(
            self._normalize(x), torch.ones((), dtype=torch.float64, device=x.device), self.schedule
        )

    def extra_repr(self) -> str:
        time = "continuous time" if self.steps is None else f"T = {self.steps}"
        bound = "log p(x) >= E log p(x|z_0) - denoising - KL(q(z_1|x) || N(0, I))"
        return f"{bound}, {time}{self._said_labels}"
