"""How noisy the training estimator is under each schedule, for one network between its end points.

    python benchmarks/schedule_variance.py [run=<folder>] [images=256] [draws=64]
        [checkpoint=best|last]

The estimator: one time per image, uniform in t, 1/2 -lambda'(t) ||eps - eps_hat||^2 nats. Its mean
is the same for all schedules; its variance is over images, times and noise. Errors are drawn once,
evenly over log SNR, and weighed for every schedule, so the network is asked images x draws times:

    E[cost^2] = integral of -lambda'(t(lambda)) E[(||eps - eps_hat||^2 / 2)^2 | lambda] d lambda

`learned` is learned here, its end points kept, from the errors of as many images of the training
set: by the gradient that training follows, of the logarithm of the mean square, but on these stored
errors and by an Adam of its own; `the run's own` is what training made of it. The bins of
`importance` are made of the same errors. All are measured on test images. No density over log SNR
has less variance than `least`, by Cauchy and Schwarz. After ± standard errors over images. Without
a run: the exact denoiser of Gaussian data in 3 dimensions.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from exact import MEAN, STD, exact
from omegaconf import OmegaConf
from torch import Tensor
from trained import images, trained_vdm

from genfw import (
    VDM,
    GaussianLikelihood,
    ImportanceTime,
    Learned,
    LogLinear,
    Noise,
    NoiseSchedule,
)
from genfw.diffusion.denoising import Denoising
from genfw.train.runs import command, read

DEFAULTS = {"images": 256, "draws": 64, "checkpoint": "best"}


@dataclass(frozen=True)
class Errors:
    """(draws, images) each, float64: log SNR, evenly between the ends, and half the squared error
    there."""

    log_snr: Tensor
    half: Tensor
    ends: tuple[float, float]

    @property
    def span(self) -> float:
        return self.ends[0] - self.ends[1]

    def moment(self, slope: Tensor) -> Tensor:
        """(images,) mean squares of the cost where -d log SNR / du is `slope`."""
        return self.span * (slope * self.half.square()).mean(0)

    def bound(self) -> float:
        return self.span * self.half.mean().item()

    def least(self, bins: int = 50) -> float:
        """The least mean square of the cost, from the root mean square error in each bin."""
        k = ((self.ends[0] - self.log_snr) / self.span * bins).long().clamp(0, bins - 1).flatten()
        square = torch.zeros(bins).double().index_add_(0, k, self.half.square().flatten())
        return ((square / k.bincount(minlength=bins)).sqrt().mean() * self.span).square().item()


@torch.no_grad()
def errors(vdm: VDM, x: Tensor, draws: int, seed: int) -> Errors:
    noise, read = Noise(seed, torch.arange(len(x))), vdm.for_evaluation()
    drawn = [read.denoising(x, noise=noise.stratified(j, draws)) for j in range(draws)]
    ends = vdm.schedule.ends
    log_snr = torch.stack([each.log_snr for each in drawn])
    return Errors(log_snr, torch.stack([each.eps_error for each in drawn]).double() / 2, ends)


def through(schedule: NoiseSchedule) -> Callable[[Tensor], Tensor]:
    return lambda log_snr: schedule.slope(schedule.inverse(log_snr))


@torch.enable_grad()
def learned(seen: Errors, steps: int = 300) -> Learned:
    """The interior that makes the mean square of the cost small on these errors."""
    schedule = Learned(*seen.ends, learn_ends=False)
    adam = torch.optim.Adam(schedule.interior.parameters(), lr=0.05)
    for step in range(steps):
        adam.param_groups[0]["lr"] = 0.05 * (1 - step / steps)
        rows = torch.randint(len(seen.half), (4,))
        part = Errors(seen.log_snr[rows], seen.half[rows], seen.ends)
        adam.zero_grad()
        part.moment(through(schedule)(part.log_snr)).mean().log().backward()
        adam.step()
    return schedule


def importance(seen: Errors) -> Callable[[Tensor], Tensor]:
    times, between = ImportanceTime(), LogLinear(*seen.ends)
    flat = seen.log_snr.flatten(), 2 * seen.half.flatten()
    times.observe(Denoising(flat[0], *flat, flat[0], flat[0]), between)
    p = times.density()

    def slope(log_snr: Tensor) -> Tensor:
        k = (between.inverse(log_snr) * times.bins).long().clamp_max(times.bins - 1)
        return seen.span / (times.bins * p[k])

    return slope


def compare(vdm: VDM, train: Tensor, test: Tensor, draws: int) -> None:
    seen, unseen = errors(vdm, train, draws, seed=0), errors(vdm, test, draws, seed=1)
    ends, own = unseen.ends, vdm.schedule
    slopes = {
        name: through(cls(*ends))
        for name, cls in NoiseSchedule.registry.items()
        if cls is not Learned
    }
    slopes |= {"learned": through(learned(seen)), "importance": importance(seen)}
    if isinstance(own, Learned):
        slopes["the run's own"] = through(own)
    square, least = unseen.bound() ** 2, unseen.least()
    print(f"{len(test)} images, {draws} draws each, log SNR {ends[0]:.4g} to {ends[1]:.4g}")
    print(f"mean of the estimator: {unseen.bound():.5g} nats, the same for all\n")
    print("| schedule | variance, nats^2 | standard deviation | over the least variance |")
    print("|---|--:|--:|--:|")
    for name, slope in slopes.items():
        with torch.no_grad():
            moment = unseen.moment(slope(unseen.log_snr))
        variance = moment.mean().item() - square
        error = (moment - 2 * unseen.bound() * unseen.span * unseen.half.mean(0)).std().item()
        print(
            f"| {name} | {variance:.4g} ± {error / math.sqrt(len(test)):.2g} "
            f"| {math.sqrt(variance):.4g} | {variance / (least - square):.3f} |"
        )
    print(f"| least | {least - square:.4g} | {math.sqrt(least - square):.4g} | 1 |")


def main(arguments: Sequence[str]) -> None:
    torch.manual_seed(0)
    usage = (__doc__ or "").split("\n\n")[1]
    if any(each.startswith("run=") for each in arguments):
        folder, config, options = read(arguments, DEFAULTS, usage)
        with trained_vdm(folder, config, options.checkpoint) as (model, _, data):
            train, test = (images(data, split, options.images) for split in ("train", "test"))
            compare(model, train, test, options.draws)
    else:
        options = OmegaConf.merge(DEFAULTS, OmegaConf.from_dotlist(list(arguments)))
        torch.set_default_dtype(torch.float64)
        vdm = VDM(exact(LogLinear(9.0, -9.0)), GaussianLikelihood(), shape=(3,))
        train, test = MEAN + STD * torch.randn(2, options.images, 3)
        compare(vdm, train, test, options.draws)


if __name__ == "__main__":
    sys.exit(command(main))
